"""Bounds of the log evidence from both sides, and of both divergences, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.scipy.special import logsumexp

from llmppl.numpyro.inference.arguments import Compiled, check_key, language_model
from llmppl.numpyro.inference.gathering import blame, check_unscaled, faulty
from llmppl.numpyro.inference.importance import block_size, check_lists, current_params, with_params
from llmppl.numpyro.network.reading import sharing
from llmppl.numpyro.programs.particles import Particle, given, layout, run_particle, score_particle
from llmppl.numpyro.programs.tracing import Program, Values, in_data_plate, is_latent, observing, simulate, structure
from llmppl.posterior.brackets import Bounds
from llmppl.posterior.exactness import check_scores_given
from llmppl.text.arguments import check_programs
from llmppl.text.declared import declared


@declared
def bounds(
    model: Program,
    guide: Program,
    num_samples: int = 64,
    simulations: int = 1,
    vectorize_data: bool = False,
    method: str = "importance",
    params: dict[str, Any] | None = None,
) -> Callable[..., Bounds]:
    r"""Two-sided bounds on simulated data [1, 2]: a function ``(rng_key, *args, **kwargs)``.

    It draws :math:`(z^*, x^*)` from the program, so that :math:`z^*` is an exact posterior draw at
    :math:`x^*`. With :math:`w(z) = p(x^*, z)/q(z|x^*)` and :math:`z_k \sim q`

    .. math:: \mathbb E\log\frac1K\sum_{k=1}^{K} w(z_k) \le \log Z(x^*)
              \le \mathbb E\log\frac1K\Big(w(z^*) + \sum_{k=1}^{K-1} w(z_k)\Big)

    and with :math:`\log Z` both divergences are bracketed. The observed values among the arguments say
    only what is observed and, of a stream, how many tokens. The bounds hold on average over simulated
    observations. For the arguments as they are ask with ``simulations=0``: the lower bound is all there is.

    A simulation is compiled once, for all simulations and for later calls of the same shapes, as
    :func:`~llmppl.numpyro.importance` is.

    :param num_samples: ``K``, at least 2.
    :param simulations: draws of :math:`(z^*, x^*)` for each call; 0 for the observations as they are.
    :param vectorize_data: as for :func:`~llmppl.numpyro.importance`; each row is an observation of its own.
    :param method: ``"importance"``.
    :param params: of the guide and the program by name, e.g. ``svi_result.params``.
    :raises ValueError: a factor in the program, a guide that does not score what it did not draw, a scaled site,
        log-probabilities that are NaN.
    :raises TypeError: a guide that takes no ``observations=``; a first argument that is no key.

    References

    [1] Grosse, Ghahramani, Adams (2015), `Sandwiching the marginal likelihood using bidirectional Monte Carlo`.
    [2] Zhao, Brekelmans, Makhzani, Grosse (2024), `Probabilistic inference in language models via twisted
    sequential Monte Carlo`, prop. 5.1.
    """
    check_programs(model=model, guide=guide)
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}: one of them is the simulated latents.")
    if simulations < 0:
        raise ValueError(f"simulations must not be negative, got {simulations}. 0 takes the observations as given.")
    if method != "importance":
        raise ValueError(f"method={method!r} must be 'importance'; SMC is a method of llmppl.bounds, with Pyro, only.")
    check_scores_given(guide, "bounds()")
    told = guide
    if vectorize_data:
        model, guide = in_data_plate(model), in_data_plate(guide)

    def once(
        keys: Array, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Particle, Particle | None, Values]:
        programs: tuple[Program, Program] = (model, guide)
        latents: Values | None = None
        observations: Values = {}
        draws, simulating = keys[:-1], keys[-1]
        if simulations:
            latents, observations = simulate(simulating, with_params(params, model), args, kwargs)
            programs = observing(model, guide, observations)
        where = layout(with_params(params, programs[0]), with_params(params, programs[1]), args, kwargs)
        size = block_size(num_samples, structure(with_params(params, model), args, kwargs))
        drawn = jax.lax.map(
            lambda key: run_particle(where, *programs, params, args, kwargs, key), draws, batch_size=size
        )
        if latents is None:
            return drawn, None, observations
        with sharing():
            exact = score_particle(where, *(given(program, params, args, kwargs, latents) for program in programs))
        return drawn, exact, observations

    compiled = Compiled(once)

    def run(rng_key: Array, *args: Any, **kwargs: Any) -> Bounds:
        check_key(rng_key)
        if vectorize_data:
            check_lists(args)
        own_params = current_params(told, params)
        sites, proposed = (structure(with_params(own_params, own), args, kwargs) for own in (model, guide))
        check_unscaled(sites, proposed)
        hidden = [name for name, site in proposed.items() if is_latent(site) and name not in sites]
        if hidden:
            raise ValueError(
                f"the guide has auxiliary sites {hidden}, so it has no marginal density of given latents. "
                "Use a guide whose latent sites are the model's."
            )
        lm = language_model(told, sites, proposed)
        parts = []
        for own_key in random.split(rng_key, max(simulations, 1)):
            drawn, exact, observations = compiled(random.split(own_key, num_samples + 1), own_params, args, kwargs, lm)
            single = None if exact is None else jax.tree.map(lambda leaf: leaf[None], exact)
            programs = observing(model, guide, observations) if simulations else (model, guide)
            for particles, allow_zero in ((drawn, False), (single, True)):
                if particles is not None and (bad := faulty(particles, allow_zero)) is not None:
                    values = {name: value[bad] for name, value in particles.values.items()}
                    raise blame(programs, own_params, args, kwargs, values, bad)
            parts.append(_bounds(drawn.log_p - drawn.log_q, None if single is None else single.log_p - single.log_q))
        return Bounds.join(parts)

    run.compilations = compiled.count  # type: ignore[attr-defined]
    return run


def _bounds(drawn: Array, exact: Array | None) -> Bounds:
    """The bounds of ``(K,) + rows`` log-weights of the guide's draws and ``(1,) + rows`` of the exact one."""
    upper = None if exact is None else _log_mean(jnp.concatenate([drawn[:-1], exact]))
    return Bounds(
        lower=_flat(_log_mean(drawn)),
        upper=None if upper is None else _flat(upper),
        elbo=_flat(drawn.mean(0)),
        # Where the guide cannot go, KL(p‖q) is infinite: an answer, not an error.
        exact_log_weight=None if exact is None else _flat(exact[0]),
        num_samples=len(drawn),
    )


def _log_mean(log_weights: Array) -> Array:
    return logsumexp(log_weights, 0) - jnp.log(len(log_weights))


def _flat(values: Array) -> np.ndarray:
    return np.asarray(values).astype(np.float64).reshape(-1)
