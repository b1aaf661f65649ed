"""The evidence lower bound with a leave-one-out baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from llmppl.numpyro.objectives.particle_objective import ParticleObjective, Report, report
from llmppl.numpyro.programs.tracing import Program, is_latent, structure
from llmppl.text.declared import declared


class LeaveOneOutELBO(ParticleObjective):
    r"""The negative ELBO, reverse KL up to a constant, by the score function with a leave-one-out baseline over the
    particles of the same observation [1].

    .. math:: \nabla\mathcal L(x) = \frac1K\sum_k\Big(f_k - \frac1{K-1}\sum_{j\ne k} f_j\Big)\nabla\log q(z_k|x),
              \qquad f_k = \log q(z_k|x) - \log p(x, z_k)

    Reparametrised sites (continuous latents of a mixed program) contribute pathwise gradients instead, as in NumPyro's
    ``Trace_ELBO``. The baseline needs no state.

    :param num_particles: ``K``, at least 2.

    References

    [1] Kool, van Hoof, Welling (2019), `Buy 4 REINFORCE samples, get a baseline for free`.
    """

    fewest_particles = 2

    @declared
    def __init__(self, num_particles: int = 8) -> None:
        super().__init__(num_particles)

    def loss_and_report(
        self, rng_key: Array, param_map: Mapping[str, Any], model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> tuple[Array, Report]:
        param_map = self._settled(rng_key, param_map, model, guide, args, kwargs, program_learns=True)
        particles = self._particles(rng_key, param_map, model, guide, args, kwargs, pathwise=True)
        sites = structure(guide, args, kwargs)
        zero = jnp.zeros_like(particles.log_q)
        score, entropy = zero, zero
        for name, log_q in particles.proposed.items():
            assert is_latent(sites[name])
            if sites[name]["fn"].has_rsample:
                entropy = entropy + log_q
            else:
                score = score + log_q
        f = lax.stop_gradient(particles.log_q - particles.log_p)  # (K,) + rows
        others = (f.sum(0) - f) / (self.num_particles - 1)
        surrogate = ((f - others) * score + entropy - particles.log_p).mean(0).sum()
        # Its gradient, the ELBO's value.
        return surrogate - lax.stop_gradient(surrogate) + f.mean(0).sum(), report(particles)
