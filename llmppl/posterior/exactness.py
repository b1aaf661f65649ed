"""What a guide's log-probability is exact for, and who may ask for what."""

from __future__ import annotations


def exactness_of(guide: object) -> str:
    """``"marginal"`` where a guide does not say; see :class:`~llmppl.Posterior`."""
    return getattr(guide, "exactness", "marginal")


def check_weights(guide: object) -> str:
    """The exactness of a guide whose samples have weights.

    :raises ValueError: ``"none"``.
    """
    exactness = exactness_of(guide)
    if exactness == "none":
        raise ValueError(
            f"{type(guide).__name__} has no exact density (exactness 'none'), so its samples have no weights."
        )
    return exactness


def scores_given(guide: object) -> bool:
    """Whether a guide scores values that it did not draw: by its marginal density; or, where it says so by an attribute
    ``scores_given``, given an order, parents or a trajectory that it draws from their law at these values."""
    return exactness_of(guide) == "marginal" or (
        exactness_of(guide) != "none" and getattr(guide, "scores_given", False)
    )


def check_scores_given(guide: object, what: str) -> None:
    """Refuse a guide whose density of values that it did not draw is unknown.

    :raises ValueError: naming its exactness.
    """
    exactness = check_weights(guide)
    if not scores_given(guide):
        raise ValueError(
            f"{what} needs the guide's density of values that it did not draw, and {type(guide).__name__} has none "
            f"(exactness {exactness!r}). Use a guide with exactness 'marginal', or a RefinementGuide."
        )


def check_share(defensive: float) -> None:
    """Refuse a share of the prior that leaves nothing to the guide.

    :raises ValueError: outside [0, 1).
    """
    if not 0 <= defensive < 1:
        raise ValueError(f"defensive={defensive} is a share of the samples: from 0 to below 1, e.g. 0.1.")
