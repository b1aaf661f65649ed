"""Reweighted wake-sleep: forward KL on simulated and on self-normalised samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from llmppl.network.text_tensors import pad_rows
from llmppl.objectives.behaviour import Behaviour, first_given, prior_draws
from llmppl.objectives.particle_objective import ParticleObjective, diagnostics, normalised_weights, program_loss
from llmppl.programs.observations import Given, Observed, Unconstrained, has_other_observations
from llmppl.programs.particles import check_finite, common_axes, compute_log_prob, log_mixture, log_prior, sum_sites
from llmppl.programs.plates import PARTICLES, in_particles
from llmppl.programs.simulation import Simulated
from llmppl.programs.structure import Program, is_latent, learns, plate_nesting, structure
from llmppl.text.declared import declared


class WakeSleep(ParticleObjective):
    r"""Reweighted wake-sleep [1], the baseline of every comparison.

    .. math:: \mathcal L = -\text{insomnia}\sum_k \bar w_k \log q(z_k|x)
              - (1-\text{insomnia})\,\frac1K\sum_k\log q(z'_k|x'_k),
              \qquad \bar w_k \propto p(x, z_k)/q(z_k|x),\quad (z', x') \sim p

    The first term (wake-φ) estimates the gradient of :math:`\mathrm{KL}(p(z|x)\|q)` with a bias of
    order 1/K; the second (sleep, or neural posterior estimation) is unbiased for simulated ``x'``. An
    observed stream is simulated to the observed number of tokens. Parameters of the program are trained by
    wake-θ on the wake phase's particles, which are drawn for it where ``insomnia=0``, too. Where a hard
    condition makes a joint zero, wake-φ gives it weight zero; an observation of which no particle is
    possible teaches nothing in that step, and is counted as ``skipped``.

    :param num_particles: ``K``, for either phase.
    :param insomnia: share of the wake-φ term, from 0 (sleep only) to 1 (wake-φ only).
    :param behaviour: ``Behaviour(prior=α)`` draws a share of the wake phase's particles from the program's own latents;
        weights are then those of the mixture, :math:`\bar w_k \propto p(x, z_k)/[(1-α)\,q(z_k|x) + α\,p(z_k)]` [2]:
        what the guide has lost is found again, and no weight exceeds :math:`p(x|z)/α`.
    :param exhaust: in the sleep phase, observed sites whose expectation given the simulated latents is taken and not
        sampled: every value that the site may have there teaches the guide, with its probability. For sites whose
        distribution lists its values (:class:`~llmppl.distributions.ContentWord`): a simulated sentence then teaches
        all of its words at once. A guide whose proposals share the network's passes does not pay for it.

    References

    [1] Le, Kosiorek, Siddharth, Teh, Wood (2019), `Revisiting reweighted wake-sleep`, sec. 3.

    [2] Hesterberg (1995), `Weighted average importance sampling and defensive mixture distributions`.
    """

    @declared
    def __init__(
        self,
        num_particles: int = 8,
        insomnia: float = 0.5,
        exhaust: Sequence[str] = (),
        behaviour: Behaviour | None = None,
    ) -> None:
        if not 0 <= insomnia <= 1:
            raise ValueError(f"insomnia={insomnia} must lie between 0 (sleep only) and 1 (wake-φ only).")
        if insomnia > 0 and num_particles < 2:
            raise ValueError("num_particles=1: self-normalised weights need at least 2 particles.")
        super().__init__(num_particles)
        if isinstance(exhaust, str):
            raise TypeError(f"exhaust={exhaust!r} is a string. Give a list of site names, e.g. [{exhaust!r}].")
        self.insomnia, self.exhaust = insomnia, tuple(exhaust)
        self.behaviour = behaviour or Behaviour()
        if self.behaviour.tempered or self.behaviour.replayed or self.behaviour.sleep:
            raise ValueError(
                f"behaviour={self.behaviour!r}: wake-φ weighs its particles by what drew them, and knows the guide and "
                "the prior. Pass Behaviour(prior=...) alone."
            )

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor | float = 0.0
        self.diagnostics = diagnostics(torch.empty(0))  # the wake phase has others
        if self.insomnia > 0 or self._teaches(model, args, kwargs):
            loss = loss + self._wake(model, guide, args, kwargs)
        if self.insomnia < 1:
            loss = loss + (1 - self.insomnia) * self._sleep(model, guide, args, kwargs)
        assert isinstance(loss, Tensor)
        return loss

    def settings(self) -> dict[str, Any]:
        """What makes a run of this objective the same run."""
        own = {"num_particles": self.num_particles, "insomnia": self.insomnia, "exhaust": self.exhaust}
        return {**own, **({"prior": self.behaviour.prior} if self.behaviour.prior else {})}

    def _teaches(self, model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a program learns from its own observations."""
        simulated = hasattr(model, "simulated_pair") or has_other_observations(model)
        return torch.is_grad_enabled() and not simulated and learns(structure(model, args, kwargs))

    def _wake(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        from_prior, handler = self.behaviour.draws_of_prior(self.num_particles), None
        if from_prior:
            nesting = plate_nesting(structure(model, args, kwargs))
            drawn = prior_draws(model, args, kwargs, from_prior, nesting)
            handler = first_given(drawn, self.num_particles, nesting)
        particles = self._particles(
            model,
            guide,
            args,
            kwargs,
            behaviour=handler,
            on_policy=torch.arange(self.num_particles) >= from_prior,
            allow_zero=True,
        )
        log_weights = particles.log_weights.detach()
        if from_prior:
            share = from_prior / self.num_particles
            mixture = log_mixture(particles.log_proposal, log_prior(particles), share)
            log_weights = (particles.log_p - mixture).detach()
        self.diagnostics["skipped"] = int((log_weights == -torch.inf).all(0).sum())
        learned = program_loss(model, particles.log_p, log_weights)
        if self.insomnia == 0:
            return learned
        return learned - self.insomnia * (normalised_weights(log_weights) * particles.log_q).sum()

    def _sleep(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        pairs = simulated_pairs(model, guide, args, kwargs, self.num_particles, self.exhaust)
        compute_log_prob(pairs.trace)
        check_finite(pairs.trace)
        log_q = sum_sites(pairs.trace, pairs.axes, pairs.nesting, pairs.count)
        return -(log_q * pairs.weights.to(log_q)).sum(0).sum()


@dataclass(frozen=True)
class Pairs:
    """Simulated latents with observations, and the guide run on them.

    :param trace: of the guide at the simulated latents, not scored.
    :param axes: the dimensions that are observations.
    :param nesting: of the plates.
    :param count: particles of the trace.
    :param weights: of each pair, ``(count,) + batch_shape``, summing to one over the particles.
    """

    trace: poutine.Trace
    axes: tuple[int, ...]
    nesting: int
    count: int
    weights: Tensor


def simulated_pairs(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int,
    exhaust: Sequence[str] = (),
) -> Pairs:
    """Latents and observations drawn from the program, and the guide run on them.

    A program of :func:`~llmppl.programs.simulated_pair.with_pair` has been simulated already: then that is the pair.

    :param exhaust: observed sites of which every value counts, with its probability.
    :raises TypeError: a guide that takes no ``observations=``.
    :raises ValueError: ``exhaust`` names a site that is not observed, or whose values cannot be listed.
    """
    nesting = plate_nesting(structure(model, args, kwargs))
    pair = getattr(model, "simulated_pair", None)
    if pair is None:
        with torch.no_grad(), poutine.block(), Simulated() as simulated:
            program = in_particles(model, num_particles, nesting)
            drawn = poutine.trace(program).get_trace(*args, **kwargs)
        observations, count = dict(simulated.observations), num_particles
    else:
        with torch.no_grad(), poutine.block(), Given(pair.latents), Observed(pair.observations):
            drawn = poutine.trace(in_particles(model, 1, nesting)).get_trace(*args, **kwargs)
        observations, count = dict(pair.observations), 1
    axes = common_axes(drawn)
    weights = torch.full((count, *(1,) * len(axes)), 1.0 / count)
    for name in exhaust:
        drawn, observations, weights = _exhausted(drawn, observations, name, weights, axes, nesting)
        count = len(weights)
    guide_in = poutine.replay(in_particles(guide, count, nesting), trace=drawn)
    values = {name: site["value"] for name, site in drawn.nodes.items() if is_latent(site)}
    try:
        with Unconstrained(values, drawn.nodes):
            trace = poutine.trace(guide_in).get_trace(*args, observations=observations, **kwargs)
    except TypeError as error:
        if "observations" not in str(error):
            raise
        raise TypeError(
            "the sleep phase tells the guide what was simulated, and this guide takes no observations= argument. Add "
            "it, or use WakeSleep(insomnia=1.0)."
        ) from error
    return Pairs(trace, common_axes(drawn, trace), nesting, count, weights)


def _exhausted(
    drawn: poutine.Trace,
    observations: dict[str, Tensor],
    name: str,
    weights: Tensor,
    axes: tuple[int, ...],
    nesting: int,
) -> tuple[poutine.Trace, dict[str, Tensor], Tensor]:
    """Every particle once for each value of a site. Rows with fewer values than others repeat one with weight zero."""
    fn = drawn.nodes[name]["fn"] if name in observations else None
    if fn is None or not hasattr(fn, "options"):
        able = [n for n in observations if hasattr(drawn.nodes[n]["fn"], "options")]
        raise ValueError(
            f"exhaust= names {name!r}, which is no observed site whose values can be listed; those are {able}. Leave "
            "it out, and the site is sampled."
        )
    if len(fn.batch_shape) > nesting + 1:
        raise ValueError(f"exhaust= names {name!r}, which has dimensions beside the program's plates. Leave it out.")
    rows = fn.options()
    most = max(map(len, rows))
    full = (1,) * (nesting + 1 - len(fn.batch_shape)) + tuple(fn.batch_shape)  # (K, plates)
    padded = [[own[n] if n < len(own) else own[0] for own in rows] for n in range(most)]
    values = torch.stack([pad_rows(part, fn.event_shape[0], fn.context.device) for part in padded])
    values = values.reshape(most, *full, -1).transpose(0, 1).flatten(0, 1)  # (K * most, plates, W)
    share = torch.tensor([[1.0 / len(own) if n < len(own) else 0.0 for own in rows] for n in range(most)])
    share = share.reshape(most, *full).transpose(0, 1).flatten(0, 1)
    inner = [dim for dim in range(-nesting, 0) if dim not in axes]
    if any(share.shape[dim] > 1 for dim in inner):
        raise ValueError(
            f"exhaust= names {name!r}, which stands in a plate inside an observation: its values would have to be "
            "combined. Leave it out, and the site is sampled."
        )
    share = share.reshape(len(share), *(share.shape[dim] for dim in axes))
    again = drawn.copy()
    again.nodes.update({key: dict(site) for key, site in drawn.nodes.items()})
    again.remove_node(PARTICLES)  # there are more of them now
    for site in again.nodes.values():
        if is_latent(site) and site["value"].dim() - site["fn"].event_dim == nesting + 1:
            site["value"] = site["value"].repeat_interleave(most, 0)
    repeated = {
        n: v.repeat_interleave(most, 0) if v.dim() - drawn.nodes[n]["fn"].event_dim == nesting + 1 else v
        for n, v in observations.items()
    }
    return again, {**repeated, name: values}, weights.repeat_interleave(most, 0) * share
