"""The floor of the balance objectives: nats that stand for a joint of probability zero."""

from __future__ import annotations

import math


def checked_floor(floor: float | None) -> float | None:
    """A floor as an objective takes it.

    :raises ValueError: one that is not negative or not finite.
    """
    if floor is None or -math.inf < floor < 0:
        return floor
    raise ValueError(
        f"floor={floor} must be a negative number of nats, far below every joint that is possible, e.g. -100.0."
    )
