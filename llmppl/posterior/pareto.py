"""The tail of importance weights: Pareto k̂. Needs numpy only."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FEWEST_TAIL = 5


def pareto_k(log_weights: NDArray[np.floating]) -> float:
    """Shape k̂ of a generalised Pareto law fitted to the largest weights.

    The tail holds the min(K/5, 3√K) largest weights (Vehtari, Simpson, Gelman, Yao, Gabry 2024,
    Pareto smoothed importance sampling); the fit is that of Zhang and Stephens (2009) with the weak
    prior of the former paper.

    :param log_weights: ``(K,)``, nats.
    :returns: k̂; −inf where the largest weights are all equal (a guide that is the posterior): there is
        no tail; +inf where fewer than 5 weights stand out above equal ones; NaN where there are too few
        samples for a tail, or no weight is positive.
    """
    tail = pareto_tail(log_weights)
    return tail if isinstance(tail, float) else tail.shape


class Tail(NamedTuple):
    """A generalised Pareto law of the weights above a cutoff, in units of the largest weight."""

    shape: float
    scale: float
    cutoff: float
    size: int


def pareto_tail(log_weights: NDArray[np.floating]) -> Tail | float:
    """The fit behind :func:`pareto_k`, or what :func:`pareto_k` returns where there is none.

    :param log_weights: ``(K,)``, nats.
    """
    values = np.sort(np.asarray(log_weights, dtype=np.float64))
    values = values[values > -np.inf]  # a weight of zero is no part of any tail
    count = int(np.ceil(min(0.2 * len(values), 3 * math.sqrt(len(values)))))
    if count < FEWEST_TAIL or not np.isfinite(values).all():
        return math.nan
    # Rounding in the log-weights (1e-5 relative in float32) is no spread.
    if values[-1] - values[0] < 1e-4:
        return -math.inf
    cutoff = float(np.exp(values[-count - 1] - values[-1]))
    excess = np.exp(values[-count:] - values[-1]) - cutoff
    if excess[-1] <= 1e-12:
        return -math.inf
    excess = excess[excess > 1e-12]  # ties with the cutoff are no tail
    if len(excess) < FEWEST_TAIL:
        return math.inf
    return Tail(*_fit(excess), cutoff, len(excess))


def _fit(excess: NDArray[np.float64]) -> tuple[float, float]:
    """Zhang and Stephens' (2009) estimate of shape and scale from sorted excesses."""
    n = len(excess)
    grid = 30 + int(math.sqrt(n))
    quartile = excess[int(n / 4 + 0.5) - 1]
    steps = np.arange(1, grid + 1) - 0.5
    theta = 1 / excess[-1] + (1 - np.sqrt(grid / steps)) / (3 * quartile)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        shapes = np.log1p(-theta[:, None] * excess).mean(1)
        profile = n * (np.log(-theta / shapes) - shapes - 1)
        posterior = 1 / np.exp(profile - profile[:, None]).sum(1)
    posterior = np.where(np.isfinite(posterior), posterior, 0.0)
    posterior /= posterior.sum()
    mean = (theta * posterior).sum()
    shape = float(np.log1p(-mean * excess).mean())
    return (n * shape + 10 * 0.5) / (n + 10), float(-shape / mean)
