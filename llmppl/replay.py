"""What training looks at: the behaviour policy and the replay buffer.

Trajectory-balance objectives take particles from anywhere. On-policy ones alone never visit a mode
that the guide has lost; hotter ones, replayed ones and simulated ones do.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from llmppl.distributions.autoregressive import AutoregressiveText
from llmppl.text import PAD, widen
from llmppl.tracing import DATA, Program, Site, is_latent, is_text, structure, text_sites

PRIORITIES = ("log_joint", "log_weight", "uniform")


class Behaviour:
    """A behaviour policy: where an objective's particles come from.

    What the stated shares leave is drawn from the guide itself. Shares that are no whole number of
    particles hold on average over the steps.

    :param tempered: share of the particles that are drawn from the guide at other temperatures.
    :param temperatures: their range; drawn log-uniformly, one a particle.
    :param replayed: share of the particles that come from the buffer, as far as it has any of the
        observation; the guide draws in place of missing ones.
    :param sleep: share of the steps that take a simulated observation: latents and observations are
        drawn from the program, the observations take the place of the data, and the latents, an exact
        draw from their posterior, are the first particle.
    :param buffer: the replay buffer; made if ``replayed`` is positive.
    :raises ValueError: shares outside [0, 1] or beyond one together, temperatures that are not positive.
    """

    def __init__(
        self,
        tempered: float = 0.0,
        replayed: float = 0.0,
        sleep: float = 0.0,
        temperatures: tuple[float, float] = (0.7, 1.5),
        buffer: ReplayBuffer | None = None,
    ) -> None:
        for name, share in (("tempered", tempered), ("replayed", replayed), ("sleep", sleep)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} is a share: it must lie between 0 and 1.")
        if tempered + replayed > 1:
            raise ValueError(f"tempered={tempered} and replayed={replayed} are together more than all particles.")
        if len(temperatures) != 2 or not 0 < temperatures[0] <= temperatures[1] < math.inf:
            raise ValueError(f"temperatures={temperatures!r} must be a range of positive numbers, (low, high).")
        if buffer is not None and not replayed:
            raise ValueError("buffer= is given but replayed=0: nothing would be replayed. Set replayed=, e.g. 0.25.")
        self.tempered, self.replayed, self.sleep = float(tempered), float(replayed), float(sleep)
        self.temperatures = (float(temperatures[0]), float(temperatures[1]))
        self.buffer = ReplayBuffer() if buffer is None and replayed else buffer

    @property
    def on_policy(self) -> float:
        """Share of the particles drawn from the guide as it is."""
        return 1.0 - self.tempered - self.replayed

    def plan(self, num_particles: int) -> tuple[int, Tensor]:
        """How many particles to replay, and the temperature of each of the ``K``, ``(K,)``."""
        offset, hot_offset = torch.rand(2).tolist()
        replayed = min(math.floor(self.replayed * num_particles + offset), num_particles)
        hot = min(math.floor(self.tempered * num_particles + hot_offset), num_particles - replayed)
        low, high = (math.log(t) for t in self.temperatures)
        temperatures = torch.ones(num_particles)
        temperatures[replayed : replayed + hot] = (low + (high - low) * torch.rand(hot)).exp()
        return replayed, temperatures

    def simulates(self) -> bool:
        """Whether this step takes a simulated observation."""
        return self.sleep > 0 and torch.rand(()).item() < self.sleep

    def settings(self) -> dict[str, Any]:
        """The mix, and the buffer's own settings."""
        own = {k: getattr(self, k) for k in ("tempered", "replayed", "sleep", "temperatures")}
        return {**own, **({} if self.buffer is None else self.buffer.settings())}

    def __repr__(self) -> str:
        parts = [f"on_policy={self.on_policy:.2g}"]
        if self.tempered:
            parts.append(f"tempered={self.tempered:.2g} at {self.temperatures[0]:g} to {self.temperatures[1]:g}")
        parts += [f"replayed={self.replayed:.2g} from {self.buffer!r}"] if self.replayed else []
        parts += [f"sleep={self.sleep:.2g} of the steps"] if self.sleep else []
        return f"Behaviour({', '.join(parts)})"


@dataclass
class Entry:
    """One latent configuration of an observation, with its scores when last seen."""

    values: dict[str, Tensor]
    log_joint: float
    log_weight: float
    added: int


@dataclass
class ReplayBuffer:
    """Latent configurations of each observation, none twice.

    :param capacity: most configurations of one observation; the one of least priority leaves.
    :param observations: most observations; the one least recently seen leaves with all its own.
    :param priority: what is drawn more often and kept longer, by rank (a draw's probability falls as
        one over the rank): ``"log_joint"``, likely texts; ``"log_weight"``, texts that the guide
        underrates most; ``"uniform"``, all alike, the oldest leaving first.
    """

    capacity: int = 64
    observations: int = 10_000
    priority: str = "log_weight"
    _entries: OrderedDict[str, dict[str, Entry]] = field(default_factory=OrderedDict, repr=False)
    _clock: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
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

    def add(self, observation: str, values: dict[str, Tensor], log_joint: float, log_weight: float) -> None:
        """Take a configuration in, or renew the scores of one that is there.

        :param observation: its :func:`key`.
        :param values: by site, one configuration.
        """
        self._clock += 1
        own = self._entries.setdefault(observation, {})
        self._entries.move_to_end(observation)
        name = _fingerprint(values)
        added = own[name].added if name in own else self._clock
        own[name] = Entry({k: v.detach().cpu().clone() for k, v in values.items()}, log_joint, log_weight, added)
        if len(own) > self.capacity:
            del own[min(own, key=lambda n: self._rank_by(own[n]))]
        if len(self._entries) > self.observations:
            self._entries.popitem(last=False)

    def seed(self, model: Program, args: tuple[Any, ...], **texts: Sequence[str]) -> None:
        """Put given texts (demonstrations) of one observation into the buffer, before all others.

        :param args: the program's arguments.
        :param texts: for each latent text site its texts; equally many for each site.
        :raises ValueError: a site that the program has not, or a text outside the site's support.
        """
        sites = text_sites(structure(model, args, {}))
        if set(texts) != set(sites):
            raise ValueError(f"texts are given for {sorted(texts)}; the program's latent text sites are {list(sites)}.")
        if len({len(column) for column in texts.values()}) > 1 or any(isinstance(c, str) for c in texts.values()):
            raise ValueError("give each site a list of texts, all lists of one length.")
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
            self.add(key(args), values, math.inf, math.inf)

    def draw(self, observation: str, count: int) -> list[dict[str, Tensor]]:
        """Up to ``count`` configurations of an observation, by priority, none twice."""
        ranked = self._ranked(observation)
        if not ranked or count < 1:
            return []
        weights = torch.ones(len(ranked))
        if self.priority != "uniform":
            weights = 1.0 / torch.arange(1, len(ranked) + 1)
        chosen = torch.multinomial(weights, min(count, len(ranked)))
        return [ranked[n].values for n in chosen.tolist()]

    def _ranked(self, observation: str) -> list[Entry]:
        return sorted(self._entries.get(observation, {}).values(), key=self._rank_by, reverse=True)

    def _rank_by(self, entry: Entry) -> tuple[float, int]:
        return (0.0 if self.priority == "uniform" else getattr(entry, self.priority)), entry.added

    def settings(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "observations": self.observations, "priority": self.priority}

    def state_dict(self) -> dict[str, Any]:
        """All entries, as tensors and numbers."""
        rows = {
            o: [(e.values, e.log_joint, e.log_weight, e.added) for e in own.values()]
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


def key(args: Sequence[Any]) -> str:
    """An observation's name in a buffer, from the program's arguments by value."""
    return "; ".join(map(_canonical, args))


def _canonical(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.dtype == torch.long and value.dim() == 1:
            return f"ids {[token for token in value.tolist() if token != PAD]}"
        return repr(value.tolist() if value.dim() else float(value))
    return repr(float(value) if isinstance(value, (int, float)) else value)


def _fingerprint(values: dict[str, Tensor]) -> str:
    return repr(sorted((name, value.tolist()) for name, value in values.items()))


class Mixed(Messenger):
    """Draws latent texts at temperatures, one a particle, and puts given values in place of others.

    :param temperatures: ``(K,)``.
    :param given: by site, values ``(K,) + batch_shape + event_shape``.
    :param taken: which of them count, ``(K,) + batch_shape`` for the plates' ``nesting`` dimensions.
    """

    def __init__(self, temperatures: Tensor, given: dict[str, Tensor], taken: Tensor) -> None:
        super().__init__()
        self.temperatures, self.given, self.taken = temperatures, given, taken

    def _pyro_sample(self, msg: Site) -> None:
        if not is_latent(msg) or msg["done"]:
            return
        fn, count, nesting = msg["fn"], len(self.taken), self.taken.dim() - 1
        given = self.given.get(msg["name"])
        # The particles that are given in every row come first, and are not drawn.
        whole = int(self.taken.reshape(count, -1).all(1).long().cumprod(0).sum()) if given is not None else 0
        heat = self.temperatures.reshape((-1,) + (1,) * nesting)
        if given is not None and isinstance(fn, AutoregressiveText) and whole > 0:
            value = given.expand((count, *fn.batch_shape[1:], *fn.event_shape)).to(fn.context.device).clone()
            if whole < count:
                rest = fn.with_context(fn.context[whole:], fn.adapter)
                rest.site = fn.site
                drawn = rest.sample(temperature=heat[whole:])
                value[whole:] = torch.where(self._over(fn.event_dim)[whole:], value[whole:], drawn)
        else:
            value = fn.sample(temperature=heat) if is_text(msg) else fn.sample()
            if given is not None:
                value = torch.where(self._over(fn.event_dim), given.to(value.device), value)
        msg["value"], msg["done"] = value, True

    def _over(self, event_dim: int) -> Tensor:
        return self.taken.reshape(self.taken.shape + (1,) * event_dim)


def rows_of(args: tuple[Any, ...], data_plate: bool) -> list[str]:
    """The keys of the observations of one call: one a row of the data plate, or one in all."""
    if not data_plate:
        return [key(args)]
    return [key(row) for row in zip(*args, strict=True)]


def has_data_plate(trace: poutine.Trace) -> bool:
    """Whether the program runs inside the plate over its arguments."""
    return any(
        frame.name == DATA
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
    )
