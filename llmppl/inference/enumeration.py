"""The exact posterior of a small program, by enumeration."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from llmppl.inference.importance import check_unscaled, gather
from llmppl.inference.posterior import Posterior
from llmppl.particles import Particles, check_finite, common_axes, compute_log_prob, sum_sites
from llmppl.tracing import Given, Program, Site, in_particles, is_latent, plate_nesting, structure

LARGEST = 1_000_000
BLOCK = 4096


def exact_posterior(model: Program, *args: Any, **kwargs: Any) -> Posterior:
    """The exact posterior: the joint at every combination of the latent sites' values.

    For programs whose latent sites enumerate (choices, small text supports, discrete Pyro sites) and
    whose sites and supports do not depend on sampled values. A latent inside a plate that does not
    contain every site is not supported: its combinations multiply over the plate.

    :returns: a posterior with one sample for each combination; :attr:`Posterior.log_evidence` is exact.
    :raises ValueError: a site that does not enumerate, or more than a million combinations.
    """
    trace = structure(model, args, kwargs)
    nesting, axes = plate_nesting(trace), common_axes(trace)
    latent = {name: site for name, site in trace.nodes.items() if is_latent(site)}
    if not latent:
        raise ValueError("the model has no latent site to enumerate. Leave obs= out at one.")
    supports = [_support(name, site, axes) for name, site in latent.items()]
    size = math.prod(map(len, supports))
    if size > LARGEST:
        sizes = ", ".join(f"{name}: {len(support)}" for name, support in zip(latent, supports, strict=True))
        raise ValueError(
            f"the latent sites have {size:,} combinations ({sizes}); at most {LARGEST:,} can be enumerated. "
            "Lower max_tokens, restrict allowed=, or use importance()."
        )
    combinations = itertools.product(*(range(len(support)) for support in supports))
    blocks = []
    with torch.no_grad():
        while index := list(itertools.islice(combinations, BLOCK)):
            columns = torch.tensor(index).T
            values = {
                name: support[column.to(support.device)].reshape((len(index),) + (1,) * nesting + support.shape[1:])
                for name, support, column in zip(latent, supports, columns, strict=True)
            }
            blocks.append(_score(model, args, kwargs, values, nesting, axes, len(index)))
    return gather(blocks, "enumeration", "marginal")


def _support(name: str, site: Site, axes: tuple[int, ...]) -> Tensor:
    """Every value of a site, ``(n,) + event_shape``."""
    own = {f.dim for f in site["cond_indep_stack"] if f.vectorized and f.size > 1}
    if own - set(axes):
        raise ValueError(
            f"latent site {name!r} stands in a plate that does not contain every site, so its combinations multiply "
            "over the plate. Use importance()."
        )
    fn = site["fn"]
    if not fn.has_enumerate_support:
        raise ValueError(
            f"latent site {name!r} ({type(fn).__name__}) cannot be enumerated. Use importance(), or condition on it."
        )
    try:
        values = fn.enumerate_support(expand=False)
    except ValueError as error:
        raise ValueError(f"latent site {name!r}: {error}") from None
    return values.reshape(values.shape[:1] + fn.event_shape)


def _score(
    model: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: dict[str, Tensor],
    nesting: int,
    axes: tuple[int, ...],
    count: int,
) -> Particles:
    with poutine.block(), Given(values):
        trace = poutine.trace(in_particles(model, count, nesting)).get_trace(*args, **kwargs)
    compute_log_prob(trace)
    check_finite(trace, allow_zero=True)
    log_p = sum_sites(trace, axes, nesting, count)
    particles = Particles(log_p, torch.zeros_like(log_p), trace, poutine.Trace(), axes, nesting)
    check_unscaled(particles)
    return particles
