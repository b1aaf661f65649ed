"""Where an objective's particles come from: the guide, the guide at other temperatures, the program."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, random

from llmppl.text.declared import declared


class Behaviour:
    """A behaviour policy: where an objective's particles come from.

    What the stated shares leave is drawn from the guide itself. Shares that are no whole number of particles hold on
    average over the steps. Replayed values are given to each step: see :class:`TrajectoryBalance`.

    :param tempered: share of the particles that are drawn from the guide at other temperatures.
    :param sleep: share of the steps that take a simulated observation: latents and observations are drawn from the
        program, the observations take the place of the data, and the latents, an exact draw from their posterior, are
        the first particle.
    :param temperatures: their range; drawn log-uniformly, one a particle.
    :raises ValueError: shares outside [0, 1], temperatures that are not positive.
    """

    @declared
    def __init__(
        self, tempered: float = 0.0, sleep: float = 0.0, temperatures: tuple[float, float] = (0.7, 1.5)
    ) -> None:
        for name, share in (("tempered", tempered), ("sleep", sleep)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} is a share: it must lie between 0 and 1.")
        if len(temperatures) != 2 or not 0 < temperatures[0] <= temperatures[1] < math.inf:
            raise ValueError(f"temperatures={temperatures!r} must be a range of positive numbers, (low, high).")
        self.tempered, self.sleep = float(tempered), float(sleep)
        self.temperatures = (float(temperatures[0]), float(temperatures[1]))

    @property
    def on_policy(self) -> float:
        """Share of the particles drawn from the guide as it is."""
        return 1.0 - self.tempered

    def heats(self, key: Array, num_particles: int, first: int | Array = 0) -> Array:
        """The temperature of each of the ``K`` particles, ``(K,)``.

        :param first: the first particle that may be tempered; those before are not drawn from the guide.
        """
        offset_key, heat_key = random.split(key)
        count = jnp.floor(self.tempered * num_particles + random.uniform(offset_key))
        low, high = (math.log(t) for t in self.temperatures)
        drawn = jnp.exp(low + (high - low) * random.uniform(heat_key, (num_particles,)))
        place = jnp.arange(num_particles) - first
        return jnp.where((place >= 0) & (place < count), drawn, 1.0)

    def settings(self) -> dict[str, Any]:
        """The mix."""
        return {name: getattr(self, name) for name in ("tempered", "sleep", "temperatures")}

    def __repr__(self) -> str:
        parts = [f"on_policy={self.on_policy:.2g}"]
        if self.tempered:
            parts.append(f"tempered={self.tempered:.2g} at {self.temperatures[0]:g} to {self.temperatures[1]:g}")
        parts += [f"sleep={self.sleep:.2g} of the steps"] if self.sleep else []
        return f"Behaviour({', '.join(parts)})"
