"""Posteriors for ArviZ. Needs numpy, xarray and ArviZ; works with arviz 0.2x and 1.x."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmppl.display.protocols import Predicted, Samples

STATISTICS = {
    "enumeration": ("log_evidence", "ess"),
    "importance": ("log_evidence", "log_evidence_error", "ess", "khat", "elbo", "elbo_error"),
    "smc": ("log_evidence", "log_evidence_error", "ess", "distinct_ancestors"),
    "mcmc": ("ess", "rhat"),
}
"""By method, what ``sample_stats`` says of the weighted samples or chains as a whole."""


def to_arviz(
    posterior: Samples,
    num_samples: int | None = None,
    seed: int = 0,
    weighted: bool = False,
    coords: Mapping[str, Any] | None = None,
    prior: Predicted | None = None,
    posterior_predictive: Predicted | None = None,
) -> Any:
    r"""A posterior as ArviZ data.

    ArviZ takes all draws for equally weighted. So weighted samples are resampled into one chain, and
    draws of MCMC stay the chains that they are. With ``weighted=True`` the samples are left as drawn,
    with their weights beside them: for what reads weights, not for ``summary``.

    Dimensions are named after the program's plates; rows of data that have no plate of the program's are ``row_0``.

    Groups, where the posterior has what they hold:

    - ``posterior``: by text site ``<site>_ids`` (padding is −1) and ``<site>_length`` (tokens); other
      sites as they are; ``log_joint``, and ``log_q`` of importance sampling (nats).
    - ``posterior_text``: the texts as strings, which ArviZ's summaries cannot read.
    - ``log_likelihood``: by observed site, nats.
    - ``sample_stats``: ``log_evidence``, ``ess`` and the like of the samples before resampling, one number
      for each row; with ``weighted=True`` also ``log_weight``, ``log_p`` (the joint) and ``log_q`` (nats)
      of each sample; of MCMC the ``acceptance_rate`` of each chain.
    - ``observed_data``: numbers; by observed text site token ids, and ``<site>_length``; ``observed_text``: the texts
      as strings.
    - ``prior``, ``prior_predictive`` and ``posterior_predictive``, with their texts as strings in ``prior_text`` and so
      on: of what :func:`~llmppl.replicate` has drawn, under the names of ``posterior`` and ``observed_data``.

    :param num_samples: draws; as many as the posterior has samples by default.
    :param seed: of the resampling.
    :param weighted: keep the samples and their weights.
    :param coords: by dimension, the labels of its entries, such as titles of stories.
    :param prior: draws of the program itself, ``replicate(program)(...)``.
    :param posterior_predictive: ``replicate(program, posterior)(...)``.
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
    rows = _rows(posterior)
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

    values, texts = _sites(draws, draws.samples, rows, drawn, "{}_ids")
    values = {"log_joint": drawn(draws.log_joint), **values}
    if log_q is not None:
        values["log_q"] = drawn(log_q)

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

    observed, seen_texts = _observed(posterior, rows)
    named = {
        "posterior": values,
        "posterior_text": texts,
        "log_likelihood": {site: drawn(value) for site, value in draws.log_likelihood.items()},
        "sample_stats": statistics,
        "observed_data": observed,
        "observed_text": seen_texts,
    }
    for name, predicted in (("prior", prior), ("posterior", posterior_predictive)):
        if predicted is not None:
            _check_predicted(predicted, posterior, "prior" if name == "prior" else "posterior_predictive")
            if name == "prior":
                named["prior"], named["prior_text"] = _sites(
                    predicted, predicted.latents, rows, _one_chain(rows), "{}_ids"
                )
            found = _sites(predicted, predicted.observations, rows, _one_chain(rows), "{}")
            named[f"{name}_predictive"], named[f"{name}_predictive_text"] = found
    _check_coords(coords, named)
    groups = {name: _counted(xarray.Dataset(variables), coords) for name, variables in named.items() if variables}
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


def _rows(posterior: Samples | Predicted) -> list[str]:
    """Names of the rows' dimensions: those of the plates, but for the ones that are no plates of the program's."""
    names = [*posterior.plates, *[""] * (len(posterior.batch_shape) - len(posterior.plates))]
    return [f"row_{n}" if not name or name.startswith("_") else name for n, name in enumerate(names)]


def _behind(posterior: Samples | Predicted, site: str, count: int) -> list[str]:
    """Names of ``count`` dimensions of a site behind the rows: its plates', then numbered ones."""
    plates = [name or f"{site}_plate_{n}" for n, name in enumerate(posterior.dims.get(site, ()))][:count]
    return [*plates, *(f"{site}_dim_{n}" for n in range(count - len(plates)))]


def _sites(
    posterior: Samples | Predicted,
    values: Mapping[str, Any],
    rows: Sequence[str],
    drawn: Callable[..., Any],
    ids: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draws ``(K,) + batch_shape + ...`` by site as numbers, and the texts among them as strings.

    :param ids: a text's tokens are called so.
    """
    numbers: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    for site, value in values.items():
        text = site in posterior.decoders
        behind = _behind(posterior, site, value.ndim - 1 - len(rows) - text)
        if text:
            numbers[ids.format(site)] = drawn(value, [*behind, f"{site}_token"])
            numbers[f"{site}_length"] = drawn((value >= 0).sum(-1), behind)
            texts[site] = drawn(np.array(posterior.decode(site), dtype=np.str_), behind)
        else:
            numbers[site] = drawn(value, behind)
    return numbers, texts


def _observed(posterior: Samples, rows: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was observed, and the texts among it as strings."""
    import xarray

    numbers: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    for site, value in posterior.observed.items():
        if site in posterior.dims and site not in posterior.decoders:
            numbers[site] = xarray.DataArray(value, dims=[*rows, *_behind(posterior, site, value.ndim - len(rows))])
            continue
        # A text that all rows share has none of theirs.
        own = list(rows) if value.shape[:-1][: len(rows)] == posterior.batch_shape else []
        dims = [*own, *_behind(posterior, site, value.ndim - 1 - len(own))]
        numbers[site] = xarray.DataArray(value, dims=[*dims, f"{site}_token"])
        numbers[f"{site}_length"] = xarray.DataArray((value >= 0).sum(-1), dims=dims)
        if site in posterior.decoders:
            texts[site] = xarray.DataArray(np.array(posterior.decode(site), dtype=np.str_), dims=dims)
    return numbers, texts


def _one_chain(rows: Sequence[str]) -> Callable[..., Any]:
    def drawn(value: Any, behind: Sequence[str] = ()) -> Any:
        import xarray

        return xarray.DataArray(np.asarray(value)[None], dims=["chain", "draw", *rows, *behind])

    return drawn


def _check_predicted(predicted: Predicted, posterior: Samples, name: str) -> None:
    if not hasattr(predicted, "of_posterior"):
        raise TypeError(f"{name} must be draws by replicate(), got {type(predicted).__name__}. {_mend(name)}")
    if predicted.of_posterior != (name != "prior"):
        kind = "the posterior" if predicted.of_posterior else "the prior"
        raise ValueError(f"{name}={predicted!r} is drawn from {kind}. {_mend(name)}")
    if predicted.batch_shape != posterior.batch_shape:
        raise ValueError(
            f"{name} has rows {predicted.batch_shape}, and the posterior {posterior.batch_shape}. Draw it with the "
            "same arguments, and vectorize_data= alike."
        )


def _mend(name: str) -> str:
    return f"Pass {'replicate(program)(...)' if name == 'prior' else 'replicate(program, posterior)(...)'}."


def _check_coords(coords: Mapping[str, Any] | None, named: Mapping[str, Mapping[str, Any]]) -> None:
    sizes = {
        str(dim): size for group in named.values() for array in group.values() for dim, size in array.sizes.items()
    }
    for dim, labels in (coords or {}).items():
        if dim not in sizes or dim in ("chain", "draw"):
            known = sorted(set(sizes) - {"chain", "draw"})
            raise ValueError(f"coords names {dim!r}, which is no dimension of the posterior's. It has {known}.")
        if len(labels) != sizes[dim]:
            raise ValueError(f"coords[{dim!r}] has {len(labels)} labels, and the dimension {sizes[dim]} entries.")


def _counted(dataset: Any, coords: Mapping[str, Any] | None = None) -> Any:
    known = coords or {}
    return dataset.assign_coords({n: np.asarray(known.get(n, np.arange(size))) for n, size in dataset.sizes.items()})
