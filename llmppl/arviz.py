"""Posteriors for ArviZ. Needs numpy, xarray and ArviZ; works with arviz 0.2x and 1.x."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from llmppl.inference.posterior import Posterior


def to_arviz(posterior: Posterior, num_samples: int | None = None, seed: int = 0) -> Any:
    """A resampled posterior as ArviZ data: one chain of equally weighted draws.

    :param num_samples: draws; as many as the posterior has samples by default.
    :returns: ``InferenceData`` (arviz 0.x) or ``DataTree`` (arviz 1.x) with the groups ``posterior``
        (``<site>_length`` in tokens, numeric sites as they are, and ``log_joint`` in nats),
        ``posterior_text`` (strings and token ids: ArviZ's summaries cannot read strings),
        ``sample_stats`` (the evidence, its standard error, ESS, k̂ and ELBO of the weighted samples,
        constant over draws) and ``observed_data`` (token ids).
    """
    import arviz
    import xarray

    draws = posterior.resample(num_samples, seed)
    rows = [f"row_{n}" for n in range(len(posterior.batch_shape))]
    lead = ["chain", "draw", *rows]

    def variable(values: Any, extra: list[str], first: list[str] = lead) -> Any:
        dims = (
            first + [f"{name}_{n}" for n, name in enumerate(extra)] if len(set(extra)) < len(extra) else first + extra
        )
        return xarray.DataArray(np.asarray(values), dims=dims)

    numbers: dict[str, Any] = {"log_joint": variable(draws.log_joint[None], [])}
    texts: dict[str, Any] = {}
    for site, value in draws.samples.items():
        extra = [f"{site}_dim_{n}" for n in range(value.ndim - 1 - len(rows))]
        if site in draws.decoders:
            tokens = [*extra[:-1], f"{site}_token"]
            numbers[f"{site}_length"] = variable((value >= 0).sum(-1)[None], tokens[:-1])
            texts[f"{site}_ids"] = variable(value[None], tokens)
            texts[site] = variable(np.array(draws.decode(site))[None], tokens[:-1])
        else:
            numbers[site] = variable(value[None], extra)
    shape = (1, draws.num_samples, *posterior.batch_shape)
    stats = {
        name: variable(np.broadcast_to(getattr(posterior, name), shape), [])
        for name in ("log_evidence", "log_evidence_error", "ess", "khat", "elbo")
    }
    observed = {
        site: xarray.DataArray(value, dims=[f"{site}_dim_{n}" for n in range(value.ndim - 1)] + [f"{site}_token"])
        for site, value in posterior.observed.items()
    }
    groups = {
        "posterior": xarray.Dataset(numbers),
        "sample_stats": xarray.Dataset(stats),
        "observed_data": xarray.Dataset(observed),
    }
    if texts:
        groups["posterior_text"] = xarray.Dataset(texts)
    for group in ("posterior", "sample_stats", "posterior_text"):
        if group in groups:
            groups[group] = groups[group].assign_coords(chain=[0], draw=np.arange(draws.num_samples))
    if hasattr(arviz, "InferenceData"):
        return arviz.InferenceData(**groups, warn_on_custom_groups=False)
    return xarray.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})


def chain_ess(posterior: Posterior) -> np.ndarray:
    """Bulk effective sample size of the joint over the chains of MCMC, of shape ``batch_shape``."""
    import arviz

    return _of_chains(posterior, lambda chains: arviz.ess(chains))


def chain_rhat(posterior: Posterior) -> np.ndarray:
    """R̂ (rank-normalised, split) of the joint over the chains of MCMC, of shape ``batch_shape``."""
    import arviz

    return _of_chains(posterior, lambda chains: arviz.rhat(chains))


def _of_chains(posterior: Posterior, measure: Callable[[np.ndarray], Any]) -> np.ndarray:
    chains = posterior.log_joint.reshape(posterior.num_chains, -1, math.prod(posterior.batch_shape))
    return np.array([float(measure(chains[..., n])) for n in range(chains.shape[-1])]).reshape(posterior.batch_shape)
