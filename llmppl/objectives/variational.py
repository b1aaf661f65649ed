"""The evidence lower bound with a leave-one-out baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmppl.objectives.particle_objective import ParticleObjective
from llmppl.programs.particles import Particles, sum_site
from llmppl.programs.structure import Program
from llmppl.text.declared import declared


class LeaveOneOutELBO(ParticleObjective):
    r"""The negative ELBO, reverse KL up to a constant, by the score function with a leave-one-out
    baseline over the particles of the same observation [1].

    .. math:: \nabla\mathcal L(x) = \frac1K\sum_k\Big(f_k - \frac1{K-1}\sum_{j\ne k} f_j\Big)\nabla\log q(z_k|x),
              \qquad f_k = \log q(z_k|x) - \log p(x, z_k)

    Sites with ``rsample`` (continuous latents of a mixed program) contribute pathwise gradients
    instead, as in Pyro's ``Trace_ELBO``. The baseline needs no state, so that an optimizer sees the
    guide's parameters and nothing else.

    :param num_particles: ``K``, at least 2.

    References

    [1] Kool, van Hoof, Welling (2019), `Buy 4 REINFORCE samples, get a baseline for free`.
    """

    fewest_particles = 2

    @declared
    def __init__(self, num_particles: int = 8) -> None:
        super().__init__(num_particles)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        particles = self._particles(model, guide, args, kwargs, detach=False, score_parts=True)
        f = (particles.log_q - particles.log_p).detach()  # (K,) + batch_shape
        others = (f.sum(0) - f) / (self.num_particles - 1)
        score = self._sum_parts(particles, "score_function")
        entropy = self._sum_parts(particles, "entropy_term")
        # Of value zero: only its gradient counts.
        surrogate = (f - others) * (score - _detached(score)) + (entropy - particles.log_p)
        value = f.mean(0).sum()
        surrogate = surrogate.mean(0).sum()
        return surrogate - surrogate.detach() + value

    def _sum_parts(self, particles: Particles, part: str) -> Tensor | float:
        total: Tensor | float = 0.0
        for site in particles.guide_trace.nodes.values():
            if site["type"] == "sample" and "score_parts" in site:
                term = getattr(site["score_parts"], part)
                if isinstance(term, Tensor):
                    total = total + sum_site(term, particles.axes, particles.nesting)
        return total


def _detached(term: Tensor | float) -> Tensor | float:
    return term.detach() if isinstance(term, torch.Tensor) else term
