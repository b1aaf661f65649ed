"""Denoising on simulated pairs: the sleep phase of guides that fill in masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmppl.distributions.masked_text import MaskedText
from llmppl.objectives.particle_objective import ParticleObjective, diagnostics
from llmppl.objectives.wake_sleep import simulated_pairs
from llmppl.programs.particles import check_finite, compute_log_prob, sum_site
from llmppl.programs.structure import Program, is_latent
from llmppl.text.declared import declared


class Denoising(ParticleObjective):
    r"""Denoising cross-entropy on pairs simulated from the program.

    .. math:: \mathcal L = \mathbb E_{(z, x) \sim p}\left[-\log q(n|x) - \mathbb E_{m, M}\,
              \frac nm \sum_{i\in M}\log q_i(z_i \mid n, z_{\bar M}, x)\right]

    It is the sleep phase of :class:`WakeSleep`, forward KL, with the log-probability of one trajectory replaced by an
    unbiased estimate from few masked copies of each text (:meth:`MaskedText.denoising_loss`), whatever the guide's
    own order and number of steps. Latent sites that are not filled in by masks count with their log-probability.

    :param num_particles: simulated pairs at each step, for each ``x``. Of ``x`` only what is not observed counts:
        the arguments, and how long the observed streams are.
    :param num_masks: masked copies of each text. The contexts are read once for all of them.
    """

    @declared
    def __init__(self, num_particles: int = 8, num_masks: int = 4) -> None:
        super().__init__(num_particles)
        if num_masks < 1:
            raise ValueError(f"num_masks must be at least 1, got {num_masks}.")
        self.num_masks = num_masks

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        self.diagnostics = diagnostics(torch.empty(0))  # a simulated pair has no ELBO of the data
        pairs = simulated_pairs(model, guide, args, kwargs, self.num_particles)
        trace, axes, nesting = pairs.trace, pairs.axes, pairs.nesting
        masked = [n for n, site in trace.nodes.items() if is_latent(site) and isinstance(site["fn"], MaskedText)]
        if not masked:
            raise TypeError(
                "Denoising needs a guide that fills in masks, such as RefinementGuide; of others the same phase is "
                "WakeSleep(insomnia=0.0)."
            )
        losses = []
        for name in masked:
            site = trace.nodes[name]
            losses.append(site["fn"].denoising_loss(site["value"], self.num_masks))
            trace.remove_node(name)
        compute_log_prob(trace)
        check_finite(trace)
        losses += [-site["log_prob"] for site in trace.nodes.values() if is_latent(site)]
        return torch.stack([sum_site(loss, axes, nesting).mean(0).sum() for loss in losses]).sum()
