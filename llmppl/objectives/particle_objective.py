"""What the objectives have in common: vectorised particles, and Pyro's loss protocol."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from llmppl.programs.observations import has_other_observations
from llmppl.programs.particles import Particles, check_finite, run_particles
from llmppl.programs.structure import Program
from llmppl.text.declared import declared


class ParticleObjective(ELBO):
    """An objective over ``K`` vectorised particles: one pass of the guide and one of the model a step.

    It is used as any ELBO of Pyro: ``SVI(model, guide, optim, loss=objective)``, or
    ``objective(model, guide)`` with a torch optimizer. Losses are summed over the rows of plates that
    contain every site; each row is an observation ``x`` of its own.

    A program with parameters (:meth:`llmppl.LM.adapt`, or ``pyro.param``) learns at the same time, by
    :func:`program_loss`. Its gradient is no part of the guide's.

    :param num_particles: ``K``, latent samples for each ``x``.
    """

    fewest_particles = 1

    @declared
    def __init__(self, num_particles: int) -> None:
        if num_particles < self.fewest_particles:
            raise ValueError(
                f"num_particles={num_particles}: {type(self).__name__} compares particles of the same "
                f"observation and needs at least {self.fewest_particles}."
            )
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.diagnostics: dict[str, float] = {}
        """``elbo`` and ``log_evidence`` (nats for one x) and ``ess`` (effective sample size) of the last step's
        on-policy particles; of hard conditions also how many joints were ``floored`` and how many observations
        ``skipped``."""

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
        allow_zero: bool = False,
        **options: Any,
    ) -> Particles:
        """The particles of one step, scored and checked.

        :param on_policy: which of them the guide drew as it is, boolean ``(K,)``; all by default.
        :param allow_zero: take a joint of probability zero.
        :param options: of :func:`~llmppl.programs.particles.run_particles`.
        """
        particles = run_particles(model, guide, args, kwargs, self.num_particles, **options)
        check_finite(particles.guide_trace)
        check_finite(particles.model_trace, allow_zero)
        chosen = slice(None) if on_policy is None else on_policy.to(particles.log_p.device)
        self.diagnostics = diagnostics(particles.log_weights.detach()[chosen])
        return particles


def program_loss(model: Program, log_p: Tensor, log_weights: Tensor) -> Tensor:
    r"""What the program learns by, the M-step of EM (wake-θ) [1]: a term of value zero whose gradient is

    .. math:: -\sum_k \bar w_k \nabla_\theta \log p_\theta(x, z_k), \qquad \bar w_k \propto p_\theta(x, z_k)/q(z_k|x)

    for each observation. It is the gradient of :math:`-\log \frac1K\sum_k w_k`, hence an estimate of that of
    :math:`-\log p_\theta(x)` with a bias of order 1/K, without any where the guide is the posterior.

    Simulated observations are the program's own, and teach it nothing.

    :param log_p: of particles that the guide has drawn as it is, ``(K,) + batch_shape``, with a gradient where the
        program learns.
    :param log_weights: log p − log q of them.

    References

    [1] Bornschein, Bengio (2015), `Reweighted wake-sleep`, sec. 2.2; Le et al. (2019), `Revisiting reweighted
    wake-sleep`, eq. 4.
    """
    if not log_p.requires_grad or not len(log_p) or has_other_observations(model):
        return log_p.new_zeros(())
    weights = normalised_weights(log_weights.detach())
    surrogate = -(weights * torch.where(weights > 0, log_p, 0.0)).sum()
    return surrogate - surrogate.detach()


def diagnostics(log_weights: Tensor) -> dict[str, float]:
    """ELBO, log of the mean weight, and effective sample size of ``(K, ...)`` log-weights, averaged over the rows; of a
    row without any weight the latter is zero."""
    if not len(log_weights):
        return {"elbo": math.nan, "log_evidence": math.nan, "ess": math.nan}
    normalised = normalised_weights(log_weights)
    squares = normalised.square().sum(0)
    return {
        "elbo": log_weights.mean().item(),
        "log_evidence": (log_weights.logsumexp(0) - math.log(len(log_weights))).mean().item(),
        "ess": torch.where(squares > 0, 1 / squares, squares).mean().item(),
    }


def normalised_weights(log_weights: Tensor) -> Tensor:
    """Weights of ``(K, ...)`` log-weights, summing to one over the particles; zero where none is possible."""
    possible = (log_weights > -math.inf).any(0)
    return torch.where(possible, log_weights, 0.0).softmax(0) * possible
