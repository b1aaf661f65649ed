"""Data that a program could have seen: prior and posterior predictive draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro import handlers

from llmppl.numpyro.inference.arguments import check_key
from llmppl.numpyro.inference.gathering import computed_decoders, computed_events, laid_out, plate_names
from llmppl.numpyro.inference.importance import block_size, with_params
from llmppl.numpyro.network.lifting import jit
from llmppl.numpyro.programs.particles import Layout
from llmppl.numpyro.programs.tracing import (
    Program,
    Simulated,
    Site,
    Trace,
    common_axes,
    in_data_plate,
    is_deterministic,
    is_latent,
    is_observation,
    is_text,
    plate_nesting,
    plate_sizes,
    structure,
)
from llmppl.posterior.columns import widened
from llmppl.posterior.given_latents import given_latents, number_of_draws
from llmppl.posterior.posterior import Posterior
from llmppl.posterior.replicates import Replicates
from llmppl.text.arguments import check_programs
from llmppl.text.declared import declared


@declared
def replicate(
    model: Program,
    posterior: Posterior | None = None,
    num_samples: int | None = None,
    params: dict[str, Any] | None = None,
    vectorize_data: bool = False,
) -> Callable[..., Replicates]:
    r"""Draws of the observed sites, a function of a key and the program's arguments: of the prior, or with a posterior

    .. math:: z_k \sim p(z|x), \quad x_k^\text{rep} \sim p(x|z_k)

    (Gelman, Meng, Stern 1996). For ``posterior.to_arviz(prior=..., posterior_predictive=...)`` and ArviZ's
    ``plot_ppc``.

    :param posterior: of this program at the same arguments; weighted samples are resampled. Without it the program
        draws its own latents.
    :param num_samples: draws; by default as many as the posterior has samples, and 100 of the prior.
    :param params: values of the program's parameters.
    :param vectorize_data: the returned function takes lists in place of its arguments, as that of
        :func:`~llmppl.numpyro.importance` does.
    :raises TypeError: no :class:`Posterior`; no key of the new style.
    :raises ValueError: a factor, which cannot be drawn; a posterior of other sites or rows.
    """
    check_programs(model=model)
    count = number_of_draws(posterior, num_samples)
    if vectorize_data:
        model = in_data_plate(model)
    program = with_params(dict(params or {}), model)

    def run(rng_key: Array, *args: Any, **kwargs: Any) -> Replicates:
        check_key(rng_key)
        sites = structure(program, args, kwargs)
        axes, sizes = common_axes(sites), plate_sizes(sites)
        where = Layout(plate_nesting(sites), axes, tuple(sizes[dim] for dim in axes))
        latent = {n: {f.name: f.dim for f in s["cond_indep_stack"]} for n, s in sites.items() if is_latent(s)}
        found = given_latents(posterior, latent, where.axes, where.rows, where.nesting, count)
        given = {name: _as_drawn(value, sites[name]) for name, value in found.items()}

        def one(key: Array, values: dict[str, Array]) -> dict[str, Array]:
            latent_key, observed_key = random.split(key)
            told = handlers.substitute(handlers.seed(program, latent_key), data=values)
            with handlers.block(), handlers.trace() as trace, Simulated(observed_key):
                told(*args, **kwargs)
            return {name: trace[name]["value"] for name in kept}

        kept = [n for n, site in sites.items() if is_latent(site) or is_deterministic(site) or is_observation(site)]
        size = block_size(count, sites)
        block = jit(jax.vmap(one))
        parts: list[dict[str, np.ndarray]] = []
        for first in range(0, count, size):
            # Blocks of one size compile once; what the last has too many of is thrown away.
            places = np.minimum(first + np.arange(size), count - 1)
            keys = jax.vmap(lambda number: random.fold_in(rng_key, number))(first + jnp.arange(size))
            drawn = block(keys, {name: jnp.asarray(value[places]) for name, value in given.items()})
            parts.append({name: np.asarray(value)[: count - first] for name, value in drawn.items()})
        values = {name: np.concatenate([part[name] for part in parts]) for name in kept}
        return _replicates(values, sites, where, posterior is not None)

    return run


def _as_drawn(value: np.ndarray, site: Site) -> np.ndarray:
    """A posterior's values of a site, ``(K,)``, plates and event, in the shape and type that the program draws."""
    shape = np.shape(site["value"])
    if is_text(site):
        value = widened(value, shape[-1])
    own = value.reshape((len(value), *value.shape[value.ndim - len(shape) :]))  # no dimensions of size one in front
    return own.astype(np.asarray(site["value"]).dtype)


def _replicates(drawn: dict[str, np.ndarray], sites: Trace, where: Layout, of_posterior: bool) -> Replicates:
    events = {name: site["fn"].event_dim for name, site in sites.items() if site["type"] == "sample"}
    events |= computed_events(sites)
    values = {name: laid_out(jnp.asarray(value), where, events[name]) for name, value in drawn.items()}
    texts = {n: s["fn"].lm.decode for n, s in sites.items() if s["type"] == "sample" and is_text(s)}
    plates, dims = plate_names(sites, where)
    seen = {name for name, site in sites.items() if is_observation(site)}
    return Replicates(
        latents={name: value for name, value in values.items() if name not in seen},
        observations={name: value for name, value in values.items() if name in seen},
        of_posterior=of_posterior,
        batch_shape=where.rows,
        decoders=texts | computed_decoders(sites),
        plates=plates,
        dims=dims,
    )
