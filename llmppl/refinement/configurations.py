"""Whole configurations of a program's latent texts: drawn by a guide, scored by guide and program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _inspect
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from llmppl.distributions.masked_text import MaskedText
from llmppl.programs.observations import Given, Observed
from llmppl.programs.particles import check_finite, check_sites, compute_log_prob
from llmppl.programs.structure import DummyTexts, Site, is_latent, plate_nesting

Values = dict[str, Tensor]
Run = Callable[[], Any]

PARENTS = "_parents"


def frames_here() -> tuple[CondIndepStackFrame, ...]:
    """The vectorised plates around the caller."""
    return tuple(frame for frame in _inspect()["cond_indep_stack"] if frame.vectorized)


@dataclass(frozen=True)
class Configuration:
    """Texts of all latent sites, in every unit. A unit is a row of the plates that contain every site, particles
    among them: units are independent, and what belongs to one is taken or left as a whole.

    :param values: by site, of the site's own shape.
    :param steps: of random orders the steps of each text, by site, ``(num_orders,)`` and the value's shape.
    :param log_q: log q(z | x, order), of the shape of the units in nats.
    :param log_p: log p(x, z), same shape.
    """

    values: Values
    steps: Values
    log_q: Tensor
    log_p: Tensor

    @property
    def log_weight(self) -> Tensor:
        return self.log_p - self.log_q

    def with_taken(self, taken: Tensor, other: Configuration) -> Configuration:
        """The other configuration in some units, boolean of their shape."""
        return Configuration(
            {name: _where(taken, other.values[name], value) for name, value in self.values.items()},
            {name: _where(taken, other.steps[name], value) for name, value in self.steps.items()},
            torch.where(taken, other.log_q, self.log_q),
            torch.where(taken, other.log_p, self.log_p),
        )


class Configurations:
    """Draws and scores configurations, in the plates in which a guide was called.

    :param model, guide: the program and the guide on their arguments.
    :param frames: the plates around them.
    :param given: values of the latents that are no part of a configuration, by site; they stay.
    :param observations: values in place of the program's own observations, by site.
    :raises ValueError: a latent that the guide does not fill in by masks, or that is summed out.
    """

    def __init__(
        self,
        model: Run,
        guide: Run,
        frames: tuple[CondIndepStackFrame, ...] = (),
        given: Mapping[str, Tensor] | None = None,
        observations: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self._guide, self._frames = model, guide, frames
        self._given, self._observations = dict(given or {}), dict(observations or {})
        sites, proposed = self._run(model, self._given, dummies=True), self._run(guide, {}, dummies=True)
        for name, site in sites.nodes.items():
            if site["type"] == "sample" and site["infer"].get("enumerate") == "parallel":
                raise ValueError(
                    f"site {name!r} is summed out by enumeration, and refinement weighs whole configurations. Use "
                    "refine=None, or let a guide draw the site."
                )
        check_sites(_without(sites, self._given), proposed)
        self.names = [name for name, site in proposed.nodes.items() if is_latent(site)]
        """Of the sites of a configuration, in order."""
        self.nesting = plate_nesting(sites)
        stacks = [
            [f for f in site["cond_indep_stack"] if f.vectorized]
            for trace in (sites, proposed)
            for site in trace.nodes.values()
            if site["type"] == "sample" and not site_is_subsample(site)
        ]
        self.axes = set.intersection(*({f.dim for f in stack if f.dim is not None} for stack in stacks))
        sizes = {f.dim: f.size for stack in stacks for f in stack}
        self.shape = torch.Size([sizes[dim] if dim in self.axes else 1 for dim in range(-self.nesting, 0)])
        """Of the units: every dimension of the plates, those that do not contain every site of size 1."""

    def repeated(self, count: int) -> Configurations:
        """The same in a further plate of ``count`` rows, left of all others."""
        frame = CondIndepStackFrame(PARENTS, -self.nesting - 1, count, 0)
        return Configurations(self._model, self._guide, (frame, *self._frames), self._given, self._observations)

    def draw(self) -> Configuration:
        """A draw of the guide in every unit."""
        trace = self._run(self._guide, {})
        values = {name: trace.nodes[name]["value"] for name in self.names}
        return self._configuration(trace, values)

    def at(self, values: Values, steps: Mapping[str, Tensor] | None = None) -> Configuration:
        """Given values, scored.

        :param steps: of random orders, as of a :class:`Configuration`; by default drawn.
        """
        trace = self._run(self._guide, values)
        for name, known in (steps or {}).items():
            trace.nodes[name]["fn"].recall(values[name], known)
        return self._configuration(trace, values)

    def proposals(self, values: Values) -> dict[str, MaskedText]:
        """The guide's distribution of each text, given the others before it."""
        trace = self._run(self._guide, values)
        return {name: trace.nodes[name]["fn"] for name in self.names}

    def summed(self, of_texts: Tensor) -> Tensor:
        """A quantity of every text of a site, summed to the units."""
        full = of_texts.double().reshape((1,) * (self.nesting - of_texts.dim()) + of_texts.shape)
        inner = [dim for dim in range(-self.nesting, 0) if dim not in self.axes]
        return full.sum(inner, keepdim=True) if inner else full

    def laid_out(self, of_units: Tensor, front: torch.Size) -> Tensor:
        """A quantity of the units at one text of each of them, of those that a site has, zero at others; ``front``."""
        full = torch.Size([1] * (self.nesting - len(front)) + list(front))
        first = torch.ones(full, dtype=torch.bool, device=of_units.device)
        for dim in set(range(-self.nesting, 0)) - self.axes:
            place = torch.arange(full[dim], device=of_units.device).reshape([-1] + [1] * (-dim - 1))
            first = first & (place == 0)
        return torch.where(first, of_units, 0.0).reshape(front)

    def one_entry(self, front: torch.Size) -> Tensor:
        """One text of each unit at random, of those that a site has in its inner plates; boolean ``front``."""
        full = torch.Size([1] * (self.nesting - len(front)) + list(front))
        inner = [dim for dim in range(-self.nesting, 0) if dim not in self.axes]
        heights = torch.rand(full, dtype=torch.float64)
        return (heights == (heights.amax(inner, keepdim=True) if inner else heights)).reshape(front)

    @torch.no_grad()
    def _configuration(self, trace: poutine.Trace, values: Values) -> Configuration:
        compute_log_prob(trace)
        check_finite(trace, allow_zero=True)
        log_q = self._total([trace.nodes[name] for name in self.names])
        steps = {}
        for name in self.names:
            fn = trace.nodes[name]["fn"]
            if fn.plan.order == "random":
                steps[name] = fn.known_steps(values[name])
        return Configuration(values, steps, log_q, self._log_joint(values))

    def _log_joint(self, values: Values) -> Tensor:
        trace = self._run(self._model, {**self._given, **values})
        hidden = [name for name, site in trace.nodes.items() if is_latent(site) and name not in values]
        if set(hidden) - set(self._given):
            raise ValueError(
                f"the program has latent sites {sorted(set(hidden) - set(self._given))} for some values of the others "
                "only, and refinement moves configurations of the same sites. Use refine=None."
            )
        compute_log_prob(trace)
        check_finite(trace, allow_zero=True)
        return self._total([s for s in trace.nodes.values() if s["type"] == "sample" and not site_is_subsample(s)])

    def _total(self, sites: list[Site]) -> Tensor:
        total = sum((self.summed(site["log_prob"]) for site in sites), torch.zeros(()))
        return total.expand(self.shape)

    def _run(self, program: Run, values: Values, dummies: bool = False) -> poutine.Trace:
        with (
            torch.no_grad(),
            poutine.block(),
            DummyTexts() if dummies else nullcontext(),
            Observed(self._observations),
            Given(values),
            poutine.trace() as tracer,
            _Within(self._frames),
        ):
            program()
        return tracer.trace


class _Within(Messenger):
    """The plates of another call: their messengers cannot be entered a second time."""

    def __init__(self, frames: tuple[CondIndepStackFrame, ...]) -> None:
        super().__init__()
        self.frames = frames
        self.held: list[CondIndepStackFrame] = []

    def __enter__(self) -> _Within:
        # Plates of the program that leave their dimension to Pyro must find these taken, as in the other call.
        for frame in self.frames:
            try:
                _DIM_ALLOCATOR.allocate(frame.name, frame.dim)
            except ValueError:
                continue  # that call is still under way
            self.held.append(frame)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for frame in self.held:
            _DIM_ALLOCATOR.free(frame.name, frame.dim)
        self.held = []

    def _pyro_sample(self, msg: Site) -> None:
        if not site_is_subsample(msg):
            msg["cond_indep_stack"] = self.frames + msg["cond_indep_stack"]
            BroadcastMessenger._pyro_sample(msg)


def _without(trace: poutine.Trace, given: Mapping[str, Tensor]) -> poutine.Trace:
    kept = trace.copy()
    for name in given:
        if name in kept.nodes:
            kept.remove_node(name)
    return kept


def _where(taken: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(taken[..., None], new, old).reshape(old.shape)
