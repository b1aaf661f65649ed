"""The particles of sequential Monte Carlo: written, weighed, resampled."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.inference.resampling import effective_size, resample, without_replacement
from llmppl.inference.stages import Stages, Values
from llmppl.inference.writing import Writing
from llmppl.posterior.smc_runs import FLOWS_EVERY
from llmppl.programs.structure import is_latent


class Population:
    """``K`` particles of a program for each observation, from nothing to their joint.

    :param retained: values by site of one particle that is kept whatever its weight, in place 0: the
        conditional particle filter. Resampling must be multinomial.

    Other parameters as of :func:`~llmppl.smc`.
    """

    def __init__(
        self,
        stages: Stages,
        targets: str | None,
        resampling: str,
        ess_threshold: float,
        check_every: int | None,
        retained: Values | None = None,
        defensive: float = 0.0,
    ) -> None:
        assert retained is None or resampling == "multinomial"
        self.defensive = defensive
        self.stages, self.resampling, self.threshold, self.retained = stages, resampling, ess_threshold, retained
        self.targets, self.check_every = targets, check_every
        self.values: Values = {}
        self.recorded: Values = {}  # log q of each token, by text
        self.log_weights = torch.zeros(stages.shape, dtype=torch.float64)
        self.log_target = torch.zeros(stages.shape, dtype=torch.float64)
        self.pending = torch.zeros(stages.shape, dtype=torch.float64)  # log q of what is written but not weighed
        self.ancestors = (
            torch.arange(stages.count).reshape((-1,) + (1,) * (len(stages.shape) - 1)).repeat(1, *stages.shape[1:])
        )
        self.num_ancestors = stages.count
        self.ess_history: list[Tensor] = []
        self.complete = resampling == "optimal"  # until a continuation has to be dropped
        if resampling == "optimal":
            # One particle, nothing written yet, stands for all.
            self.log_weights[1:] = -math.inf
            self.log_weights[0] = math.log(stages.count)
            self.ancestors.zero_()
            self.num_ancestors = 1

    def run(self, bar: Any = None) -> None:
        """Walk through the program; a progress bar is told of each token."""
        for names in self.stages.segments:
            if names[0] in self.stages.texts:
                self._write(names[0], bar)
            else:
                self._propose(names)
            log_joint, self.trace = self.stages.log_joint(self.values)
            self.weigh(log_joint)
            self.ess_history.append(effective_size(self.log_weights))
            if names is not self.stages.segments[-1]:
                self._resample_ended()
        self.log_joint = self.log_target

    # --- proposing ---------------------------------------------------------------------------------

    def _propose(self, names: list[str]) -> None:
        """Latents that are not written token by token, whole."""
        if self.resampling == "optimal":
            raise ValueError(
                f"resampling='optimal' takes texts that are written token by token, and {names[0]!r} is a latent of "
                "another kind. Use 'systematic'."
            )
        stages = self.stages
        given = dict(self.values)
        if self.retained is not None:
            given |= self._beside_retained(names)
        trace = stages.run(stages.guide, given, drawn=names)
        for name, site in list(trace.nodes.items()):
            if site["type"] == "sample" and not (is_latent(site) and name in names):
                trace.remove_node(name)
        for name in names:
            site = trace.nodes[name]
            self.values[name] = stages.whole(site["value"], site["fn"].event_dim)
        self.pending = self.pending + stages.log_prob(trace)

    def _beside_retained(self, names: list[str]) -> Values:
        """A draw of some latents with the retained values in place 0."""
        assert self.retained is not None
        trace = self.stages.run(self.stages.guide, self.values, drawn=names)
        given = {}
        for name in names:
            site = trace.nodes[name]
            value = self.stages.whole(site["value"], site["fn"].event_dim).clone()
            value[0] = self.stages.whole(self.retained[name], site["fn"].event_dim)[0]
            given[name] = value
        return given

    def _write(self, name: str, bar: Any) -> None:
        """One text of each particle, token by token."""
        stages = self.stages
        q = stages.run(stages.guide, self.values).nodes[name]["fn"]
        p = stages.run(stages.model, self.values).nodes[name]["fn"]
        targets = self._targets(name, q)
        every = self.check_every or (FLOWS_EVERY if targets == "flows" else 1)
        retained = (
            None if self.retained is None else stages.whole(self.retained[name], 1)[0].reshape(-1, q.event_shape[0])
        )
        writing = Writing(q, p, targets == "prefixes", retained, self.defensive)
        if self.resampling == "optimal" and math.prod(q.batch_shape) != math.prod(stages.shape):
            raise ValueError(
                f"resampling='optimal' needs one text a particle, and site {name!r} stands in a plate that does not "
                "contain every site. Use 'systematic'."
            )
        if self.resampling == "optimal":
            writing.drop(~torch.isfinite(self._per_text(self.log_weights, q)))
        while writing.open.any():
            if self.resampling == "optimal":
                self._branch(writing, targets)
            else:
                writing.write(writing.draw())
                log_q, log_p = writing.steps()
                self.pending = self.pending + stages.summed(log_q.reshape(q.batch_shape))
                if targets == "prefixes":
                    # Weighed by the model's own law of the prefix; what the text brings about comes at its end.
                    self.weigh(self.log_target + stages.summed(log_p.reshape(q.batch_shape)))
            writing.advance()
            if bar is not None:
                bar.update()
            if writing.open.any() and writing.length % every == 0:
                if targets == "flows":
                    if not writing.can_end():
                        continue  # no flow before the fewest tokens
                    self._weigh_flows(name, writing)
                self._look(writing, targets)
        source = self._alive(q)
        self.values[name] = writing.tokens[source].reshape(q.batch_shape + q.event_shape)
        self.recorded[name] = writing.log_q[source].reshape(self.values[name].shape)

    def _targets(self, name: str, q: AutoregressiveText) -> str:
        reason = q.not_terminable()
        if reason is None and not len(q.law.stop):
            reason = f"ends with {q.law.described_stop()} alone, so it cannot end at every prefix"
        if self.targets == "flows" and reason is not None:
            raise ValueError(
                f"targets='flows': latent site {name!r} {reason}. Use targets='prefixes', or pass stop= and no "
                "grammar= there."
            )
        if self.targets is None:
            return "flows" if reason is None and self.stages.guided else "prefixes"
        return self.targets

    # --- weighing ----------------------------------------------------------------------------------

    def weigh(self, log_target: Tensor) -> None:
        """Weigh what was written since the last time against a new target, ``(K,) + batch_shape``."""
        grown = log_target - self.log_target - self.pending
        # A particle of weight zero stays one, whatever its targets.
        dead = torch.isneginf(self.log_weights) | torch.isneginf(log_target)
        self.log_weights = torch.where(dead, -math.inf, self.log_weights + grown)
        self.log_target = log_target
        self.pending = torch.zeros_like(self.pending)

    def _weigh_flows(self, name: str, writing: Writing) -> None:
        shape = writing.q.batch_shape
        ended, log_stop = writing.ended()
        ended = ended[self._alive(writing.q)].reshape(shape + writing.q.event_shape)
        joint, _ = self.stages.log_joint({**self.values, name: ended})
        self.weigh(joint - self.stages.summed(log_stop.reshape(shape)))

    # --- resampling --------------------------------------------------------------------------------

    def _look(self, writing: Writing, targets: str) -> None:
        """Note the effective sample size, and resample the observations where it is low."""
        if self.resampling == "optimal":
            return
        self.ess_history.append(effective_size(self.log_weights))
        open_particles = self.stages.summed(writing.open.reshape(writing.q.batch_shape).double()) > 0
        group = open_particles if targets == "prefixes" else torch.ones_like(open_particles)
        index, changed = self._draw_index(group)
        if changed:
            self._reorder(index)
            writing.reorder(self._per_text(index, writing.q, index=True))

    def _resample_ended(self) -> None:
        if self.resampling == "optimal":
            return
        index, changed = self._draw_index(torch.ones(self.stages.shape, dtype=torch.bool))
        if changed:
            self._reorder(index)

    def _draw_index(self, group: Tensor) -> tuple[Tensor, bool]:
        """Where each particle of a group continues from; the group keeps its total weight."""
        count = self.stages.count
        flat, members = self.log_weights.reshape(count, -1), group.reshape(count, -1)
        index = torch.arange(count)[:, None].repeat(1, flat.shape[1])
        changed = False
        for row in range(flat.shape[1]):
            chosen = members[:, row].nonzero()[:, 0]
            weights = flat[chosen, row]
            if len(chosen) < 2 or not bool(torch.isfinite(weights).any()):
                continue
            if float(effective_size(weights)) >= self.threshold * len(chosen):
                continue
            kept = self.retained is not None and int(chosen[0]) == 0
            index[chosen, row] = chosen[resample(weights, self.resampling, retained=kept)]
            flat[chosen, row] = weights.logsumexp(0) - math.log(len(chosen))
            changed = True
        self.log_weights = flat.reshape(self.stages.shape)
        return index.reshape(self.stages.shape), changed

    def _reorder(self, index: Tensor) -> None:
        for column in ("log_target", "pending", "ancestors"):
            setattr(self, column, getattr(self, column).gather(0, index))
        for values in (self.values, self.recorded):
            for name, value in values.items():
                values[name] = self.stages.take(index.to(value.device), value)

    def _branch(self, writing: Writing, targets: str) -> None:
        """Let every continuation of every particle compete for the places, and keep different ones."""
        count, shape = self.stages.count, self.stages.shape
        weights = self.log_weights.reshape(count, -1)
        rows = weights.shape[1]
        transition = writing.transitions(prior=targets == "prefixes")  # (open texts, V)
        index = torch.arange(count)[:, None].repeat(1, rows)
        tokens = torch.full((count, rows), -1)
        fresh = torch.full_like(weights, -math.inf)
        where = writing.rows.reshape(-1)  # open texts -> particle * rows + row
        for row in range(rows):
            mine = (where % rows == row).nonzero()[:, 0]
            parents = where[mine] // rows
            scores = (weights[parents, row][:, None] + transition[mine].cpu()).reshape(-1)
            closed = torch.isfinite(weights[:, row]) & ~writing.open.reshape(count, rows)[:, row].cpu()
            ended = closed.nonzero()[:, 0]
            ended_weights = weights[ended, row]
            width = transition.shape[1]
            if targets == "flows":
                chosen, kept = without_replacement(torch.cat([ended_weights, scores]), count)
            else:
                # Ended texts and prefixes cannot be compared: each kind competes in itself.
                first, first_weights = without_replacement(ended_weights, count // 2 if len(mine) else count)
                second, second_weights = without_replacement(scores, count - len(first))
                chosen = torch.cat([first, second + len(ended)])
                kept = torch.cat([first_weights, second_weights])
            competed = int(torch.isfinite(ended_weights).sum() + torch.isfinite(scores).sum())
            self.complete &= len(chosen) == competed
            if not len(chosen):
                raise ValueError(
                    f"no continuation of site {writing.q.site!r} has positive weight: the guide's law and the "
                    "program's share no text. Give a guide that satisfies the program's conditions."
                )
            is_child = chosen >= len(ended)
            child = chosen[is_child] - len(ended)
            places, old, token = torch.arange(len(chosen)), torch.empty_like(chosen), torch.full_like(chosen, -1)
            old[~is_child], old[is_child] = ended[chosen[~is_child]], parents[child // width]
            token[is_child] = child % width
            index[places, row] = old
            tokens[places, row] = token
            fresh[places, row] = kept
        self._reorder(index.reshape(shape))
        self.log_weights = fresh.reshape(shape)
        alive = torch.isfinite(fresh)
        writing.reorder(self._per_text(index.reshape(shape), writing.q, index=True))
        writing.drop(~self._per_text(alive.reshape(shape), writing.q))
        flat = self._per_text(tokens.reshape(shape), writing.q).to(writing.tokens.device)
        writing.write(flat[writing.rows])
        log_q, log_p = writing.steps()
        if targets == "flows":
            self.pending = self.pending + log_q.reshape(shape)
        else:
            self.log_target = self.log_target + log_p.reshape(shape)

    def _alive(self, q: AutoregressiveText) -> Tensor:
        """For each text itself; of particles that optimal resampling has dropped, whose texts were left
        unfinished, one that it has kept."""
        index = (
            torch.arange(self.stages.count)
            .reshape((-1,) + (1,) * (len(self.stages.shape) - 1))
            .expand(self.stages.shape)
        )
        if self.resampling == "optimal":
            alive = torch.isfinite(self.log_weights)
            index = torch.where(alive, index, alive.long().argmax(0))
        return self._per_text(index, q, index=True).to(q.context.device)

    def _per_text(self, of_rows: Tensor, q: AutoregressiveText, index: bool = False) -> Tensor:
        """A quantity of particles for each text, flat; particles' indices become those of texts."""
        full = self.stages.laid_out(of_rows).expand(q.batch_shape)
        if not index:
            return full.reshape(-1)
        places = torch.arange(math.prod(q.batch_shape)).reshape(q.batch_shape)
        return places.gather(0, full).reshape(-1)

    # --- out ---------------------------------------------------------------------------------------

    def guide_trace(self) -> poutine.Trace:
        """The guide at the final particles, with the scores recorded while writing."""
        trace = self.stages.run(self.stages.guide, self.values)
        for name, scores in self.recorded.items():
            site = trace.nodes[name]
            site["fn"].remember(site["value"], scores)
        return trace
