"""Plots: what they draw is what they were given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection

from llmppl.display.plots import plot_calibration, plot_gaps, plot_history, plot_ladder, plot_tail, plot_weights
from llmppl.posterior.brackets import Bounds
from llmppl.posterior.posterior import Posterior
from llmppl.training.history import Evaluated, History


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def weighted(log_weights: np.ndarray, **more: Any) -> Posterior:
    return Posterior({"z": np.zeros(log_weights.shape)}, log_weights, log_weights, **more)


def labels(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_axes_given_are_drawn_on_and_returned() -> None:
    posterior = weighted(np.log(np.arange(1.0, 101.0)))
    calls: list[Callable[[Any], Any]] = [
        lambda ax: plot_weights(posterior, ax),
        lambda ax: plot_tail(posterior, ax),
        lambda ax: plot_ladder(bracket(), ax=ax),
        lambda ax: plot_gaps(GapReport(gaps(1, 1), None), ax),
        lambda ax: plot_calibration(Calibration(np.linspace(0.01, 0.99, 50)), "length", ax),
        lambda ax: plot_history(History(elbo=[1.0, 2.0]), ax),
    ]
    for call in calls:
        _, ax = plt.subplots()
        assert call(ax) is ax
        assert ax.has_data()


def test_weights_are_sorted_and_one_line_a_row() -> None:
    log_weights = np.random.default_rng(0).normal(size=(30, 2))
    ax = plot_weights(weighted(log_weights))
    lines = [line.get_ydata() for line in ax.get_lines()[:2]]
    np.testing.assert_allclose(np.sum(lines, 1), 1.0)
    assert all((np.diff(line) <= 0).all() for line in lines)
    assert weighted(log_weights).plot().get_ylabel() == "normalised weight"


@pytest.mark.parametrize(("shape", "word"), [(0.3, "(reliable)"), (1.2, "(not reliable)")])
def test_the_fitted_tail_goes_through_the_weights_it_was_fitted_to(shape: float, word: str) -> None:
    weights = np.random.default_rng(3).pareto(1 / shape, size=2000) + 1
    posterior = weighted(np.log(weights) - 80)
    ax = plot_tail(posterior)
    drawn = {line.get_label(): line for line in ax.get_lines()}
    points = next(line for label, line in drawn.items() if "largest" in label)
    fit = next(line for label, line in drawn.items() if label.startswith("fit"))
    assert f"k̂ = {posterior.khat:.2f} {word}" in fit.get_label()
    # A Pareto law's own survival function, in units of the mean weight.
    at, share = (np.asarray(part) for part in fit.get_data())
    truth = (at * weights.mean()) ** (-1 / shape)
    common = share > 0.01  # 20 of the 2000 weights: they scatter by a quarter
    np.testing.assert_allclose(np.log(share[common]), np.log(truth[common]), atol=0.25)
    x, y = (np.asarray(part) for part in points.get_data())
    np.testing.assert_allclose(np.sort(x), np.sort(weights)[-len(x) :] / weights.mean())
    np.testing.assert_allclose(y, np.arange(1, len(y) + 1) / 2000)


@pytest.mark.parametrize(
    ("log_weights", "said"),
    [(np.zeros(100), "k̂ = -∞: no tail"), (np.zeros(4), "k̂ = nan: too few samples"), (np.eye(60)[0] * 9, "k̂ = ∞")],
)
def test_where_there_is_no_tail_the_legend_says_why(log_weights: np.ndarray, said: str) -> None:
    assert any(said in label for label in labels(plot_tail(weighted(log_weights))))


def test_a_tail_is_of_one_rows_importance_weights() -> None:
    with pytest.raises(ValueError, match="one row"):
        plot_tail(weighted(np.zeros((9, 2))))
    with pytest.raises(ValueError, match="by smc"):
        plot_tail(weighted(np.zeros(9), method="smc"))


def bracket() -> Bounds:
    level = np.random.default_rng(0).normal(0, 5, size=40)
    return Bounds(lower=level - 1, upper=level + 1, elbo=level - 3, exact_log_weight=level, num_samples=8)


def test_the_ladder_has_its_rungs_at_the_means_with_paired_errors() -> None:
    bounds = bracket()
    ax = plot_ladder(bounds, log_evidence=float(bounds.lower.mean()) + 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ELBO", "lower bound", "upper bound"]
    for values in (bounds.elbo, bounds.lower, bounds.upper):
        assert f"{values.mean():.2f} ± {values.std(ddof=1) / 40**0.5:.2f}" in texts(ax)
    # Thin bars move with the observations; the thick ones, of a distance that is the same for all, do not.
    bars = [np.ptp(line.get_segments()[0][:, 0]) for line in ax.collections if hasattr(line, "get_segments")]
    np.testing.assert_allclose([bars[0], bars[2], bars[3]], 2 * bounds.lower.std(ddof=1) / 40**0.5)
    np.testing.assert_allclose([bars[1], bars[4]], 0, atol=1e-12)
    assert labels(ax) == ["log Z lies here", "log Z"]


def test_without_simulated_data_the_upper_rung_says_so() -> None:
    bounds = bracket()
    object.__setattr__(bounds, "upper", None)
    ax = plot_ladder(bounds)
    assert "not available: not simulated" in texts(ax)
    assert ax.get_legend() is None


def test_rungs_without_a_finite_number_say_what_they_have() -> None:
    bounds = bracket()
    object.__setattr__(bounds, "elbo", np.full(40, np.nan))
    bounds.upper[3] = np.inf
    drawn = texts(plot_ladder(bounds))
    assert len(drawn) == 3
    assert "nan" in drawn
    assert "∞" in drawn


class Estimate(NamedTuple):
    value: float
    error: float


@dataclass
class Gaps:
    approximation: np.ndarray
    amortization: np.ndarray

    @property
    def inference(self) -> np.ndarray:
        return self.approximation + self.amortization

    def mean(self, name: str) -> Estimate:
        values = getattr(self, name)
        return Estimate(float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5))


@dataclass
class GapReport:
    train: Gaps
    held_out: Gaps | None
    certified: bool = False


def gaps(approximation: float, amortization: float) -> Gaps:
    noise = np.linspace(-0.1, 0.1, 9)
    return Gaps(approximation + noise, amortization + noise)


def test_gaps_stack_to_the_whole() -> None:
    ax = plot_gaps(GapReport(gaps(2, 1), gaps(2, 3)))
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_y(), bar.get_height()) for bar in ax.patches]
    np.testing.assert_allclose(bars, [(0, 0, 2), (0, 2, 1), (1, 0, 2), (1, 2, 3)])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["training", "held out"]
    assert ax.get_ylabel() == "gap, at least (nats)"
    assert plot_gaps(GapReport(gaps(2, 1), None, certified=True)).get_ylabel() == "gap (nats)"


def test_a_part_below_zero_does_not_hide_the_other() -> None:
    ax = plot_gaps(GapReport(gaps(2, -0.5), None))
    np.testing.assert_allclose([(bar.get_y(), bar.get_height()) for bar in ax.patches], [(0, 2), (0, -0.5)])


class Calibration:
    names = ("length",)
    level = 0.95

    def __init__(self, ranks: np.ndarray) -> None:
        self.ranks = {"length": ranks}

    def p_value(self, name: str) -> float:
        return 0.4

    def band(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        points = np.linspace(0, 1, 11)
        return points, np.maximum(points - 0.2, 0), np.minimum(points + 0.2, 1)


def test_calibration_draws_the_ecdf_less_uniform_and_its_band() -> None:
    ranks = np.array([0.9, 0.2, 0.4, 0.3])
    ax = plot_calibration(Calibration(ranks), "length")
    curve = ax.get_lines()[0]
    at, difference = (np.asarray(part) for part in curve.get_data())
    # Before and after each step of the ECDF.
    np.testing.assert_allclose(at, [0, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.9, 0.9, 1])
    np.testing.assert_allclose(difference, [0, -0.2, 0.05, -0.05, 0.2, 0.1, 0.35, -0.15, 0.1, 0], atol=1e-12)
    (band,) = (item for item in ax.collections if isinstance(item, FillBetweenPolyCollection))
    box = band.get_paths()[0].get_extents()
    np.testing.assert_allclose([box.y0, box.y1], [-0.2, 0.2])
    assert labels(ax) == ["95% band", "length, p = 0.4"]
    with pytest.raises(ValueError, match="name='beauty' is none"):
        plot_calibration(Calibration(ranks), "beauty")


def test_the_training_history_has_the_gaps_band() -> None:
    found = [
        Evaluated(
            **{
                **dict.fromkeys(Evaluated.__dataclass_fields__, 0),
                "step": n,
                "gap": 3.0 - n,
                "gap_error": 0.5,
                "gain": math.nan,
            }
        )
        for n in (1, 2)
    ]
    ax = plot_history(History(elbo=[-9.0, -8.0, -7.0], evaluations=found))
    assert "held-out gap ± s.e." in labels(ax)
    right = ax.figure.axes[1]
    box = right.collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose([box.y0, box.y1], [0.5, 2.5])
