"""How many samples importance sampling takes: its blocks, and when the error is small enough. Needs numpy only."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from llmppl.posterior.posterior import Array

BLOCK = 64
"""Particles that are drawn and scored together, at most."""

FEWEST = 2 * BLOCK
"""Samples before an early stop is thought of."""


def plan(num_samples: int, block: int) -> Iterator[tuple[int, bool]]:
    """How many particles each block has, and whether stopping is decided on behind it. Where it is decided
    does not depend on the blocks, lest memory change the law of the result."""
    drawn = 0
    while drawn < num_samples:
        count = min(block, BLOCK - drawn % BLOCK, num_samples - drawn)
        drawn += count
        yield count, drawn % BLOCK == 0 and drawn >= FEWEST


class RunningError:
    """Standard error of the log evidence, as :attr:`Posterior.log_evidence_error` has it, from running sums."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Array | float = -math.inf  # log Σ w
        self.second: Array | float = -math.inf  # log Σ w²

    def add(self, log_weights: Array) -> None:
        self.count += len(log_weights)
        self.first = np.logaddexp(self.first, np.logaddexp.reduce(log_weights))
        self.second = np.logaddexp(self.second, np.logaddexp.reduce(2 * log_weights))

    def of_rows(self) -> Array:
        """For each observation; infinite while it has no positive weight."""
        first, second = np.asarray(self.first), np.asarray(self.second)
        positive = np.isfinite(first)
        squares = np.exp(np.where(positive, second, 0.0) - 2 * np.where(positive, first, 0.0))
        error = np.sqrt(np.maximum(squares * self.count - 1, 0) / max(self.count - 1, 1))
        return np.where(positive & (self.count > 1), error, math.inf)

    def largest(self) -> float:
        return float(self.of_rows().max())


def check_target(target_error: float, num_samples: int) -> None:
    """Refuse an error that cannot be aimed at.

    :raises ValueError: not a positive number of nats, or too few samples to decide on it.
    """
    if isinstance(target_error, bool) or not 0 < target_error < math.inf:
        raise ValueError(
            f"target_error={target_error!r} must be a positive number of nats, e.g. 0.1. Leave it out to draw all "
            "num_samples."
        )
    if num_samples < FEWEST:
        raise ValueError(
            f"target_error= is decided on from {FEWEST} samples on, and num_samples={num_samples} is the most that "
            "are drawn. Raise num_samples, or leave target_error out."
        )
