"""Reweighted wake-sleep: forward KL on simulated and on self-normalised samples."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from llmppl.objectives.particle_objective import ParticleObjective, diagnostics
from llmppl.programs.particles import check_finite, common_axes, compute_log_prob, sum_sites
from llmppl.programs.plates import in_particles
from llmppl.programs.simulation import Simulated
from llmppl.programs.structure import Program, plate_nesting, structure


class WakeSleep(ParticleObjective):
    r"""Reweighted wake-sleep for the guide [1], the baseline of every comparison.

    .. math:: \mathcal L = -\text{insomnia}\sum_k \bar w_k \log q(z_k|x)
              - (1-\text{insomnia})\,\frac1K\sum_k\log q(z'_k|x'_k),
              \qquad \bar w_k \propto p(x, z_k)/q(z_k|x),\quad (z', x') \sim p

    The first term (wake-φ) estimates the gradient of :math:`\mathrm{KL}(p(z|x)\|q)` with a bias of
    order 1/K; the second (sleep, or neural posterior estimation) is unbiased for simulated ``x'``. An
    observed stream is simulated to the observed number of tokens. Parameters of the model get no
    gradient.

    :param num_particles: ``K``, for either phase.
    :param insomnia: share of the wake-φ term, from 0 (sleep only) to 1 (wake-φ only).

    References

    [1] Le, Kosiorek, Siddharth, Teh, Wood (2019), `Revisiting reweighted wake-sleep`, sec. 3.
    """

    def __init__(self, num_particles: int = 8, insomnia: float = 0.5) -> None:
        if not 0 <= insomnia <= 1:
            raise ValueError(f"insomnia={insomnia} must lie between 0 (sleep only) and 1 (wake-φ only).")
        if insomnia > 0 and num_particles < 2:
            raise ValueError("num_particles=1: self-normalised weights need at least 2 particles.")
        super().__init__(num_particles)
        self.insomnia = insomnia

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor | float = 0.0
        self.diagnostics = diagnostics(torch.empty(0))  # the wake phase has others
        if self.insomnia > 0:
            loss = loss + self.insomnia * self._wake(model, guide, args, kwargs)
        if self.insomnia < 1:
            loss = loss + (1 - self.insomnia) * self._sleep(model, guide, args, kwargs)
        assert isinstance(loss, Tensor)
        return loss

    def _wake(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        particles = self._particles(model, guide, args, kwargs)
        weights = particles.log_weights.detach().softmax(0)
        return -(weights * particles.log_q).sum()

    def _sleep(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        trace, axes, nesting = simulated_pairs(model, guide, args, kwargs, self.num_particles)
        compute_log_prob(trace)
        check_finite(trace)
        return -sum_sites(trace, axes, nesting, self.num_particles).mean(0).sum()


def simulated_pairs(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], num_particles: int
) -> tuple[poutine.Trace, tuple[int, ...], int]:
    """Latents and observations drawn from the program, and the guide run on them.

    :returns: the guide's trace at the simulated latents, not scored; the dimensions that are observations; the plates'
        nesting.
    :raises TypeError: a guide that takes no ``observations=``.
    """
    nesting = plate_nesting(structure(model, args, kwargs))
    with torch.no_grad(), poutine.block(), Simulated() as simulated:
        program = in_particles(model, num_particles, nesting)
        drawn = poutine.trace(program).get_trace(*args, **kwargs)
    guide_in = poutine.replay(in_particles(guide, num_particles, nesting), trace=drawn)
    try:
        trace = poutine.trace(guide_in).get_trace(*args, observations=simulated.observations, **kwargs)
    except TypeError as error:
        if "observations" not in str(error):
            raise
        raise TypeError(
            "the sleep phase tells the guide what was simulated, and this guide takes no observations= argument. Add "
            "it, or use WakeSleep(insomnia=1.0)."
        ) from error
    return trace, common_axes(drawn, trace), nesting
