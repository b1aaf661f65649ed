"""A program cut at its latent sites, as sequential Monte Carlo walks through it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.programs.observations import Given
from llmppl.programs.particles import check_finite, check_sites, common_axes, compute_log_prob, sum_sites
from llmppl.programs.plates import in_particles
from llmppl.programs.structure import DummyTexts, Program, Site, is_latent, plate_nesting, signature, structure

Values = dict[str, Tensor]


class Stages:
    """The latent sites of a program in the order in which its guide proposes them.

    :param guide: a guide, or ``None`` to propose from the program itself.
    :param count: ``K`` particles.
    :raises ValueError: the guide misses a latent site, or has one that the model has not.
    """

    def __init__(
        self, model: Program, guide: Program | None, args: tuple[Any, ...], kwargs: dict[str, Any], count: int
    ) -> None:
        self.model, self.guide = model, latents_of(model) if guide is None else guide
        self.args, self.kwargs, self.count = args, kwargs, count
        self.guided = guide is not None
        sites, proposed = structure(model, args, kwargs), structure(self.guide, args, kwargs)
        check_sites(sites, proposed)
        self.nesting, self.axes = plate_nesting(sites), common_axes(sites, proposed)
        sizes = {f.dim: f.size for s in sites.nodes.values() if s["type"] == "sample" for f in s["cond_indep_stack"]}
        self.shape = torch.Size([count, *(sizes[dim] for dim in self.axes)])
        """``(K,) + batch_shape``."""
        self.segments: list[list[str]] = []
        """Names of sites that are proposed together: a text token by token alone, others side by side."""
        alone = True
        for name, site in proposed.nodes.items():
            if is_latent(site):
                if alone or self._by_tokens(site):
                    self.segments.append([name])
                else:
                    self.segments[-1].append(name)
                alone = self._by_tokens(site)
        self.narrowed = all(len(names) == 1 for names in self.segments) and any(
            _narrows(proposed.nodes[name]["fn"], sites.nodes[name]["fn"]) for names in self.segments for name in names
        )
        """Whether the guide masks tokens that the program permits: every text written by a narrower grammar."""
        self.texts = {name for name, site in proposed.nodes.items() if is_latent(site) and self._by_tokens(site)}

    @staticmethod
    def _by_tokens(site: Site) -> bool:
        return isinstance(site["fn"], AutoregressiveText)

    def run(self, program: Program, values: Values, drawn: Collection[str] = ()) -> poutine.Trace:
        """A run of all particles with some latents given; of the others texts not in ``drawn`` are dummies."""
        with torch.no_grad(), poutine.block(), DummyTexts(drawn), Given(values):
            return poutine.trace(in_particles(program, self.count, self.nesting)).get_trace(*self.args, **self.kwargs)

    def log_joint(self, values: Values) -> tuple[Tensor, poutine.Trace]:
        """Log-density of what stands in the program before its first latent that is not given, observed sites
        included, ``(K,) + batch_shape`` in nats; and the trace of those sites."""
        trace = self.run(self.model, values)
        seen = False
        for name, site in list(trace.nodes.items()):
            if site["type"] == "sample":
                seen = seen or (is_latent(site) and name not in values)
                if seen:
                    trace.remove_node(name)
        return self.log_prob(trace), trace

    def log_prob(self, trace: poutine.Trace) -> Tensor:
        """Log-density of a trace's sites, ``(K,) + batch_shape`` in nats."""
        if not any(site["type"] == "sample" for site in trace.nodes.values()):
            return torch.zeros(self.shape, dtype=torch.float64)
        with torch.no_grad():
            compute_log_prob(trace)
        check_finite(trace, allow_zero=True)
        return sum_sites(trace, self.axes, self.nesting, self.count).double().cpu().expand(self.shape)

    def laid_out(self, of_rows: Tensor) -> Tensor:
        """``(K,) + batch_shape`` as ``(K,)`` and every dimension of the plates, those of inner plates of size 1."""
        sizes = dict(zip(self.axes, of_rows.shape[1:], strict=True))
        return of_rows.reshape([len(of_rows), *(sizes.get(dim, 1) for dim in range(-self.nesting, 0))])

    def summed(self, of_texts: Tensor) -> Tensor:
        """A quantity of every text, ``(K,)`` and every dimension of the plates, summed to ``(K,) + batch_shape``."""
        inner = [dim for dim in range(-self.nesting, 0) if dim not in self.axes]
        return (of_texts.sum(inner) if inner else of_texts).expand(self.shape)

    def take(self, index: Tensor, value: Tensor) -> Tensor:
        """Particles of a site's value, by index ``(K,) + batch_shape``.

        :param value: ``(K,)``, every dimension of the plates, the event's dimensions.
        """
        event_dim = value.dim() - 1 - self.nesting
        full = self.laid_out(index)
        return value.gather(0, full.reshape(full.shape + (1,) * event_dim).expand_as(value))

    def whole(self, value: Tensor, event_dim: int) -> Tensor:
        """A site's value with every dimension of the plates, those of its rows and particles in full."""
        missing = 1 + self.nesting + event_dim - value.dim()
        value = value.reshape((1,) * missing + value.shape)
        front = torch.broadcast_shapes(value.shape[: 1 + self.nesting], self.laid_out(torch.empty(self.shape)).shape)
        return value.expand(front + value.shape[1 + self.nesting :])


def _narrows(q: Any, p: Any) -> bool:
    return (
        isinstance(q, AutoregressiveText)
        and isinstance(p, AutoregressiveText)
        and q.law.grammar is not None
        and p.law.grammar is None
    )


def latents_of(model: Program) -> Program:
    """The program without its observed sites and factors: a proposal from the prior."""

    def prior(*args: Any, **kwargs: Any) -> Any:
        with poutine.block(hide_fn=lambda site: site["type"] == "sample" and not is_latent(site)):
            return model(*args, **kwargs)

    prior.__signature__ = signature(model)  # type: ignore[attr-defined]
    return prior
