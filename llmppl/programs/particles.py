"""Particles of a guide: drawn, scored with the program, summed per observation ``x``."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from llmppl.distributions.conditioned_text import score_together
from llmppl.programs.plates import PARTICLES, has_data_plate, in_particles
from llmppl.programs.structure import (
    Program,
    SitesNoted,
    is_deterministic,
    is_latent,
    is_text,
    plate_nesting,
    structure,
)


@dataclass
class Particles:
    """``K`` particles of a guide and the model's joint there.

    :param log_p: log p(x, z), shape ``(K,) + batch_shape``, nats; ``batch_shape`` are the plates that
        contain every site: their rows are separate observations ``x``.
    :param log_q: log q(z | x), same shape.
    :param log_q_drawn: of the guide as it draws, where dropout makes ``log_q`` another law.
    """

    log_p: Tensor
    log_q: Tensor
    model_trace: poutine.Trace
    guide_trace: poutine.Trace
    axes: tuple[int, ...]
    nesting: int
    log_q_drawn: Tensor | None = None

    @property
    def log_proposal(self) -> Tensor:
        """log q of the guide as it draws, ``(K,) + batch_shape``."""
        return self.log_q if self.log_q_drawn is None else self.log_q_drawn

    @property
    def log_weights(self) -> Tensor:
        return self.log_p - self.log_proposal


def propose(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int,
    behaviour: Messenger | None = None,
    detach: bool = True,
) -> tuple[poutine.Trace, tuple[int, ...], int]:
    """One vectorised pass of the guide.

    :param behaviour: a handler that puts other values in place of the guide's own draws.
    :param detach: cut the gradient through sampled values.
    :returns: the guide's trace, not scored; the dimensions that are observations; the plates' nesting.
    :raises ValueError: the guide misses a latent site, or has one that the model has not.
    """
    sites = structure(model, args, kwargs)
    nesting = plate_nesting(sites)
    guide_in = in_particles(guide, num_particles, nesting)
    with behaviour or nullcontext():
        guide_trace = poutine.trace(guide_in).get_trace(*args, **kwargs)
    if detach:
        guide_trace.detach_()
    check_sites(sites, guide_trace)
    return guide_trace, common_axes(sites, guide_trace), nesting


def run_particles(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int,
    behaviour: Messenger | None = None,
    detach: bool = True,
    score_parts: bool = False,
    known: Callable[[torch.Size, bool], Tensor | None] | None = None,
) -> Particles:
    """One vectorised pass of the guide, one of the model, and all scores.

    :param score_parts: compute Pyro's score parts of the guide's sites as well.
    :param known: given the rows' shape and whether they are data of their own, log p of the first ``n`` particles,
        ``(n,) + batch_shape``, or ``None``. The model is then run, and traced, at the others alone; unless it has a
        gradient there, for then it is another by now.

    Other parameters and errors as of :func:`propose`.
    """
    guide_trace, axes, nesting = propose(model, guide, args, kwargs, num_particles, behaviour, detach)
    rows = common_shape(guide_trace, axes)
    before = None if known is None else known(rows, has_data_plate(guide_trace))
    first = 0 if before is None else len(before)
    model_trace = run_model(model, guide_trace, args, kwargs, num_particles, nesting, first)
    # Before the pass with gradients: what was recorded while drawing is there still.
    drawn = log_q_drawn(guide_trace, axes, nesting, num_particles) if drops(guide_trace) else None
    compute_log_prob(guide_trace, score_parts)
    compute_log_prob(model_trace)
    log_p = sum_sites(model_trace, axes, nesting, num_particles - first)
    if before is not None and log_p.requires_grad:
        model_trace = run_model(model, guide_trace, args, kwargs, num_particles, nesting)
        compute_log_prob(model_trace)
        log_p = sum_sites(model_trace, axes, nesting, num_particles)
    elif before is not None:
        log_p = torch.cat([before.to(log_p).expand(first, *log_p.shape[1:]), log_p])
    return Particles(
        log_p=log_p,
        log_q=sum_sites(guide_trace, axes, nesting, num_particles),
        model_trace=model_trace,
        guide_trace=guide_trace,
        axes=axes,
        nesting=nesting,
        log_q_drawn=drawn,
    )


def run_model(
    model: Program,
    guide_trace: poutine.Trace,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int,
    nesting: int,
    first: int = 0,
) -> poutine.Trace:
    """The model at a guide's particles from ``first`` on, not scored."""
    at = guide_trace
    if first:
        at = guide_trace.copy()
        at.nodes.update({name: dict(site) for name, site in guide_trace.nodes.items()})
        at.remove_node(PARTICLES)  # there are fewer of them
        for site in at.nodes.values():
            if is_latent(site) and site["value"].dim() - site["fn"].event_dim == nesting + 1:
                site["value"] = site["value"][first:]
    model_in = in_particles(model, num_particles - first, nesting)
    with SitesNoted():
        return poutine.trace(poutine.replay(model_in, trace=at)).get_trace(*args, **kwargs)


def drops(guide_trace: poutine.Trace) -> bool:
    """Whether gradients would now be those of another law than the guide draws from, by dropout."""
    texts = [site["fn"] for site in guide_trace.nodes.values() if site["type"] == "sample" and is_text(site)]
    return torch.is_grad_enabled() and any(fn.lm.adapters.drops(fn.adapter) for fn in texts)


@torch.no_grad()
def log_q_drawn(guide_trace: poutine.Trace, axes: tuple[int, ...], nesting: int, num_particles: int) -> Tensor:
    """log q of a guide's trace without gradients or dropout, ``(K,) + batch_shape``; the trace is left unscored."""
    scored = guide_trace.copy()
    scored.nodes.update({name: dict(site) for name, site in guide_trace.nodes.items()})
    compute_log_prob(scored)
    return sum_sites(scored, axes, nesting, num_particles)


def compute_log_prob(trace: poutine.Trace, score_parts: bool = False) -> None:
    """Pyro's ``trace.compute_log_prob``, with all texts of the trace scored in one pass before.

    :param score_parts: compute the score parts as well.
    """
    waiting = []
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and is_text(site) and "log_prob" not in site:
            try:
                waiting.append((site["fn"], site["fn"].pending(site["value"])))
            except ValueError as error:
                raise ValueError(f"Error while computing log_prob at site {name!r}:\n{error}") from error
    score_together(waiting)
    if score_parts:
        trace.compute_score_parts()
    else:
        trace.compute_log_prob()


def check_sites(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Refuse a guide whose latent sites are not the model's.

    :raises ValueError: naming the sites.
    """
    latent = {name for name, site in model_trace.nodes.items() if is_latent(site)}
    guided = {
        name for name, site in guide_trace.nodes.items() if is_latent(site) and not site["infer"].get("is_auxiliary")
    }
    if latent - guided:
        raise ValueError(
            f"the guide does not sample the model's latent sites {sorted(latent - guided)}; it samples "
            f"{sorted(guided)}. Add them to the guide (a text guide takes a guide for other sites as others=)."
        )
    if guided - latent:
        raise ValueError(
            f"the guide samples {sorted(guided - latent)}, which the model does not have as latent "
            f"sites; it has {sorted(latent)}. Rename or remove them."
        )


def common_axes(*traces: poutine.Trace) -> tuple[int, ...]:
    """The dimensions (negative) of the plates that contain every site of every trace.

    Given the program's arguments their rows are independent: each is an observation of its own.
    """
    common: set[tuple[int, int]] | None = None
    for trace in traces:
        stacks = [
            {(f.name, f.dim, f.size) for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES}
            for site in trace.nodes.values()
            if site["type"] == "sample" and not site_is_subsample(site)
        ]
        if stacks:  # two plates of one size are no plate; a guide may call the program's by another name
            own = {(dim, size) for _, dim, size in set.intersection(*stacks)}
            common = own if common is None else common & own
    return tuple(sorted(dim for dim, _ in common or ()))


def common_shape(trace: poutine.Trace, axes: tuple[int, ...]) -> torch.Size:
    """Sizes of the plates ``axes``."""
    frames = (f for site in trace.nodes.values() if site["type"] == "sample" for f in site["cond_indep_stack"])
    sizes = {frame.dim: frame.size for frame in frames if frame.vectorized}
    return torch.Size(sizes[dim] for dim in axes)


def sum_sites(trace: poutine.Trace, axes: tuple[int, ...], nesting: int, num_particles: int) -> Tensor:
    """Log-density of a trace per particle and per row of ``axes``: ``(K,) + batch_shape``."""
    total: Tensor | float = 0.0
    for site in trace.nodes.values():
        if site["type"] != "sample" or site_is_subsample(site) or is_deterministic(site):
            continue
        total = total + sum_site(site["log_prob"], axes, nesting)
    if not isinstance(total, Tensor):
        raise ValueError("the program has no sample site. Add one with pyro.sample.")
    return total.expand((num_particles, *total.shape[1:]))


def sum_site(log_prob: Tensor, axes: tuple[int, ...], nesting: int, keepdim: bool = False) -> Tensor:
    """A site's log-density, summed over all dimensions but the particles' and ``axes``.

    :param keepdim: leave the others as dimensions of size 1.
    """
    full = log_prob.reshape((1,) * (nesting + 1 - log_prob.dim()) + log_prob.shape)
    summed = tuple(dim for dim in range(-nesting, 0) if dim not in axes)
    # Keep the particles in front, then the rows; a plate of the program between them is summed.
    return full.sum(summed, keepdim) if summed else full


def log_prior(particles: Particles) -> Tensor:
    """log p(z) of the latents, ``(K,) + batch_shape``, nats."""
    sites = [site for site in particles.model_trace.nodes.values() if is_latent(site)]
    total = sum(sum_site(site["log_prob"], particles.axes, particles.nesting) for site in sites)
    return torch.as_tensor(total).expand(particles.log_p.shape)


def log_mixture(log_q: Tensor, log_prior: Tensor, share: float) -> Tensor:
    """log [(1 − share) q + share p] of latents, where a share of the particles comes from the prior (the balance
    heuristic, Veach and Guibas 1995).

    :param share: above 0, at most 1.
    """
    rest = math.log1p(-share) if share < 1 else -math.inf
    return torch.logaddexp(log_prior + math.log(share), log_q + rest)


def check_finite(trace: poutine.Trace, allow_zero: bool = False) -> None:
    """Refuse NaN, and unless ``allow_zero`` probability zero, naming the site and row.

    :raises ValueError: with site, row and value.
    """
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        log_prob = site["log_prob"]
        bad = log_prob.isnan() | (log_prob == torch.inf)
        if not allow_zero:
            bad = bad | (log_prob == -torch.inf)
        if not bool(bad.any()):
            continue
        row = tuple(bad.nonzero()[0].tolist())
        value = log_prob[row].item()
        mend = (
            "A hard condition has no gradient. Balance objectives take floor=, nats that stand for it, e.g. "
            "TrajectoryBalance(floor=-100.0); WakeSleep's wake phase takes it as weight zero; a condition that is an "
            "observed site is learned by WakeSleep(insomnia=0)."
            if value == -torch.inf
            else "Check the model's weights and dtype (float16 overflows), and the factors of the program."
        )
        raise ValueError(f"site {name!r} has log-probability {value} at row {row}. {mend}")
