"""Posteriors for ArviZ. Needs numpy, xarray and ArviZ; works with arviz 0.2x and 1.x."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmppl.display.protocols import Samples

STATISTICS = {
    "enumeration": ("log_evidence", "ess"),
    "importance": ("log_evidence", "log_evidence_error", "ess", "khat", "elbo", "elbo_error"),
    "smc": ("log_evidence", "log_evidence_error", "ess", "distinct_ancestors"),
    "mcmc": ("ess", "rhat"),
}
"""By method, what ``sample_stats`` says of the weighted samples or chains as a whole."""


def to_arviz(posterior: Samples, num_samples: int | None = None, seed: int = 0, weighted: bool = False) -> Any:
    r"""A posterior as ArviZ data.

    ArviZ takes all draws for equally weighted. So weighted samples are resampled into one chain, and
    draws of MCMC stay the chains that they are. With ``weighted=True`` the samples are left as drawn,
    with their weights beside them: for what reads weights, not for ``summary``.

    Groups, where the posterior has what they hold; batch rows are the dimensions ``row_0``, ``row_1``, ...:

    - ``posterior``: by text site ``<site>_ids`` (padding is −1) and ``<site>_length`` (tokens); other
      sites as they are; ``log_joint``, and ``log_q`` of importance sampling (nats).
    - ``posterior_text``: the texts as strings, which ArviZ's summaries cannot read.
    - ``log_likelihood``: by observed site, nats.
    - ``sample_stats``: ``log_evidence``, ``ess`` and the like of the samples before resampling, one number
      for each row; with ``weighted=True`` also ``log_weight``, ``log_p`` (the joint) and ``log_q`` (nats)
      of each sample; of MCMC the ``acceptance_rate`` of each chain.
    - ``observed_data``: token ids by observed text site; ``observed_text``: the same as strings.

    :param num_samples: draws; as many as the posterior has samples by default.
    :param seed: of the resampling.
    :param weighted: keep the samples and their weights.
    :returns: ``InferenceData`` (arviz 0.x) or ``DataTree`` (arviz 1.x).
    :raises ValueError: answers of decoding, which are no draws; ``num_samples`` for draws that are kept as
        they are; ``weighted=True`` for MCMC.
    """
    import arviz
    import xarray

    if posterior.method == "decoding":
        raise ValueError(
            "answers of decoding are points, not draws from the posterior, and ArviZ would take them for draws. "
            "Use importance(), smc(), mcmc() or exact_posterior(), or read posterior.top(site)."
        )
    if weighted and not posterior.weighted:
        raise ValueError(f"weighted=True needs weights, and draws by {posterior.method} have none. Leave it out.")
    kept = weighted or not posterior.weighted
    if kept and num_samples is not None:
        raise ValueError(
            f"num_samples={num_samples}: the samples are kept as they are, all {posterior.num_samples}. "
            "Leave it out, or take some of them from the result: data.isel(draw=slice(None, None, 10))."
        )
    rows = [f"row_{n}" for n in range(len(posterior.batch_shape))]
    log_q = _log_q(posterior)
    draws = posterior
    if not kept:
        index = posterior.resampling_index(num_samples, seed)
        draws = posterior.taken(index)
        log_q = None if log_q is None else np.take_along_axis(log_q, index, 0)
    chains = posterior.num_chains

    def drawn(value: Any, behind: Sequence[str] = ()) -> Any:
        """``(K,) + batch_shape + ...`` as an array over chains and draws."""
        value = np.asarray(value)
        return xarray.DataArray(value.reshape((chains, -1, *value.shape[1:])), dims=["chain", "draw", *rows, *behind])

    values: dict[str, Any] = {"log_joint": drawn(draws.log_joint)}
    if log_q is not None:
        values["log_q"] = drawn(log_q)
    texts: dict[str, Any] = {}
    for site, value in draws.samples.items():
        behind = [f"{site}_dim_{n}" for n in range(value.ndim - 1 - len(rows))]
        if site in draws.decoders:
            values[f"{site}_ids"] = drawn(value, [*behind[:-1], f"{site}_token"])
            values[f"{site}_length"] = drawn((value >= 0).sum(-1), behind[:-1])
            texts[site] = drawn(np.array(draws.decode(site), dtype=np.str_), behind[:-1])
        else:
            values[site] = drawn(value, behind)

    statistics: dict[str, Any] = {
        name: xarray.DataArray(getattr(posterior, name), dims=rows) for name in STATISTICS[posterior.method]
    }
    if posterior.acceptance is not None:
        statistics["acceptance_rate"] = xarray.DataArray(posterior.acceptance, dims=["chain", *rows])
    if posterior.ess_history is not None:
        statistics["ess_history"] = xarray.DataArray(posterior.ess_history, dims=["step", *rows])
    if weighted:
        statistics |= {"log_weight": drawn(draws.log_weights), "log_p": drawn(draws.log_joint)}
        statistics |= {} if log_q is None else {"log_q": drawn(log_q)}

    observed = {
        site: xarray.DataArray(value, dims=_observed_dims(site, value.shape, posterior.batch_shape))
        for site, value in posterior.observed.items()
    }
    seen_texts = {
        site: xarray.DataArray(np.array(posterior.decode(site), dtype=np.str_), dims=observed[site].dims[:-1])
        for site in posterior.observed
        if site in posterior.decoders
    }
    named = {
        "posterior": values,
        "posterior_text": texts,
        "log_likelihood": {site: drawn(value) for site, value in draws.log_likelihood.items()},
        "sample_stats": statistics,
        "observed_data": observed,
        "observed_text": seen_texts,
    }
    groups = {name: _counted(xarray.Dataset(variables)) for name, variables in named.items() if variables}
    if "InferenceData" in vars(arviz):  # asking 1.x for the name itself warns
        return arviz.InferenceData(**groups, warn_on_custom_groups=False)
    return xarray.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})


def chain_ess(values: np.ndarray, num_chains: int) -> np.ndarray:
    """Bulk effective sample size over chains.

    :param values: chain after chain, ``(num_chains * draws,) + batch_shape``.
    :returns: ``batch_shape``.
    """
    import arviz

    return _of_chains(values, num_chains, lambda chains: arviz.ess(chains))


def chain_rhat(values: np.ndarray, num_chains: int) -> np.ndarray:
    """R̂ (rank-normalised, split) over chains; parameters as of :func:`chain_ess`."""
    import arviz

    return _of_chains(values, num_chains, lambda chains: arviz.rhat(chains))


def _of_chains(values: np.ndarray, num_chains: int, measure: Callable[[np.ndarray], Any]) -> np.ndarray:
    batch_shape = values.shape[1:]
    chains = values.reshape(num_chains, -1, math.prod(batch_shape))
    return np.array([float(measure(chains[..., n])) for n in range(chains.shape[-1])]).reshape(batch_shape)


def _log_q(posterior: Samples) -> np.ndarray | None:
    """The guide's log-density of each sample of importance sampling, ``(K,) + batch_shape``.

    A sample of weight zero has no finite joint to take its weight from; its token scores say log q where
    every site is a text of the guide's, else it is NaN.
    """
    if posterior.method != "importance":
        return None
    possible = np.isfinite(posterior.log_weights)
    log_q = np.full(posterior.log_joint.shape, np.nan)
    log_q[possible] = posterior.log_joint[possible] - posterior.log_weights[possible]
    latents = set(posterior.samples) - set(posterior.deterministic)
    if not possible.all() and set(posterior.token_log_q) == latents:
        lead = posterior.log_joint.shape
        scores = sum(value.reshape(*lead, -1).sum(-1) for value in posterior.token_log_q.values())
        log_q = np.where(possible, log_q, scores)
    return log_q


def _observed_dims(site: str, shape: tuple[int, ...], batch_shape: tuple[int, ...]) -> list[str]:
    """Names of an observed text's dimensions: its rows where it has the posterior's, then its own, then tokens."""
    count = len(batch_shape) if shape[:-1][: len(batch_shape)] == batch_shape else 0
    rows = [f"row_{n}" for n in range(count)]
    return [*rows, *(f"{site}_dim_{n}" for n in range(len(shape) - 1 - count)), f"{site}_token"]


def _counted(dataset: Any) -> Any:
    return dataset.assign_coords({name: np.arange(size) for name, size in dataset.sizes.items()})
