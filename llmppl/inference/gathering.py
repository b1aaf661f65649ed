"""What a posterior keeps of the particles of several passes: numbers, not traces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from llmppl.distributions.process_text import ProcessText
from llmppl.network.row_map import decoder_of
from llmppl.posterior.columns import Columns, inner_plates
from llmppl.posterior.posterior import Array, Posterior
from llmppl.programs.observation_keys import rows_of
from llmppl.programs.particles import Particles, sum_site
from llmppl.programs.structure import Program, Site, is_deterministic, is_latent, is_text


class NoWeightError(ValueError):
    """None of the samples has positive weight.

    :param posterior: all the same.
    """

    def __init__(self, posterior: Posterior, message: str) -> None:
        super().__init__(message)
        self.posterior = posterior


def of_observations(
    posterior: Posterior, model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], data_plate: bool
) -> Posterior:
    """A posterior that knows which observations it is of.

    :param data_plate: whether the arguments are those of several rows of data.
    """
    names = rows_of(model, args, kwargs, data_plate)
    return replace(posterior, observations=tuple(names) if data_plate else names[0])


class Gathering(Columns):
    """Particles of any number of passes, each let go of as soon as its numbers are taken."""

    def add(self, particles: Particles) -> None:
        """Take the numbers of one pass."""
        trace, rows, count = particles.model_trace, particles.log_p.shape[1:], len(particles.log_p)
        latent = {name: site for name, site in trace.nodes.items() if is_latent(site)}
        computed = {name: site for name, site in trace.nodes.items() if is_deterministic(site)}
        seen = {
            name: site
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and site["is_observed"] and name not in computed
        }
        for name, site in {**latent, **seen}.items():
            if is_text(site):
                self.decoders.setdefault(name, site["fn"].lm.decode)
        self.name_plates(particles, {**latent, **computed, **seen})
        for name, site in seen.items():
            if is_text(site) and site["value"].dim() <= 1 + len(rows) and not self.dims[name]:
                self.observed.setdefault(name, site["value"].cpu().numpy())
            elif not isinstance(site["fn"], dist.Unit):
                value = _layout(particles, site["value"], site["fn"].event_dim, rows)[0]
                self.observed.setdefault(name, value)
        for name, site in computed.items():
            if decoder := decoder_of(site["value"]):
                self.decoders.setdefault(name, decoder)
        self.deterministic = tuple(dict.fromkeys((*self.deterministic, *computed)))
        self.masked = tuple(n for n, site in latent.items() if _masks(particles.guide_trace.nodes.get(n), site))
        self.parts.append(
            {
                "count": count,
                "samples": {name: value_of(particles, name, rows) for name in (*latent, *computed)},
                "log_p": _numpy(particles.log_p),
                "log_q": _numpy(particles.log_q),
                "token_log_p": {n: s for n in latent if (s := _token_scores(particles, trace, n, rows)) is not None},
                "token_log_q": {
                    n: s for n in latent if (s := _token_scores(particles, particles.guide_trace, n, rows)) is not None
                },
                "log_likelihood": {
                    name: _numpy(sum_site(site["log_prob"], particles.axes, particles.nesting).expand(count, *rows))
                    for name, site in seen.items()
                    if not isinstance(site["fn"], dist.Unit)
                },
            }
        )

    def name_plates(self, particles: Particles, sites: dict[str, Site]) -> None:
        """Learn the names of the rows' plates, and of those behind the rows by site."""
        known = {name: _plates_of(site) for name, site in particles.model_trace.nodes.items()}
        anywhere = {dim: name for names in known.values() for dim, name in names.items()}
        self.plates = tuple(anywhere[dim] for dim in particles.axes)
        for name, site in sites.items():
            event = _event_dim(name, particles) if is_deterministic(site) else site["fn"].event_dim
            shape = site["value"].shape
            names = anywhere | known[name]
            self.dims.setdefault(name, inner_plates(shape, event, particles.axes, particles.nesting, names))


def _plates_of(site: Site) -> dict[int, str]:
    """Names of the plates around a site, by dimension."""
    return {frame.dim: frame.name for frame in site.get("cond_indep_stack", ()) if frame.vectorized}


def gather(blocks: Iterable[Particles], method: str, exactness: str) -> Posterior:
    """The particles of several passes as one posterior."""
    gathering = Gathering()
    for block in blocks:
        gathering.add(block)
    return gathering.posterior(method, exactness)


def check_unscaled(particles: Particles) -> None:
    """Refuse scaled sites: their weights are not those of the program.

    :raises ValueError: naming the site.
    """
    for trace in (particles.model_trace, particles.guide_trace):
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not _is_one(site["scale"]):
                raise ValueError(
                    f"site {name!r} is scaled (by poutine.scale or a subsampled plate), so its weights are not those "
                    "of the program. Run inference without scaling or subsampling."
                )


def check_unmasked(particles: Particles, method: str) -> None:
    """Refuse masked latents: what the method draws or counts for them, the joint does not hold.

    :raises ValueError: naming the site.
    """
    for name, site in particles.model_trace.nodes.items():
        mask = site.get("mask") if is_latent(site) else None
        if mask is not None and mask is not True and not bool(torch.as_tensor(mask).all()):
            raise ValueError(
                f"latent site {name!r} is masked, and {method} takes its values as part of the joint. Observe masked "
                "entries, leave the rows out, or use importance(...), whose weights hold neither their p nor their q."
            )


def _masks(proposed: Site | None, site: Site) -> bool:
    """Whether the guide's law of a text forbids tokens that the program's permits."""
    q, p = None if proposed is None else proposed["fn"], site["fn"]
    if not isinstance(q, ProcessText) or not isinstance(p, ProcessText):
        return False
    if q.law.grammar is not None:
        return p.law.grammar is None
    if q.law.allowed is None:
        return False
    return bool((~q.law.allowed).any() if p.law.allowed is None else (p.law.allowed & ~q.law.allowed).any())


def _token_scores(particles: Particles, trace: poutine.Trace, name: str, rows: torch.Size) -> Array | None:
    """A text's token log-probabilities, laid out as its values are; known from scoring the trace."""
    site = trace.nodes.get(name)
    if site is None or not isinstance(site["fn"], ProcessText):
        return None
    return _layout(particles, site["fn"].token_log_prob(site["value"]), 1, rows)


def value_of(particles: Particles, name: str, rows: torch.Size) -> Array:
    """A site's values as ``(K,) + batch_shape + inner + event_shape``."""
    site = particles.model_trace.nodes[name]
    event = _event_dim(name, particles) if is_deterministic(site) else site["fn"].event_dim
    return _layout(particles, site["value"], event, rows)


def _event_dim(name: str, particles: Particles) -> int:
    """Of a deterministic site. Its own is all of the value's dimensions where ``event_dim`` was left out; then what
    does not belong to the plates does belong to the event, and the tokens of a text in any case.

    :raises ValueError: batch dimensions that are not those of the plates.
    """
    nodes, nesting = particles.model_trace.nodes, particles.nesting
    site = nodes[name]
    shape, own = site["value"].shape, site["fn"].event_dim
    # Of all plates: what is computed from the texts of a plate may well stand outside of it.
    frames = (frame for other in nodes.values() if other["type"] == "sample" for frame in other["cond_indep_stack"])
    sizes = {frame.dim: frame.size for frame in frames if frame.vectorized}
    least = 0 if decoder_of(site["value"]) is None else 1
    known = own < len(shape) and own >= least
    for event in (own,) if known else range(least, len(shape) + 1):
        batch = shape[: len(shape) - event]
        if len(batch) <= nesting + 1 and all(n in (1, sizes.get(d - len(batch))) for d, n in enumerate(batch)):
            return event
    raise ValueError(
        f"deterministic site {name!r} has shape {tuple(shape)}, which does not fit the program's plates, of sizes "
        f"{sizes} by dimension, particles included. Say how many dimensions one value has: "
        "pyro.deterministic(name, value, event_dim=...), 0 for a number and 1 for a text."
    )


def _layout(particles: Particles, value: Tensor, event: int, rows: torch.Size) -> Array:
    count = len(particles.log_p)
    missing = 1 + particles.nesting - (value.dim() - event)
    value = value.reshape((1,) * missing + value.shape) if missing > 0 else value
    # Rows in front, dimensions of inner plates behind, those of size 1 dropped.
    inner = [d for d in range(1, 1 + particles.nesting) if d - 1 - particles.nesting not in particles.axes]
    outer = [d for d in range(1, 1 + particles.nesting) if d not in inner]
    behind = list(range(1 + particles.nesting, value.dim()))
    value = value.permute(0, *outer, *inner, *behind)
    value = value.expand((count, *rows) + value.shape[1 + len(outer) :])
    for dim in reversed(range(1 + len(outer), 1 + len(outer) + len(inner))):
        if value.shape[dim] == 1:
            value = value.squeeze(dim)
    return value.detach().cpu().numpy().copy()


def _is_one(scale: float | Tensor) -> bool:
    return bool((scale == 1).all()) if isinstance(scale, Tensor) else scale == 1


def _numpy(values: Tensor) -> Array:
    return values.detach().double().cpu().numpy().copy()
