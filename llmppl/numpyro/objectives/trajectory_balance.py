"""Trajectory balance, with a learned log-partition or its VarGrad form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro import handlers

from llmppl.numpyro.objectives.behaviour import Behaviour
from llmppl.numpyro.objectives.particle_objective import ParticleObjective, Report, report
from llmppl.numpyro.programs.particles import Drawing, Particle, layout, run_particle
from llmppl.numpyro.programs.tracing import Program, Values, observing, simulate, structure, subsampled
from llmppl.posterior.floors import checked_floor
from llmppl.text.declared import declared


class TrajectoryBalance(ParticleObjective):
    r"""Trajectory balance [1], an off-policy objective: any particles serve.

    ``log_partition="vargrad"`` [2, 3], for each observation :math:`x` the sample variance over its own ``K`` particles,

    .. math:: \mathcal L(x) = \operatorname{Var}_k\left[\log q(z_k|x) - \log p(x, z_k)\right]

    On-policy its expected gradient is :math:`2 \nabla \mathrm{KL}(q \| p)`, with the leave-one-out baseline of
    :class:`LeaveOneOutELBO`.

    ``log_partition="learned"``, with the guide's own :math:`\log Z_\theta(x)`
    (:class:`~llmppl.numpyro.guides.GFlowNetGuide` has one),

    .. math:: \mathcal L(x) = \frac1K\sum_k\left(\log Z_\theta(x) + \log q(z_k|x) - \log p(x, z_k)\right)^2

    Both are zero exactly where the guide is the posterior. Parameters of the model get no gradient: they would learn to
    make particles alike, not the data probable, as by :class:`LeaveOneOutELBO`.

    Two more arguments of a step are the objective's, not the program's, and may differ from step to step without
    compiling anew: ``svi.update(state, *args, replayed={"middle": texts})`` puts ``n`` given values, ``(n,) +
    batch_shape + event_shape`` by site, in the place of the first ``n`` particles; ``target_temperature=T`` aims at
    :math:`p(x, z)^{1/T}`.

    :param num_particles: ``K``.
    :param log_partition: ``"vargrad"`` or ``"learned"``.
    :param behaviour: where particles come from; by default from the guide.
    :param floor: nats that a joint counts as where it is less, so that a hard condition of the program (−inf) has a
        finite loss. It is a bias: the target is then proportional to :math:`\max(p(x, z), e^\text{floor})`. None by
        default.

    References

    [1] Malkin, Jain, Bengio, Sun, Bengio (2022), `Trajectory balance: improved credit assignment in GFlowNets`.
    [2] Richter, Boustati, Nüsken, Ruiz, Akyildiz (2020), `VarGrad: a low-variance gradient estimator for variational
    inference`.
    [3] Zhang, Rainone, Peschl, Bondesan (2023), `Robust scheduling with GFlowNets`.
    """

    fewest_particles = 2

    @declared
    def __init__(
        self,
        num_particles: int = 8,
        log_partition: str = "vargrad",
        behaviour: Behaviour | None = None,
        floor: float | None = None,
    ) -> None:
        super().__init__(num_particles)
        self.floor = checked_floor(floor)
        if log_partition not in ("vargrad", "learned"):
            raise ValueError(f"log_partition={log_partition!r} must be 'vargrad' or 'learned'.")
        if behaviour is not None and not isinstance(behaviour, Behaviour):
            raise TypeError(f"behaviour must be an llmppl.numpyro.objectives.Behaviour, got {behaviour!r}.")
        self.log_partition = log_partition
        self.behaviour = behaviour or Behaviour()

    def loss_and_report(
        self,
        rng_key: Array,
        param_map: Mapping[str, Any],
        model: Program,
        guide: Program,
        *args: Any,
        replayed: Values | None = None,
        target_temperature: float | Array = 1.0,
        **kwargs: Any,
    ) -> tuple[Array, Report]:
        choose, key, simulation = random.split(rng_key, 3)
        replayed = _checked(replayed or {}, self.num_particles)
        if replayed and (some := subsampled(structure(model, args, kwargs))):
            raise ValueError(
                f"replayed= values are of the rows that they were drawn for, and plate {next(iter(some))!r} takes "
                "others at every step. Give the program the rows as arguments: fit(..., batch_size=)."
            )
        param_map = self._settled(rng_key, param_map, model, guide, args, kwargs)

        def on_data() -> tuple[Array, Report]:
            return self._loss(key, param_map, model, guide, args, kwargs, replayed, target_temperature)

        def on_simulated() -> tuple[Array, Report]:
            values, seen = simulate(simulation, handlers.substitute(model, data=dict(param_map)), args, kwargs)
            own_model, own_guide = observing(model, guide, lax.stop_gradient(seen))
            given = {name: lax.stop_gradient(value)[None] for name, value in values.items()}
            return self._loss(key, param_map, own_model, own_guide, args, kwargs, given, target_temperature)

        if self.behaviour.sleep == 0:
            return on_data()
        if self.behaviour.sleep == 1:
            return on_simulated()
        return lax.cond(random.bernoulli(choose, self.behaviour.sleep), on_simulated, on_data)

    def _loss(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: Values,
        target_temperature: float | Array,
    ) -> tuple[Array, Report]:
        """The loss of one call.

        :param given: by site, values of the first particles.
        """
        count = self.num_particles
        heat_key, key = random.split(rng_key)
        number = next((len(value) for value in given.values()), 0)
        taken = jnp.arange(count) < number
        heats = self.behaviour.heats(heat_key, count, number)
        if self.behaviour.tempered or given:
            particles = self._drawn(key, params, model, guide, args, kwargs, heats, given, taken)
        else:
            particles = self._particles(key, params, model, guide, args, kwargs)
        said = report(particles, (heats == 1.0) & ~taken)
        log_p = particles.log_p
        if self.floor is not None:
            said |= {"floored": (log_p < self.floor).sum()}
            log_p = jnp.maximum(log_p, self.floor)
        excess = particles.log_q - log_p / target_temperature  # (K,) + rows
        if self.log_partition == "vargrad":
            return excess.var(0, ddof=1).sum(), said
        log_z = self._log_partition(params, guide, args, kwargs)
        rows = excess.shape[1:]
        if log_z.shape != rows:
            raise ValueError(
                f"guide.log_partition(*args) has shape {tuple(log_z.shape)}, but the program has observations of "
                f"shape {tuple(rows)}: rows that share a latent are one observation. Use log_partition='vargrad'."
            )
        return jnp.square(log_z + excess).mean(0).sum(), said

    def _drawn(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        heats: Array,
        given: Values,
        taken: Array,
    ) -> Particle:
        """Particles of the behaviour policy."""
        where = layout(model, guide, args, kwargs)
        # The others are drawn, and what stands here for them is not looked at.
        full = {n: jnp.concatenate([v, jnp.repeat(v[:1], len(taken) - len(v), 0)]) for n, v in given.items()}

        def particle(key: Array, heat: Array, own: Values, is_taken: Array) -> Particle:
            drawing = Drawing(heat, own, is_taken)
            return run_particle(where, model, guide, dict(params), args, kwargs, key, gradients=True, drawing=drawing)

        return jax.vmap(particle)(random.split(rng_key, len(taken)), heats, full, taken)

    def _log_partition(
        self, params: Mapping[str, Any], guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Array:
        if not hasattr(guide, "log_partition"):
            raise TypeError(
                f"log_partition='learned' needs a guide with log_partition(*args), and {type(guide).__name__} has "
                "none. Use GFlowNetGuide, or log_partition='vargrad'."
            )
        with handlers.block():
            return handlers.substitute(guide.log_partition, data=dict(params))(*args, **kwargs)

    def settings(self) -> dict[str, Any]:
        floor = {} if self.floor is None else {"floor": self.floor}
        return {**super().settings(), "log_partition": self.log_partition, "behaviour": self.behaviour, **floor}


def _checked(replayed: Values, num_particles: int) -> Values:
    """Replayed values as arrays.

    :raises ValueError: of several numbers, or more than there are particles.
    """
    arrays = {name: jnp.asarray(value) for name, value in replayed.items()}
    counts = {name: len(value) for name, value in arrays.items()}
    if len(set(counts.values())) > 1 or max(counts.values(), default=0) > num_particles:
        raise ValueError(
            f"replayed= holds {counts} values; every latent site needs equally many, at most num_particles="
            f"{num_particles}."
        )
    return arrays
