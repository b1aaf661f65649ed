"""The replay buffer: latents of each observation that training has seen, or was given."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmppl.network.text_tensors import widen
from llmppl.posterior.posterior import Posterior
from llmppl.programs.observation_keys import key, rows_of
from llmppl.programs.structure import Program, structure, text_sites
from llmppl.text import PAD
from llmppl.text.declared import check_fields, declared

PRIORITIES = ("log_joint", "log_weight", "uniform")


@dataclass
class ReplayBuffer:
    """Latent configurations of each observation, none twice.

    The joint of a configuration is kept with it, and of a program without learned parameters it is taken to stay the
    same. Where a program changes otherwise, by a factor that is annealed, say, use another buffer.

    :param capacity: most configurations of one observation; the one of least priority leaves.
    :param observations: most observations; the one least recently seen leaves with all its own.
    :param max_staleness: training steps after which a configuration is replayed no more, counted from the step whose
        guide has drawn it; no bound by default.
    :param priority: what is drawn more often and kept longer, by rank (a draw's probability falls as
        one over the rank): ``"log_joint"``, likely texts; ``"log_weight"``, texts that the guide
        underrates most; ``"uniform"``, all alike, the oldest leaving first.
    """

    capacity: int = 64
    observations: int = 10_000
    priority: str = "log_weight"
    max_staleness: int | None = None
    step: int = field(default=0, repr=False)
    """The step that training is at, set by ``fit``."""
    _entries: OrderedDict[str, dict[str, Entry]] = field(default_factory=OrderedDict, repr=False)
    _clock: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.capacity < 1 or self.observations < 1:
            raise ValueError(f"capacity={self.capacity} and observations={self.observations} must both be at least 1.")
        if self.priority not in PRIORITIES:
            raise ValueError(f"priority={self.priority!r} must be one of {PRIORITIES}.")

    def __len__(self) -> int:
        """Configurations of all observations."""
        return sum(map(len, self._entries.values()))

    def of(self, *args: Any) -> list[Entry]:
        """The configurations of one observation, best first."""
        return self._ranked(key(args))

    @declared
    def add(self, posterior: Posterior) -> int:
        """Take in the draws of a posterior that search has found: of ``smc``, ``mcmc``, ``importance``,
        ``exact_posterior`` or ``decode`` of the same program and observations. A guide that replays them is that search
        compiled.

        Of each observation the draws of highest priority stay, by their joint or their weight (their joint where the
        method weighs all alike); impossible ones are left out. Their joint is known, and is not computed anew when they
        are replayed.

        :returns: how many distinct configurations the buffer has taken in.
        :raises ValueError: a posterior that does not know what it was conditioned on, as NumPyro's, or whose plates
            do not all belong to one observation or to all.
        """
        names, rows = posterior.observations, posterior.batch_shape
        if not names:
            raise ValueError(
                "the posterior does not say which observations it is of. Give one that smc(), mcmc(), importance() or "
                "exact_posterior() of a Pyro program returned."
            )
        split = not isinstance(names, str)
        inner = {n: v.ndim - 1 - len(rows) - (n in posterior.decoders) for n, v in posterior.samples.items()}
        if rows and not split and any(number > 0 for number in inner.values()):
            raise ValueError(
                "the posterior has plates of the program around every site and others within, whose order a replay "
                "cannot tell. Give the rows as data of the program, with vectorize_data=True in inference and training."
            )
        taken = 0
        for n, name in enumerate([names] if isinstance(names, str) else names):
            log_p, log_weights = (v[..., n] if split else v for v in (posterior.log_joint, posterior.log_weights))
            joint, weight = (v.reshape(len(v), -1).sum(1) for v in (log_p, log_weights))
            if posterior.method not in ("importance", "smc"):
                weight = joint
            possible = np.flatnonzero(np.isfinite(joint) & np.isfinite(weight))
            by = {"log_joint": joint, "log_weight": weight, "uniform": weight}[self.priority]
            samples = {
                site: value.take(n, axis=len(rows)) if split else value
                for site, value in posterior.samples.items()
                if site not in posterior.deterministic
            }
            distinct: dict[str, tuple[int, dict[str, Tensor]]] = {}
            for k in possible[np.argsort(-by[possible], kind="stable")]:
                values = {site: torch.from_numpy(np.array(value[k])) for site, value in samples.items()}
                distinct.setdefault(_fingerprint(values), (int(k), values))
                if len(distinct) == self.capacity:
                    break
            for k, values in reversed(distinct.values()):  # the best is the newest
                self.put(name, values, float(joint[k]), float(weight[k]), torch.from_numpy(np.array(log_p[k]))[None])
            taken += len(distinct)
        return taken

    def put(
        self,
        observation: str,
        values: dict[str, Tensor],
        log_joint: float,
        log_weight: float,
        log_p: Tensor | None = None,
        step: int | None = None,
    ) -> None:
        """Take a configuration in, or renew the scores of one that is there.

        :param observation: its :func:`key`.
        :param values: by site, one configuration.
        :param log_p: log p(x, z) of each state of the configuration, ``(J,)`` and the rows that belong to the
            observation, the configuration itself last; ``None`` where it has to be computed when it is replayed.
        :param step: of training, whose guide has drawn it; by default the present one, or, of what is there, that at
            which it was drawn.
        """
        self._clock += 1
        own = self._entries.setdefault(observation, {})
        self._entries.move_to_end(observation)
        name = _fingerprint(values)
        added = own[name].added if name in own else self._clock
        if step is None:
            step = own[name].step if name in own else self.step
        kept = {k: v.detach().cpu().clone() for k, v in values.items()}
        log_p = None if log_p is None else log_p.detach().cpu().clone()
        own[name] = Entry(kept, log_joint, log_weight, added, log_p, step)
        if len(own) > self.capacity:
            del own[min(own, key=lambda n: self._rank_by(own[n]))]
        if len(self._entries) > self.observations:
            self._entries.popitem(last=False)

    @declared
    def seed(self, model: Program, args: tuple[Any, ...], **texts: Sequence[str]) -> None:
        """Put given texts (demonstrations) of one observation into the buffer, before all others.

        :param args: the program's arguments.
        :param texts: for each latent text site its texts; equally many for each site.
        :raises ValueError: a site that the program has not, or a text outside the site's support.
        """
        sites = text_sites(structure(model, args, {}))
        if set(texts) != set(sites):
            raise ValueError(f"texts are given for {sorted(texts)}; the program's latent text sites are {list(sites)}.")
        if (
            not all(isinstance(column, (list, tuple)) for column in texts.values())
            or len(set(map(len, texts.values()))) > 1
        ):
            raise ValueError(f"give each site of {list(sites)} a list of texts, all lists of one length.")
        for row in zip(*(texts[name] for name in sites), strict=True):
            values = {}
            for (name, site), text in zip(sites.items(), row, strict=True):
                fn = site["fn"]
                value = widen(fn.lm.encode(text), fn.event_shape[0])
                if value.shape != fn.event_shape or not bool(fn.support.check(value)):
                    raise ValueError(
                        f"the text {text!r} is outside the support of site {name!r}, {fn.support}. It must end as "
                        "the site's texts end: with its only stop token, within max_tokens."
                    )
                values[name] = value.expand(fn.batch_shape + fn.event_shape)
            self.put(rows_of(model, args, {}, False)[0], values, math.inf, math.inf)

    @declared
    def draw(self, observation: str, count: int) -> list[Entry]:
        """Up to ``count`` configurations of an observation, by priority, none twice and none too stale."""
        oldest = -math.inf if self.max_staleness is None else self.step - self.max_staleness
        ranked = [entry for entry in self._ranked(observation) if entry.step >= oldest]
        if not ranked or count < 1:
            return []
        weights = torch.ones(len(ranked))
        if self.priority != "uniform":
            weights = 1.0 / torch.arange(1, len(ranked) + 1)
        chosen = torch.multinomial(weights, min(count, len(ranked)))
        return [ranked[n] for n in chosen.tolist()]

    def _ranked(self, observation: str) -> list[Entry]:
        return sorted(self._entries.get(observation, {}).values(), key=self._rank_by, reverse=True)

    def _rank_by(self, entry: Entry) -> tuple[float, int]:
        return (0.0 if self.priority == "uniform" else getattr(entry, self.priority)), entry.added

    def settings(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "observations": self.observations, "priority": self.priority}

    def state_dict(self) -> dict[str, Any]:
        """All entries, as tensors and numbers."""
        rows = {
            o: [(e.values, e.log_joint, e.log_weight, e.added, e.log_p, e.step) for e in own.values()]
            for o, own in self._entries.items()
        }
        return {"clock": self._clock, "entries": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self._clock = state["clock"]
        self._entries = OrderedDict(
            (o, {_fingerprint(row[0]): Entry(*row) for row in rows}) for o, rows in state["entries"].items()
        )

    def __repr__(self) -> str:
        return (
            f"ReplayBuffer({len(self)} configurations of {len(self._entries)} observations, "
            f"capacity={self.capacity} each, priority={self.priority!r})"
        )


@dataclass
class Entry:
    """One latent configuration of an observation, with its scores when last seen; ``log_p`` and ``step`` as of
    :meth:`ReplayBuffer.put`."""

    values: dict[str, Tensor]
    log_joint: float
    log_weight: float
    added: int
    log_p: Tensor | None = None
    step: int = 0


def _fingerprint(values: dict[str, Tensor]) -> str:
    """A configuration's name; texts that differ in padding alone have one."""
    return repr(sorted((name, _unpadded(value)) for name, value in values.items()))


def _unpadded(value: Tensor) -> Any:
    """A value as lists, without the columns that are padding in every row."""
    if value.dtype == torch.long and value.dim():
        used = (value != PAD).reshape(-1, value.shape[-1]).any(0).nonzero()
        value = value[..., : int(used[-1]) + 1 if len(used) else 0]
    return value.tolist()
