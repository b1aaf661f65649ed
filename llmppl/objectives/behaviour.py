"""What training looks at: the behaviour policy.

Trajectory-balance objectives take particles from anywhere. On-policy ones alone never visit a mode
that the guide has lost; hotter ones, replayed ones and simulated ones do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.objectives.replay_buffer import ReplayBuffer
from llmppl.programs.plates import in_particles
from llmppl.programs.structure import Program, Site, is_latent, is_text
from llmppl.text.declared import declared


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
    :param prior: share of the particles whose latents the program draws, whatever was observed. They reach what the
        guide has lost. A simulated step has none.
    :raises ValueError: shares outside [0, 1] or beyond one together, temperatures that are not positive.
    """

    @declared
    def __init__(
        self,
        tempered: float = 0.0,
        replayed: float = 0.0,
        sleep: float = 0.0,
        temperatures: tuple[float, float] = (0.7, 1.5),
        buffer: ReplayBuffer | None = None,
        prior: float = 0.0,
    ) -> None:
        for name, share in (("tempered", tempered), ("replayed", replayed), ("sleep", sleep), ("prior", prior)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} is a share: it must lie between 0 and 1.")
        if tempered + replayed + prior > 1:
            raise ValueError(
                f"tempered={tempered}, replayed={replayed} and prior={prior} are together more than all particles."
            )
        if len(temperatures) != 2 or not 0 < temperatures[0] <= temperatures[1] < math.inf:
            raise ValueError(f"temperatures={temperatures!r} must be a range of positive numbers, (low, high).")
        if buffer is not None and not replayed:
            raise ValueError("buffer= is given but replayed=0: nothing would be replayed. Set replayed=, e.g. 0.25.")
        self.tempered, self.replayed, self.sleep = float(tempered), float(replayed), float(sleep)
        self.prior = float(prior)
        self.temperatures = (float(temperatures[0]), float(temperatures[1]))
        self.buffer = ReplayBuffer() if buffer is None and replayed else buffer

    @property
    def on_policy(self) -> float:
        """Share of the particles drawn from the guide as it is."""
        return 1.0 - self.tempered - self.replayed - self.prior

    def plan(self, num_particles: int, given: int = 0) -> tuple[int, Tensor]:
        """How many particles to replay, and the temperature of each of the ``K``, ``(K,)``.

        :param given: how many come from elsewhere, behind those that are replayed.
        """
        offset, hot_offset = torch.rand(2).tolist()
        replayed = min(math.floor(self.replayed * num_particles + offset), num_particles - given)
        hot = min(math.floor(self.tempered * num_particles + hot_offset), num_particles - given - replayed)
        low, high = (math.log(t) for t in self.temperatures)
        temperatures = torch.ones(num_particles)
        first = replayed + given
        temperatures[first : first + hot] = (low + (high - low) * torch.rand(hot)).exp()
        return replayed, temperatures

    def draws_of_prior(self, num_particles: int) -> int:
        """How many particles the program draws."""
        return math.floor(self.prior * num_particles + torch.rand(()).item()) if self.prior else 0

    def simulates(self) -> bool:
        """Whether this step takes a simulated observation."""
        return self.sleep > 0 and torch.rand(()).item() < self.sleep

    def settings(self) -> dict[str, Any]:
        """The mix, and the buffer's own settings."""
        own = {k: getattr(self, k) for k in ("tempered", "replayed", "sleep", "temperatures")}
        own |= {"prior": self.prior} if self.prior else {}
        return {**own, **({} if self.buffer is None else self.buffer.settings())}

    def __repr__(self) -> str:
        parts = [f"on_policy={self.on_policy:.2g}"]
        if self.tempered:
            parts.append(f"tempered={self.tempered:.2g} at {self.temperatures[0]:g} to {self.temperatures[1]:g}")
        parts += [f"replayed={self.replayed:.2g} from {self.buffer!r}"] if self.replayed else []
        parts += [f"prior={self.prior:.2g}"] if self.prior else []
        parts += [f"sleep={self.sleep:.2g} of the steps"] if self.sleep else []
        return f"Behaviour({', '.join(parts)})"


def prior_draws(
    model: Program, args: tuple[Any, ...], kwargs: dict[str, Any], count: int, nesting: int
) -> dict[str, Tensor]:
    """Latents that a program draws, by site, ``(count,) + batch_shape + event_shape``."""
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(in_particles(model, count, nesting)).get_trace(*args, **kwargs)
    return {name: site["value"] for name, site in trace.nodes.items() if is_latent(site)}


def put(
    given: dict[str, Tensor], taken: Tensor, values: dict[str, Tensor], first: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Given values and which of them count, with others, ``(n,) + batch_shape + event_shape``, from ``first`` on."""
    count, found = len(taken), {}
    for name, own in values.items():
        whole = own.new_zeros((count, *own.shape[1:]))
        if name in given:
            whole = given[name].to(own).expand(whole.shape).clone()
        whole[first : first + len(own)] = own
        found[name] = whole
    taken = taken.clone()
    taken[first : first + len(own)] = True
    return found, taken


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
                drawn = fn.rows(slice(whole, None)).sample(temperature=heat[whole:])
                value[whole:] = torch.where(self._over(fn.event_dim)[whole:], value[whole:], drawn)
        else:
            value = fn.sample(temperature=heat) if is_text(msg) else fn.sample()
            if given is not None:
                value = torch.where(self._over(fn.event_dim), given.to(value.device), value)
        msg["value"], msg["done"] = value, True

    def _over(self, event_dim: int) -> Tensor:
        return self.taken.reshape(self.taken.shape + (1,) * event_dim)


def first_given(values: dict[str, Tensor], count: int, nesting: int) -> Mixed:
    """The first of ``count`` particles take given values, ``(n,) + batch_shape + event_shape`` by site; the guide draws
    the others."""
    given, taken = put({}, torch.zeros((count, *(1,) * nesting)) > 0, values, 0)
    return Mixed(torch.ones(count), given, taken)
