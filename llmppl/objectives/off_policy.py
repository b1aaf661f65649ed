"""What the objectives have in common that any particles serve."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from llmppl.network.text_tensors import widen
from llmppl.objectives.behaviour import Behaviour, Mixed, prior_draws, put
from llmppl.objectives.particle_objective import ParticleObjective
from llmppl.objectives.replay_buffer import Entry
from llmppl.posterior.floors import checked_floor
from llmppl.programs.observation_keys import rows_of
from llmppl.programs.observations import has_other_observations, observing
from llmppl.programs.particles import Particles
from llmppl.programs.plates import check_whole, has_data_plate
from llmppl.programs.simulation import simulate
from llmppl.programs.structure import Program, is_latent, plate_nesting, structure
from llmppl.text.declared import declared


@dataclass(frozen=True)
class Call:
    """One call of an objective: what to run, and where its particles come from.

    :param handler: puts the behaviour's values in place of the guide's; ``None`` is on-policy.
    :param on_policy: which of the ``K`` particles the guide draws as it is, boolean ``(K,)``.
    :param observations: keys of the observations in the buffer; empty for simulated ones.
    :param known: log p of the first particles, which are replayed, where the buffer has it: for each observation those
        of its entries, ``(J,)`` and the rows that belong to it.
    :param staleness: steps since the guide drew the replayed particles, in the mean; NaN without any.
    """

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    handler: Mixed | None
    on_policy: Tensor
    observations: list[str]
    known: list[list[Tensor]] = field(default_factory=list)
    staleness: float = math.nan

    def known_log_p(self, states: int, rows: torch.Size, split: bool) -> Tensor | None:
        """log p of the first ``n`` particles at each of ``states`` states, ``(states, n) + batch_shape``.

        :param split: whether the rows are observations of their own.
        """
        if not self.known or any(len(log_p) != states for own in self.known for log_p in own):
            return None
        columns = [torch.stack(own, 1) for own in self.known]  # (states, n) + the observation's own rows
        found = torch.stack(columns, -1) if split else columns[0]
        return found if found.shape[2:] == rows else None


class OffPolicyObjective(ParticleObjective):
    r"""An objective that any particles serve, whatever drew them.

    :param behaviour: where particles come from; by default from the guide.
    :param floor: nats that a joint counts as where it is less, so that a hard condition of the program (−inf) has a
        finite loss. It is a bias: the target is then proportional to :math:`\max(p(x, z), e^\text{floor})`, and what it
        gives to impossible texts is at most their number times :math:`e^\text{floor} / Z`. None by default.
    """

    fewest_particles = 2

    @declared
    def __init__(self, num_particles: int, behaviour: Behaviour | None = None, floor: float | None = None) -> None:
        super().__init__(num_particles)
        self.floor = checked_floor(floor)
        if behaviour is not None and not isinstance(behaviour, Behaviour):
            raise TypeError(f"behaviour must be an llmppl.Behaviour, got {behaviour!r}.")
        self.behaviour = behaviour or Behaviour()
        self.target_temperature = 1.0
        """``T`` of the target, p(x, z)^{1/T}; 1 but while a schedule of ``fit`` says otherwise."""

    def prepare(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Decide where the particles of a call come from."""
        behaviour, count = self.behaviour, self.num_particles
        if behaviour.on_policy == 1 and not behaviour.sleep:
            return Call(model, guide, args, kwargs, None, torch.ones(count, dtype=torch.bool), [])
        sites = structure(model, args, kwargs)
        nesting, data_plate = plate_nesting(sites), has_data_plate(sites)
        events = {name: site["fn"].event_dim for name, site in sites.nodes.items() if is_latent(site)}
        batch = (1,) * nesting
        of_prior = behaviour.draws_of_prior(count)
        replayed, temperatures = behaviour.plan(count, of_prior)
        given: dict[str, Tensor] = {}
        observations: list[str] = []
        known: list[list[Tensor]] = []
        taken = torch.zeros((count, *batch)) > 0
        staleness = math.nan
        if behaviour.simulates():
            given, seen = simulate(model, args, kwargs)
            model, guide = observing(model, guide, seen)
            given = {n: _full(v, events[n], nesting)[None] for n, v in given.items()}
            first = replayed + of_prior
            temperatures = torch.cat([torch.ones(first + 1), temperatures[first:]])[:count]
            taken = (torch.arange(count) == 0).reshape((-1,) + batch)
        elif not has_other_observations(model):
            observations = rows_of(model, args, kwargs, data_plate)
            if behaviour.buffer is not None:
                check_whole(sites, "a replay buffer")
            if behaviour.buffer is not None and replayed:
                found = [behaviour.buffer.draw(observation, replayed) for observation in observations]
                sizes = {name: sites.nodes[name]["fn"].event_shape for name in events}
                given, taken = _stack([[e.values for e in own] for own in found], sizes, count, nesting, data_plate)
                known = _known(found, count - 1)
                ages = [behaviour.buffer.step - entry.step for own in found for entry in own]
                staleness = sum(ages) / len(ages) if ages else math.nan
            if of_prior:
                drawn = prior_draws(model, args, kwargs, of_prior, nesting)
                given, taken = put(given, taken, drawn, replayed)
        handler = Mixed(temperatures, given, taken)
        on_policy = (temperatures == 1.0) & ~taken.reshape(count, -1).any(1)
        return Call(model, guide, args, kwargs, handler, on_policy, observations, known, staleness)

    def remember(
        self, call: Call, trace: poutine.Trace, log_p: Tensor, log_weights: Tensor, states: Tensor | None
    ) -> None:
        """Put the particles of a call, ``(K,) + batch_shape``, into the buffer.

        :param states: log p of the particles' states, ``(J, K) + batch_shape``, to be had again from the buffer;
            ``None`` of a program that is being learned, which is another the next time.
        """
        buffer = self.behaviour.buffer
        if buffer is None or not call.observations:
            return
        latents = {name: site for name, site in trace.nodes.items() if is_latent(site)}
        split = has_data_plate(trace)
        states = states if torch.is_grad_enabled() else None
        for row, observation in enumerate(call.observations):
            # Without a data plate all plates of the program belong to one observation.
            joint, weight = (
                (s.detach()[..., row] if split else s.detach()).reshape(len(s), -1).sum(1) for s in (log_p, log_weights)
            )
            for k in range(self.num_particles):
                values = {}
                for name, site in latents.items():
                    value = site["value"][k]
                    values[name] = value.select(value.dim() - 1 - site["fn"].event_dim, row) if split else value
                own = None if states is None else states[:, k, ..., row] if split else states[:, k]
                if joint[k] > -math.inf:
                    buffer.put(observation, values, float(joint[k]), float(weight[k]), own)

    def _off_policy_particles(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Call, Particles]:
        """The particles of one call, scored with gradients, and remembered."""
        call = self.prepare(model, guide, args, kwargs)
        particles = self._particles(
            call.model,
            call.guide,
            args,
            kwargs,
            behaviour=call.handler,
            on_policy=call.on_policy,
            allow_zero=self.floor is not None,
            known=lambda rows, split: None if (own := call.known_log_p(1, rows, split)) is None else own[0],
        )
        self.diagnostics["staleness"] = call.staleness
        states = None if particles.log_p.requires_grad else particles.log_p[None]
        self.remember(call, particles.guide_trace, particles.log_p, particles.log_weights, states)
        particles.log_p = self._floored(particles.log_p)
        return call, particles

    def _floored(self, log_p: Tensor) -> Tensor:
        """Joints, none below the floor; those that were are counted in the diagnostics."""
        if self.floor is None:
            return log_p
        self.diagnostics["floored"] = int((log_p < self.floor).sum())
        return log_p.clamp(min=self.floor)

    def settings(self) -> dict[str, Any]:
        """What makes a run of this objective the same run: its numbers and its behaviour's."""
        return {
            "num_particles": self.num_particles,
            **({} if self.floor is None else {"floor": self.floor}),
            **self.behaviour.settings(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The replay buffer, for checkpoints."""
        buffer = self.behaviour.buffer
        return {} if buffer is None else {"buffer": buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        if self.behaviour.buffer is not None and "buffer" in state:
            self.behaviour.buffer.load_state_dict(state["buffer"])


def _full(value: Tensor, event_dim: int, nesting: int) -> Tensor:
    """A site's value with all ``nesting`` batch dimensions."""
    missing = nesting + event_dim - value.dim()
    return value.reshape((1,) * missing + value.shape) if missing > 0 else value


def _known(drawn: list[list[Entry]], most: int) -> list[list[Tensor]]:
    """log p of the first entries of each observation, equally many and at most so many, as far as all of them have it.

    One particle at least is left to the program, which shows whether it is being learned.
    """
    number = min((len(own) for own in drawn), default=0)
    number = min(number, most)
    while number and any(entry.log_p is None for own in drawn for entry in own[:number]):
        number -= 1
    return [[entry.log_p for entry in own[:number] if entry.log_p is not None] for own in drawn] if number else []


def _stack(
    drawn: list[list[dict[str, Tensor]]], sizes: dict[str, torch.Size], count: int, nesting: int, split: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Replayed values as ``(K,) + batch_shape + event_shape`` by site, and which entries they fill.

    :param drawn: for each observation the configurations drawn for it.
    :param sizes: event shapes by site.
    :param split: whether observations are rows of the data plate, the innermost batch dimension.
    """
    taken = torch.zeros((count, *(1,) * (nesting - 1), len(drawn)) if split else (count, *(1,) * nesting)) > 0
    drawn = [[{n: _of_size(v, sizes[n]) for n, v in values.items()} for values in own] for own in drawn]
    events = {name: len(size) for name, size in sizes.items()}
    example = next((values for own in drawn for values in own), {})
    given = {}
    for name, some in example.items():
        columns = []
        for row, own in enumerate(drawn):
            column = torch.stack([own[k][name] if k < len(own) else some for k in range(count)])
            columns.append(column)
            (taken[..., row] if split else taken)[: len(own)] = True
        given[name] = torch.stack(columns, -1 - events[name]) if split else columns[0]
    return given, taken


def _of_size(value: Tensor, event: torch.Size) -> Tensor:
    """A text padded to the site's number of tokens."""
    return widen(value, event[0]) if value.dtype == torch.long and len(event) == 1 else value
