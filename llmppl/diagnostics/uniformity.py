"""An exact test that numbers are uniform on (0, 1), with the band of their ECDF that belongs to it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MOST_POINTS = 100
ROUNDING = 1 + 1e-9
"""Tails that differ by less are equal: those of mirrored counts differ in the last digits."""


def ecdf_band(count: int, num_points: int, level: float) -> tuple[Array, Array, Array]:
    r"""Points and a band that the ECDF of uniform numbers leaves nowhere with probability ``level``.

    At each of the points :math:`i/n` it is the interval of a binomial count between equal tails; the
    tails are the largest with which the band holds at all points at once [1, sec. 2.2]. The joint
    probability is exact: counts between the points are independent Poisson ones given their sum, so
    that it is a chain of short convolutions.

    :param count: how many numbers.
    :param num_points: ``n``; the band has ``n - 1`` points inside (0, 1).
    :param level: of all points together; at least this, for counts are whole.
    :returns: points, lower and upper end as shares of ``count``, each ``(n - 1,)``.

    Reference

    [1] Säilynoja, Bürkner, Vehtari (2022), `Graphical test for discrete uniformity and its applications in
    goodness-of-fit evaluation and multiple sample comparison`.
    """
    low, high = _counts(_critical_tail(count, num_points, level), count, num_points)
    return _points(num_points), low / count, high / count


def uniformity_p_value(values: Array, num_points: int) -> float:
    """Probability that the ECDF of as many uniform numbers goes somewhere as far out as that of ``values``,
    far by the smallest binomial tail at the points of :func:`ecdf_band`.

    It is at most ``1 - level`` exactly if the ECDF leaves the band of that level.

    :param values: ``(S,)``, in (0, 1).
    """
    count = len(values)
    seen = np.searchsorted(np.sort(values), _points(num_points), side="right")
    return 1 - _inside(float(_tails(count, num_points)[seen, np.arange(num_points - 1)].min()), count, num_points)


def _points(num_points: int) -> Array:
    return np.arange(1, num_points) / num_points


@lru_cache(maxsize=16)
def _tails(count: int, num_points: int) -> Array:
    """Twice the smaller binomial tail that holds a count, ``(count + 1, n - 1)``."""
    from scipy import stats  # slow to import

    counts, points = np.arange(count + 1)[:, None], _points(num_points)
    return np.asarray(2 * np.minimum(stats.binom.cdf(counts, count, points), stats.binom.sf(counts - 1, count, points)))


def _counts(tail: float, count: int, num_points: int) -> tuple[Array, Array]:
    """The smallest and largest counts at each point whose tails are larger than ``tail``."""
    fits = _tails(count, num_points) > tail * ROUNDING
    none = ~fits.any(0)
    return np.where(none, 1, fits.argmax(0)), np.where(none, 0, count - fits[::-1].argmax(0))


def _inside(tail: float, count: int, num_points: int) -> float:
    """Probability that the tails of the counts of uniform numbers are all larger than ``tail``."""
    from scipy import stats  # slow to import

    low, high = _counts(tail, count, num_points)
    if (low > high).any():
        return 0.0
    rate = count / num_points
    steps = stats.poisson.pmf(np.arange(count + 1), rate)
    reached, first = np.ones(1), 0
    for below, above in zip(low, high, strict=True):
        spread = np.convolve(reached, steps[: above - first + 1])  # both bounds grow from point to point
        reached, first = spread[below - first : above - first + 1], below
        if not len(reached):
            return 0.0
    rest = count - first - np.arange(len(reached))
    total = float((reached * stats.poisson.pmf(rest, rate)).sum())
    return min(total / float(stats.poisson.pmf(count, count)), 1.0)


@lru_cache(maxsize=256)
def _critical_tail(count: int, num_points: int, level: float) -> float:
    """The largest tail with which the band still has its level; 0 where every count must be inside."""
    tails = np.unique(_tails(count, num_points))
    low, high = 0, len(tails)  # tails[:low] keep the level, tails[high:] do not
    while low < high:
        middle = (low + high) // 2
        if _inside(float(tails[middle]), count, num_points) >= level:
            low = middle + 1
        else:
            high = middle
    return float(tails[low - 1]) if low else 0.0
