"""Reweighted wake-sleep: forward KL on simulated and on self-normalised samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro import handlers

from llmppl.numpyro.network.reading import sharing
from llmppl.numpyro.objectives.particle_objective import ParticleObjective, Report, normalised_weights, report
from llmppl.numpyro.programs.particles import given, layout, score_sites
from llmppl.numpyro.programs.tracing import Program, observing, simulate
from llmppl.text.declared import declared


class WakeSleep(ParticleObjective):
    r"""Reweighted wake-sleep for the guide [1], the baseline of every comparison.

    .. math:: \mathcal L = -\text{insomnia}\sum_k \bar w_k \log q(z_k|x)
              - (1-\text{insomnia})\,\frac1K\sum_k\log q(z'_k|x'_k),
              \qquad \bar w_k \propto p(x, z_k)/q(z_k|x),\quad (z', x') \sim p

    The first term (wake-φ) estimates the gradient of :math:`\mathrm{KL}(p(z|x)\|q)` with a bias of order 1/K; the
    second (sleep, or neural posterior estimation) is unbiased for simulated ``x'``. An observed stream is simulated to
    the observed number of tokens. Parameters of the model get no gradient. Where a hard condition makes a joint zero,
    wake-φ gives it weight zero; an observation of which no particle is possible teaches nothing in that step, and is
    counted as ``skipped``.

    :param num_particles: ``K``, for either phase.
    :param insomnia: share of the wake-φ term, from 0 (sleep only) to 1 (wake-φ only).

    References

    [1] Le, Kosiorek, Siddharth, Teh, Wood (2019), `Revisiting reweighted wake-sleep`, sec. 3.
    """

    @declared
    def __init__(self, num_particles: int = 8, insomnia: float = 0.5) -> None:
        if not 0 <= insomnia <= 1:
            raise ValueError(f"insomnia={insomnia} must lie between 0 (sleep only) and 1 (wake-φ only).")
        if insomnia > 0 and num_particles < 2:
            raise ValueError("num_particles=1: self-normalised weights need at least 2 particles.")
        super().__init__(num_particles)
        self.insomnia = insomnia

    def loss_and_report(
        self, rng_key: Array, param_map: Mapping[str, Any], model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> tuple[Array, Report]:
        wake, sleep = random.split(rng_key)
        param_map = self._settled(rng_key, param_map, model, guide, args, kwargs)
        loss: Any = 0.0
        said = {"elbo": jnp.asarray(jnp.nan), "ess": jnp.asarray(jnp.nan)}  # of the wake phase only
        if self.insomnia > 0:
            particles = self._particles(wake, param_map, model, guide, args, kwargs)
            log_weights = lax.stop_gradient(particles.log_p - particles.log_q)
            loss = loss - self.insomnia * (normalised_weights(log_weights) * particles.log_q).sum()
            said = report(particles) | {"skipped": (log_weights == -jnp.inf).all(0).sum()}
        if self.insomnia < 1:
            loss = loss + (1 - self.insomnia) * self._sleep(sleep, param_map, model, guide, args, kwargs)
        return loss, said

    def _sleep(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Array:
        where = layout(model, guide, args, kwargs)
        program = handlers.substitute(model, data=dict(params))

        def pair(key: Array) -> Array:
            with sharing():
                values, seen = lax.stop_gradient(simulate(key, program, args, kwargs))
                told = observing(model, guide, seen)[1]
                return score_sites(where, given(told, dict(params), args, kwargs, values))

        return -jax.vmap(pair)(random.split(rng_key, self.num_particles)).mean(0).sum()

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "insomnia": self.insomnia}
