"""Bounds of the log evidence from both sides, and of both divergences, as numbers. Needs numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llmppl.display.plots import plot_ladder


class Estimate(NamedTuple):
    """A mean over simulated observations and its standard error, nats."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"


@dataclass(frozen=True, repr=False)
class Bounds:
    r"""What ``K`` particles of a guide say of log Z(x) and of the divergences.

    Each array holds one number for each observation, nats. Of observations that were not simulated there
    is no exact posterior draw: ``upper`` and ``exact_log_weight`` are ``None``, and so is what needs them.

    :param lower: log Ẑ of ``K`` particles, below log Z in expectation.
    :param upper: the same with the simulated latents as one of the ``K``, above log Z in expectation.
    :param elbo: mean log-weight of independent draws of the guide.
    :param exact_log_weight: log-weight of the simulated latents, which are exact posterior draws.
    :param num_samples: ``K``.
    :param method: ``"importance"`` or ``"smc"``.
    """

    lower: np.ndarray
    upper: np.ndarray | None
    elbo: np.ndarray
    exact_log_weight: np.ndarray | None
    num_samples: int
    method: str = "importance"

    @property
    def log_evidence(self) -> tuple[Estimate, Estimate | None]:
        """Lower and upper bound of log Z(x), mean over the observations."""
        return _estimate(self.lower), None if self.upper is None else _estimate(self.upper)

    @property
    def kl_q_p(self) -> tuple[Estimate, Estimate | None]:
        """Lower and upper bound of KL(q‖p(z|x)) = log Z − ELBO."""
        upper = None if self.upper is None else _estimate(self.upper - self.elbo)
        return _estimate(self.lower - self.elbo), upper

    @property
    def kl_p_q(self) -> tuple[Estimate, Estimate]:
        """Lower and upper bound of KL(p(z|x)‖q) = E_p log w − log Z.

        :raises ValueError: observations that were not simulated; so does :attr:`kl_sum`.
        """
        exact, upper = self._simulated("kl_p_q")
        return _estimate(exact - upper), _estimate(exact - self.lower)

    @property
    def kl_sum(self) -> Estimate:
        """KL(q‖p) + KL(p‖q): unbiased, since log Z cancels."""
        exact, _ = self._simulated("kl_sum")
        return _estimate(exact - self.elbo)

    def plot(self, ax: Any = None) -> Any:
        """The ladder of bounds; see :func:`llmppl.display.plots.plot_ladder`."""
        return plot_ladder(self, ax=ax)

    def _simulated(self, what: str) -> tuple[np.ndarray, np.ndarray]:
        if self.exact_log_weight is None or self.upper is None:
            raise ValueError(
                f"{what} needs an exact posterior draw, and these observations were not simulated. Use simulations=1."
            )
        return self.exact_log_weight, self.upper

    def __repr__(self) -> str:
        low, high = self.log_evidence
        by = f"{self.num_samples} samples each" + (" by SMC" if self.method == "smc" else "")
        if high is None:
            return (
                f"Bounds({self.lower.size} observations as given, {by}: log Z at least {low}, KL(q‖p) at least "
                f"{self.kl_q_p[0]} nats. No upper bound: it needs an exact posterior draw, which only simulated "
                "observations have)"
            )
        return (
            f"Bounds({self.lower.size} simulated observations, {by}: "
            f"log Z {low} to {high}, KL(q‖p) {self.kl_q_p[0]} to {self.kl_q_p[1]}, "
            f"KL(p‖q) {self.kl_p_q[0]} to {self.kl_p_q[1]}, their sum {self.kl_sum} nats)"
        )

    @staticmethod
    def join(parts: Sequence[Bounds]) -> Bounds:
        """The simulated observations of several calls as one."""
        names = ("lower", "upper", "elbo", "exact_log_weight")
        columns: dict[str, Any] = {
            name: None if getattr(parts[0], name) is None else np.concatenate([getattr(part, name) for part in parts])
            for name in names
        }
        return Bounds(**columns, num_samples=parts[0].num_samples, method=parts[0].method)


def _estimate(values: np.ndarray) -> Estimate:
    with np.errstate(invalid="ignore"):  # an infinite upper bound has no error
        error = values.std(ddof=1) / math.sqrt(values.size) if values.size > 1 else math.nan
    return Estimate(float(values.mean()), float(error))
