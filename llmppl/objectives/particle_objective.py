"""What the objectives have in common: vectorised particles, and Pyro's loss protocol."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from llmppl.programs.particles import Particles, check_finite, run_particles
from llmppl.programs.structure import Program


class ParticleObjective(ELBO):
    """An objective over ``K`` vectorised particles: one pass of the guide and one of the model a step.

    It is used as any ELBO of Pyro: ``SVI(model, guide, optim, loss=objective)``, or
    ``objective(model, guide)`` with a torch optimizer. Losses are summed over the rows of plates that
    contain every site; each row is an observation ``x`` of its own.

    :param num_particles: ``K``, latent samples for each ``x``.
    """

    fewest_particles = 1

    def __init__(self, num_particles: int) -> None:
        if num_particles < self.fewest_particles:
            raise ValueError(
                f"num_particles={num_particles}: {type(self).__name__} compares particles of the same "
                f"observation and needs at least {self.fewest_particles}."
            )
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.diagnostics: dict[str, float] = {}
        """ELBO (nats for one x) and effective sample size of the last step's on-policy particles."""

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a scalar tensor whose gradient trains the guide."""
        raise NotImplementedError

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss, without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss; its gradient is added to the parameters' ``grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def _get_trace(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[poutine.Trace, poutine.Trace]:
        particles = run_particles(model, guide, args, kwargs, self.num_particles)
        return particles.model_trace, particles.guide_trace

    def _particles(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        on_policy: Tensor | None = None,
        **options: Any,
    ) -> Particles:
        """The particles of one step, scored and checked.

        :param on_policy: which of them the guide drew as it is, boolean ``(K,)``; all by default.
        :param options: of :func:`~llmppl.programs.particles.run_particles`.
        """
        particles = run_particles(model, guide, args, kwargs, self.num_particles, **options)
        check_finite(particles.guide_trace)
        check_finite(particles.model_trace)
        chosen = slice(None) if on_policy is None else on_policy.to(particles.log_p.device)
        self.diagnostics = diagnostics(particles.log_weights.detach()[chosen])
        return particles


def diagnostics(log_weights: Tensor) -> dict[str, float]:
    """ELBO and effective sample size of ``(K, ...)`` log-weights, averaged over the rows."""
    if not len(log_weights):
        return {"elbo": math.nan, "ess": math.nan}
    normalised = log_weights.log_softmax(0)
    return {
        "elbo": log_weights.mean().item(),
        "ess": (-(2 * normalised).logsumexp(0)).exp().mean().item(),
    }
