"""What a posterior keeps of the particles of several passes: numbers, not traces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from llmppl.distributions.process import ProcessText
from llmppl.inference.posterior import Array, Posterior
from llmppl.particles import Particles, sum_site
from llmppl.text import PAD
from llmppl.tracing import Site, is_latent, is_text

_Columns = dict[str, Array]


@dataclass
class Gathering:
    """Particles of any number of passes, each let go of as soon as its numbers are taken.

    A site that only some passes have is filled up in the others: a text with padding, a number with NaN,
    a log-probability with zero.
    """

    parts: list[dict[str, Any]] = field(default_factory=list)
    decoders: dict[str, Any] = field(default_factory=dict)
    observed: _Columns = field(default_factory=dict)
    masked: tuple[str, ...] = ()

    def add(self, particles: Particles) -> None:
        """Take the numbers of one pass."""
        trace, rows, count = particles.model_trace, particles.log_p.shape[1:], len(particles.log_p)
        latent = {name: site for name, site in trace.nodes.items() if is_latent(site)}
        seen = {n: site for n, site in trace.nodes.items() if site["type"] == "sample" and site["is_observed"]}
        for name, site in {**latent, **seen}.items():
            if is_text(site):
                self.decoders.setdefault(name, site["fn"].lm.decode)
        for name, site in seen.items():
            if is_text(site):
                self.observed.setdefault(name, site["value"].cpu().numpy())
        self.masked = tuple(n for n, site in latent.items() if _masks(particles.guide_trace.nodes.get(n), site))
        self.parts.append(
            {
                "count": count,
                "samples": {name: _value(particles, name, rows) for name in latent},
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

    def posterior(self, method: str, exactness: str) -> Posterior:
        """Everything taken so far; log-weights are log p by enumeration, zero by MCMC, else log p − log q."""
        log_p = np.concatenate([part["log_p"] for part in self.parts])
        if method == "enumeration":
            log_weights = log_p
        elif method == "mcmc":
            log_weights = np.zeros_like(log_p)
        elif method == "decoding":
            log_weights = np.full_like(log_p, np.nan)
        else:
            log_weights = log_p - np.concatenate([part["log_q"] for part in self.parts])
        return Posterior(
            samples=self._joined("samples"),
            log_weights=log_weights,
            log_joint=log_p,
            method=method,
            exactness=exactness,
            decoders=self.decoders,
            observed=self.observed,
            masked=self.masked,
            token_log_p=self._joined("token_log_p"),
            token_log_q=self._joined("token_log_q"),
            log_likelihood=self._joined("log_likelihood"),
        )

    def _joined(self, column: str) -> _Columns:
        names = dict.fromkeys(name for part in self.parts for name in part[column])
        return {name: self._concatenated(column, name) for name in names}

    def _concatenated(self, column: str, name: str) -> Array:
        found = [part[column].get(name) for part in self.parts]
        known = [values for values in found if values is not None]
        text = column == "samples" and name in self.decoders
        filling = PAD if text else np.nan if column == "samples" else 0.0
        if text or column.startswith("token"):
            width = max(values.shape[-1] for values in known)
            found = [None if v is None else _widened(v, width, filling) for v in found]
            known = [values for values in found if values is not None]
        if len(known) < len(found):
            kind = np.result_type(known[0].dtype, np.int64 if text else np.float64)
            shape = known[0].shape[1:]
            found = [
                np.full((part["count"], *shape), filling, dtype=kind) if v is None else v
                for v, part in zip(found, self.parts, strict=True)
            ]
        return np.concatenate([values for values in found if values is not None])


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
                    "of the program. Run importance sampling without scaling or subsampling."
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


def _widened(values: Array, width: int, filling: float) -> Array:
    missing = width - values.shape[-1]
    if not missing:
        return values
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)], constant_values=filling)


def _token_scores(particles: Particles, trace: poutine.Trace, name: str, rows: torch.Size) -> Array | None:
    """A text's token log-probabilities, laid out as its values are; known from scoring the trace."""
    site = trace.nodes.get(name)
    if site is None or not isinstance(site["fn"], ProcessText):
        return None
    return _layout(particles, site["fn"].token_log_prob(site["value"]), 1, rows)


def _value(particles: Particles, name: str, rows: torch.Size) -> Array:
    """A site's values as ``(K,) + batch_shape + inner + event_shape``."""
    site = particles.model_trace.nodes[name]
    return _layout(particles, site["value"], site["value"].dim() - _batch_dims(site), rows)


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


def _batch_dims(site: Site) -> int:
    return site["value"].dim() - site["fn"].event_dim


def _is_one(scale: float | Tensor) -> bool:
    return bool((scale == 1).all()) if isinstance(scale, Tensor) else scale == 1


def _numpy(values: Tensor) -> Array:
    return values.detach().double().cpu().numpy().copy()
