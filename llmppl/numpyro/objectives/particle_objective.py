"""What the objectives have in common: particles under ``vmap``, and NumPyro's loss protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random
from numpyro import handlers
from numpyro.infer.elbo import ELBO

from llmppl.numpyro.programs.particles import Particle, choose_rows, hold_program, layout, run_particle
from llmppl.numpyro.programs.tracing import Program
from llmppl.text.declared import declared

Report = dict[str, Array]
"""``elbo`` (nats for one x) and ``ess`` (effective sample size) of a step's on-policy particles; of hard conditions
also how many joints were ``floored`` and how many observations ``skipped``."""


class ParticleObjective(ELBO):
    """An objective over ``K`` particles under ``vmap``: what they share is read once.

    It is used as any ELBO of NumPyro: ``SVI(model, guide, optim, loss=objective)``. Losses are summed over the rows of
    plates that contain every site; each row is an observation ``x`` of its own.

    Compiled code raises no exceptions: where a site has probability zero or is not a number, the loss is infinite or
    NaN. :func:`llmppl.numpyro.fit` looks at each and names the site.

    Strings are no JAX values. ``svi.run(key, steps, "ab", "cd")`` and ``svi.update(state, "ab", "cd")`` take them;
    ``jit(svi.update)`` takes ``lm.argument("ab")``. On a real model compile with :func:`llmppl.numpyro.jit`, which
    passes the weights in, and not with ``svi.run``, which makes them constants of the executable.

    :param num_particles: ``K``, latent samples for each ``x``.
    """

    can_infer_discrete = True
    fewest_particles = 1

    @declared
    def __init__(self, num_particles: int) -> None:
        if isinstance(num_particles, bool) or not isinstance(num_particles, int):
            raise TypeError(f"num_particles must be a whole number, got {num_particles!r}.")
        if num_particles < self.fewest_particles:
            raise ValueError(
                f"num_particles={num_particles}: {type(self).__name__} compares particles of the same "
                f"observation and needs at least {self.fewest_particles}."
            )
        super().__init__(num_particles=num_particles, vectorize_particles=True)

    def loss_and_report(
        self, rng_key: Array, param_map: Mapping[str, Any], model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> tuple[Array, Report]:
        """The loss, whose gradient trains the guide, and what the step's particles say."""
        raise NotImplementedError

    def loss(
        self, rng_key: Array, param_map: Mapping[str, Any], model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Array:
        """The loss, a scalar, whose gradient trains the guide."""
        with handlers.block():
            return self.loss_and_report(rng_key, param_map, model, guide, *args, **kwargs)[0]

    def loss_with_mutable_state(
        self, rng_key: Array, param_map: Mapping[str, Any], model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As :meth:`loss`; no state.

        :raises ValueError: the program has ``numpyro.mutable`` sites.
        """
        raise ValueError(
            f"{type(self).__name__} does not keep the state of numpyro.mutable sites. Give the program its state as an "
            "argument."
        )

    def _settled(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        program_learns: bool = False,
    ) -> dict[str, Any]:
        """What is the same for all particles of a step: parameters, and the rows of subsampled plates."""
        own = dict(params) if program_learns else hold_program(params, model, args, kwargs)
        return {**own, **choose_rows(rng_key, model, guide, args, kwargs)}

    def _particles(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        **options: Any,
    ) -> Particle:
        """The particles of one step, scored with gradients; all fields start with a dimension ``K``."""
        where = layout(model, guide, args, kwargs)

        def particle(key: Array) -> Particle:
            return run_particle(where, model, guide, dict(params), args, kwargs, key, gradients=True, **options)

        return jax.vmap(particle)(random.split(rng_key, self.num_particles))

    def settings(self) -> dict[str, Any]:
        """The objective's numbers."""
        return {"num_particles": self.num_particles}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"


def report(particles: Particle, on_policy: Array | None = None) -> Report:
    """ELBO and effective sample size of ``(K, ...)`` particles, averaged over the rows; NaN of none.

    :param on_policy: which of them the guide drew as it is, boolean ``(K,)``; all by default.
    """
    log_weights = jax.lax.stop_gradient(particles.log_p - particles.log_q)
    count: Any = len(log_weights)
    if on_policy is not None:
        count = on_policy.sum()
        own = on_policy.reshape((-1,) + (1,) * (log_weights.ndim - 1))
        elbo = jnp.where(own, log_weights, 0.0).sum(0) / count
        log_weights = jnp.where(own, log_weights, -jnp.inf)
    else:
        elbo = log_weights.mean(0)
    squares = jnp.square(normalised_weights(log_weights)).sum(0)
    ess = jnp.where(squares > 0, 1 / jnp.where(squares > 0, squares, 1.0), 0.0)
    return {"elbo": elbo.mean(), "ess": jnp.where(count > 0, ess.mean(), jnp.nan)}


def normalised_weights(log_weights: Array) -> Array:
    """Weights of ``(K, ...)`` log-weights, summing to one over the particles; zero where none is possible."""
    possible = (log_weights > -jnp.inf).any(0)
    return jax.nn.softmax(jnp.where(possible, log_weights, 0.0), 0) * possible
