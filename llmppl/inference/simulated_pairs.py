"""Latents and observations that a program simulates, with draws that a guide makes of those latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from llmppl.distributions.process_text import ProcessText
from llmppl.inference.blocks import block_size
from llmppl.inference.gathering import check_unscaled, gather
from llmppl.posterior.posterior import Posterior
from llmppl.programs.observations import Given, Unconstrained, observing
from llmppl.programs.particles import (
    Particles,
    check_finite,
    check_sites,
    common_axes,
    compute_log_prob,
    run_particles,
    sum_sites,
)
from llmppl.programs.plates import in_particles
from llmppl.programs.simulation import simulate
from llmppl.programs.structure import Program, Site, is_deterministic, is_latent, plate_nesting, structure

Array = np.ndarray
Sampler = Callable[[Program, Program], Callable[..., Posterior]]
"""From the program and the guide, both observing what was simulated, a function of the program's arguments."""

TIE = 1e-6
"""Options whose log-probabilities differ by less, nats, stand together in or out of a credible set."""


@dataclass(frozen=True)
class Scored:
    """Latents and both of their scores.

    :param posterior: samples ``(K,) + batch_shape + ...`` and log p(x, z).
    :param log_q: log q(z|x), ``(K,) + batch_shape``, nats; −inf where the guide cannot go.
    """

    posterior: Posterior
    log_q: Array


@dataclass(frozen=True)
class Pair:
    """Exact posterior draws ``z*`` at simulated ``x*``, one a batch row, beside other draws there.

    :param truth: ``z*``, one sample.
    :param drawn: the other draws.
    :param observations: ``x*`` by site.
    :param credibility: by finite site, ``batch_shape``: the level of the guide's smallest credible set
        that holds ``z*``; see :func:`credibility`.
    """

    truth: Scored
    drawn: Scored | None
    observations: dict[str, Tensor]
    credibility: dict[str, Array]


def simulated_pair(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_draws: int,
    generator: np.random.Generator,
    sampler: Sampler | None = None,
) -> Pair:
    """Simulate latents and observations once, and draw at those observations.

    :param num_draws: ``K``; 0 leaves the draws out.
    :param sampler: what draws; the guide by default.
    :raises ValueError: a factor in the program, or a guide with auxiliary sites.
    :raises TypeError: a guide that takes no ``observations=``.
    """
    latents, observations = simulate(model, args, kwargs)
    model, guide = observing(model, guide, observations)
    truth = score_given(model, guide, args, kwargs, latents, 1)
    drawn: Scored | None = None
    if num_draws and sampler is None:
        drawn = draw_scored(model, guide, args, kwargs, num_draws)
    elif num_draws and sampler is not None:
        rows = tuple(truth.log_p.shape[1:])
        samples = _resampled(sampler(model, guide)(*args, **kwargs), rows, num_draws, generator)
        given = placed(model, guide, args, kwargs, samples)
        drawn = scored([score_given(model, guide, args, kwargs, given, num_draws)])
    return Pair(scored([truth]), drawn, observations, credibility(truth, generator))


def draw_scored(model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> Scored:
    """Draws of the guide and both scores, as :func:`~llmppl.importance` makes them."""
    return scored(list(draws(model, guide, args, kwargs, count)))


def draws(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], count: int
) -> Iterator[Particles]:
    """The same in blocks, with their traces."""
    size = block_size(model, args, kwargs)
    for start in range(0, count, size):
        particles = run_particles(model, guide, args, kwargs, min(size, count - start))
        check_unscaled(particles)
        check_finite(particles.guide_trace)
        check_finite(particles.model_trace, allow_zero=True)
        yield particles


def scored(blocks: list[Particles]) -> Scored:
    log_q = torch.cat([block.log_q for block in blocks]).double().cpu().numpy()
    return Scored(gather(blocks, "importance", "marginal"), log_q)


def score_given(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    latents: dict[str, Tensor],
    count: int,
) -> Particles:
    """Both scores of latents that the guide did not draw.

    :param latents: by site, broadcastable to ``(count,)`` and the site's own shape.
    :raises ValueError: a guide with auxiliary sites, which has no density of given latents.
    """
    sites = structure(model, args, kwargs)
    nesting = plate_nesting(sites)
    traces = []
    for program in (model, guide):
        auto = Unconstrained(latents, sites.nodes)
        # Outside the guide's support is an answer here, probability zero, and no error.
        with pyro.validation_enabled(False), poutine.block(), auto, Given(latents):
            trace = poutine.trace(in_particles(program, count, nesting)).get_trace(*args, **kwargs)
            known = {*latents, *(f"{name}_unconstrained" for name in auto.given)}
            hidden = [name for name, site in trace.nodes.items() if is_latent(site) and name not in known]
            if hidden:
                raise ValueError(
                    f"the guide has auxiliary sites {hidden}, so it has no marginal density of given latents. "
                    "Use a guide whose latent sites are the model's."
                )
            compute_log_prob(trace)
        check_finite(trace, allow_zero=True)
        traces.append(trace)
    check_sites(sites, traces[1])
    axes = common_axes(sites, traces[1])
    log_p, log_q = (sum_sites(trace, axes, nesting, count) for trace in traces)
    particles = Particles(log_p, log_q, traces[0], traces[1], axes, nesting)
    check_unscaled(particles)
    return particles


def credibility(truth: Particles, generator: np.random.Generator) -> dict[str, Array]:
    r"""The level of the guide's smallest credible set that holds the latent, at each finite site.

    .. math:: \alpha = \sum_{o:\, q(o) > q(z^*)} q(o) + U \sum_{o:\, q(o) = q(z^*)} q(o), \quad U\sim(0, 1)

    It is uniform where ``q`` is the posterior: without ``U``, sets of whole options would cover too often.
    Earlier latents are the simulated ones. Of a site inside a plate of an observation one row is taken,
    at random.

    :returns: by site, ``batch_shape``, in (0, 1).
    """
    found = {}
    rows = truth.log_p.shape[1:]
    for name, site in truth.guide_trace.nodes.items():
        if not is_latent(site) or not _is_finite(site):
            continue
        fn = site["fn"]
        options = fn.log_prob(fn.enumerate_support()).double()  # (n,) + batch
        own = fn.log_prob(site["value"]).double()
        above = (options.exp() * (options > own + TIE)).sum(0)
        equal = (options.exp() * ((options - own).abs() <= TIE)).sum(0)
        uniform = torch.from_numpy(generator.random(tuple(own.shape))).to(own.device)
        level = (above + uniform * equal).clamp(0, 1)
        level = level.reshape((1,) * (truth.nesting + 1 - level.dim()) + level.shape)
        axes = [dim + truth.nesting + 1 for dim in truth.axes]
        inner = [dim for dim in range(truth.nesting + 1) if dim not in axes]
        level = level.permute(*axes, *inner)
        flat = level.reshape(*level.shape[: len(axes)], -1).expand(*rows, -1).cpu().numpy()
        chosen = generator.integers(flat.shape[-1], size=tuple(rows))
        found[name] = np.take_along_axis(flat, chosen[..., None], -1)[..., 0]
    return found


def _is_finite(site: Site) -> bool:
    fn = site["fn"]
    return bool(getattr(fn, "has_enumerate_support", False)) and not isinstance(fn, ProcessText)


def _resampled(
    posterior: Posterior, rows: tuple[int, ...], count: int, generator: np.random.Generator
) -> dict[str, Array]:
    """Independent draws from a weighted posterior: systematic ones would not be exchangeable with ``z*``."""
    if posterior.batch_shape != rows:
        raise ValueError(
            f"the sampler's posterior has batch shape {posterior.batch_shape}, the program's observations {rows}. "
            "Return the posterior of the program that the sampler was given."
        )
    weights = posterior.weights.reshape(posterior.num_samples, -1)
    index = np.stack(
        [
            np.searchsorted(np.cumsum(column) / column.sum(), generator.random(count), side="right")
            for column in weights.T
        ],
        axis=1,
    ).clip(max=posterior.num_samples - 1)
    index = index.reshape((count, *rows))
    return {
        name: np.take_along_axis(value, index.reshape(index.shape + (1,) * (value.ndim - index.ndim)), 0)
        for name, value in posterior.samples.items()
    }


def placed(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], samples: Mapping[str, Array]
) -> dict[str, Tensor]:
    """A posterior's samples as :func:`score_given` takes them: every dimension where the program has it.

    :param samples: by site, ``(K,) + batch_shape + inner + event_shape``, dimensions of inner plates of
        size one dropped.
    """
    sites = structure(model, args, kwargs)
    nesting, axes = plate_nesting(sites), common_axes(sites, structure(guide, args, kwargs))
    outer = [dim + nesting + 1 for dim in axes]
    inner = [dim for dim in range(1, nesting + 1) if dim not in outer]
    order = [0, *outer, *inner]
    back = [order.index(dim) for dim in range(nesting + 1)]
    found = {}
    for name, values in samples.items():
        site = sites.nodes[name]
        if is_deterministic(site):
            continue
        own, event = site["value"], site["fn"].event_dim
        batch = own.shape[: own.dim() - event]
        batch = (1,) * (nesting + 1 - len(batch)) + tuple(batch)
        lead = [len(values), *values.shape[1 : 1 + len(axes)], *(batch[dim] for dim in inner)]
        tensor = torch.as_tensor(values, device=own.device).reshape(*lead, *own.shape[own.dim() - event :])
        found[name] = tensor.permute(*back, *range(len(order), tensor.dim()))
    return found
