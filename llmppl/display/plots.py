"""Plots of training, of posteriors and of diagnostics. Needs numpy and matplotlib.

Each takes axes to draw on, or makes its own, and returns them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmppl.display.protocols import Gaps, Ladder, Ranks, Samples, TrainingRun

# Told apart by hue and by lightness, and readable on white and on black.
BLUE, ORANGE, GREY = "#2f7fd1", "#d9772b", "#8a8f98"


def plot_weights(posterior: Samples, ax: Any = None) -> Any:
    """Normalised weights, largest first, one line a batch row, with the equal weight 1/K."""
    ax = _axes(ax)
    weights = np.sort(posterior.weights.reshape(posterior.num_samples, -1), 0)[::-1]
    ax.plot(np.arange(1, posterior.num_samples + 1), weights, marker=".", linewidth=1)
    ax.axhline(1 / posterior.num_samples, color=GREY, linestyle="--", label="equal weights")
    ax.set(xlabel="sample, by weight", ylabel="normalised weight", yscale="log")
    ax.legend()
    return ax


def plot_tail(posterior: Samples, ax: Any = None) -> Any:
    """How often a weight exceeds a value, against the generalised Pareto law that k̂ is the shape of.

    A straight line on these axes is a heavy tail; above k̂ = 0.7 the largest weights to come outweigh all
    those seen.

    :raises ValueError: a posterior with batch rows, or without weights that k̂ is for.
    """
    if posterior.batch_shape:
        raise ValueError("plot_tail() needs a posterior without batch rows. Ask for one row: posterior.row(0).")
    if posterior.method != "importance":
        raise ValueError(
            f"plot_tail() is for weights of importance sampling, and these samples are by {posterior.method}."
        )
    ax = _axes(ax)
    log_weights = np.sort(posterior.log_weights)[::-1]
    relative = np.exp(log_weights - log_weights[0])
    relative = relative[relative > 0]
    above = np.arange(1, len(relative) + 1) / posterior.num_samples
    unit = posterior.num_samples / np.exp(log_weights - log_weights[0]).sum()  # 1 / mean weight
    tail = posterior.tail
    count = 0 if isinstance(tail, float) else tail.size
    shown = slice(count, max(4 * count, 50))
    ax.plot(unit * relative[shown], above[shown], ".", color=GREY, label="other weights")
    if isinstance(tail, float):
        reason = {True: "too few samples for a tail", False: "no tail to fit"}[math.isnan(tail)]
        ax.plot([], [], " ", label=f"k̂ = {tail:.2f}: {reason}".replace("inf", "∞"))
    else:
        ax.plot(unit * relative[:count], above[:count], "o", markersize=4, color=BLUE, label=f"{count} largest")
        values = np.geomspace(tail.cutoff, 3.0, 200)
        share = count / posterior.num_samples * _survival(values - tail.cutoff, tail.shape, tail.scale)
        seen = share > 0.2 / posterior.num_samples
        verdict = "reliable" if tail.shape < 0.7 else "not reliable"
        ax.plot(unit * values[seen], share[seen], color=ORANGE, label=f"fit, k̂ = {tail.shape:.2f} ({verdict})")
    ax.set(xlabel="weight / mean weight", ylabel="share of weights above", xscale="log", yscale="log")
    ax.legend(loc="lower left")
    return ax


def _survival(excess: np.ndarray, shape: float, scale: float) -> np.ndarray:
    """P(X > excess) of the generalised Pareto law."""
    if abs(shape) < 1e-9:
        return np.exp(-excess / scale)
    return np.maximum(1 + shape * excess / scale, 0.0) ** (-1 / shape)


def plot_ladder(bounds: Ladder, log_evidence: float | None = None, ax: Any = None) -> Any:
    """The ladder ELBO ≤ lower bound ≤ log Z ≤ upper bound, means over the observations.

    The thin bar is the standard error of the mean over observations, which moves all rungs together; the
    thick one is that of the distance to the lower bound. Without an upper bound (data that were not
    simulated) its rung says so.

    :param log_evidence: the exact mean log Z, where it is known, nats.
    """
    ax = _axes(ax)
    rungs = {"ELBO": bounds.elbo, "lower bound": bounds.lower, "upper bound": bounds.upper}
    means = {name: math.nan if values is None else _mean(values)[0] for name, values in rungs.items()}
    finite = [mean for mean in means.values() if math.isfinite(mean)]
    for height, (name, values) in enumerate(rungs.items()):
        if not math.isfinite(means[name]):
            # By SMC there is no ELBO; a guide that cannot draw a posterior text has an infinite upper bound.
            said = "not available: not simulated" if values is None else f"{means[name]:.2f}".replace("inf", "∞")
            ax.annotate(said, (np.mean(finite or [0.0]), height), ha="center", va="center", style="italic")
            continue
        assert values is not None
        mean, error = _mean(values)
        ax.errorbar(mean, height, xerr=_shown(error), color=BLUE, linewidth=1, capsize=4)
        if name != "lower bound":
            ax.errorbar(mean, height, xerr=_shown(_mean(values - bounds.lower)[1]), color=BLUE, linewidth=5, alpha=0.5)
        ax.plot(mean, height, "o", color=BLUE)
        own = f"{mean:.2f}" + (f" ± {error:.2f}" if math.isfinite(error) else "")
        ax.annotate(own, (mean, height), xytext=(0, 8), textcoords="offset points", ha="center")
    low, high = means["lower bound"], means["upper bound"]
    if math.isfinite(low) and math.isfinite(high):
        ax.axvspan(low, high, color=ORANGE, alpha=0.25, linewidth=0, label="log Z lies here")
    if log_evidence is not None:
        ax.axvline(log_evidence, color=ORANGE, label="log Z")
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="lower right")
    count = np.size(bounds.lower)
    ax.set(xlabel=f"nats, mean over {count} observations", yticks=range(3), yticklabels=rungs, ylim=(-0.5, 2.6))
    ax.margins(x=0.25)
    return ax


def plot_gaps(report: Gaps, ax: Any = None) -> Any:
    """The inference gap as a stack: what the family cannot express (approximation) and what amortization
    costs, means over observations with the standard error of the whole."""
    ax = _axes(ax)
    sets = {"training": report.train} | ({} if report.held_out is None else {"held out": report.held_out})
    for place, gaps in enumerate(sets.values()):
        approximation, amortization = (gaps.mean(name).value for name in ("approximation", "amortization"))
        whole = gaps.mean("inference")
        first = place == 0
        ax.bar(place, approximation, 0.5, color=BLUE, label="approximation" if first else None)
        # Estimates can be below zero: a negative part hangs from zero and does not hide the other.
        bottom = approximation if approximation * amortization > 0 else 0.0
        ax.bar(
            place,
            amortization,
            0.5,
            bottom=bottom,
            color=ORANGE,
            hatch="//",
            edgecolor="white",
            linewidth=0,
            label="amortization" if first else None,
        )
        ax.errorbar(
            place,
            whole.value,
            yerr=_shown(whole.error),
            color=GREY,
            marker="D",
            markersize=4,
            capsize=5,
            linestyle="none",
            label="inference gap ± s.e." if first else None,
        )
    ax.axhline(0, color=GREY, linewidth=0.8)
    ylabel = "gap (nats)" if report.certified else "gap, at least (nats)"
    ax.set(xticks=range(len(sets)), xticklabels=sets, ylabel=ylabel, xlim=(-0.6, len(sets) - 0.4))
    ax.legend()
    return ax


def plot_calibration(calibration: Ranks, name: str, ax: Any = None) -> Any:
    """Simulation-based calibration of one functional: the ranks' ECDF less that of uniform ranks, with the
    simultaneous band that it stays in if the posterior is right (Säilynoja, Bürkner, Vehtari 2022).

    :param name: one of ``calibration.names``.
    :raises ValueError: another name.
    """
    if name not in calibration.names:
        raise ValueError(f"name={name!r} is none of the calibration's functionals: {sorted(calibration.names)}.")
    ax = _axes(ax)
    ranks = np.sort(np.asarray(calibration.ranks[name], dtype=float))
    points, lower, upper = (np.asarray(part, dtype=float) for part in calibration.band(name))
    ax.fill_between(
        points,
        lower - points,
        upper - points,
        color=GREY,
        alpha=0.3,
        linewidth=0,
        label=f"{calibration.level:.0%} band",
    )
    ecdf = np.arange(len(ranks) + 1) / len(ranks)
    edges = np.concatenate([[0.0], ranks, [1.0]])
    # A step function less a line: both ends of every step.
    at = np.repeat(edges, 2)[1:-1]
    difference = np.repeat(ecdf, 2) - at
    ax.plot(at, difference, color=BLUE, linewidth=1.5, label=f"{name}, p = {calibration.p_value(name):.2g}")
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set(xlabel="normalised rank", ylabel="ECDF − uniform", xlim=(0, 1))
    # Above the axes: band and curve leave no corner free.
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return ax


def plot_history(history: TrainingRun, ax: Any = None) -> Any:
    """The ELBO of the training batches against steps, with its running mean; where none was reported (simulated pairs
    have none) the loss. Where there are evaluations the held-out gain with its standard error, or else the gap, on an
    axis of its own."""
    ax = _axes(ax)
    elbo = np.asarray(history.elbo, dtype=float)
    name = "ELBO"
    if len(elbo) and np.isnan(elbo).all():
        elbo, name = np.asarray(history.loss, dtype=float), "loss"
    steps = np.arange(1, len(elbo) + 1)
    ax.plot(steps, elbo, color="0.7", linewidth=1, label=f"{name} of the step")
    window = max(len(elbo) // 10, 1)
    if len(elbo) >= window:
        mean = np.convolve(elbo, np.ones(window) / window, mode="valid")
        ax.plot(steps[window - 1 :], mean, label=f"mean of {window} steps")
    ax.set(xlabel="step", ylabel=f"{name} (nats)")
    lines = list(ax.get_lines())
    if history.evaluations:
        gains = any(math.isfinite(item.gain) for item in history.evaluations)
        what = "gain" if gains else "gap"
        points = np.array(
            [(item.step, getattr(item, what), getattr(item, f"{what}_error")) for item in history.evaluations]
        )
        at, value, error = points[np.isfinite(points).all(1)].T
        right = ax.twinx()
        lines += right.plot(at, value, color="C3", marker=".", label=f"held-out {what} ± s.e.")
        right.fill_between(at, value - error, value + error, color="C3", alpha=0.2, linewidth=0)
        right.set(ylabel=f"{what} (nats)", ylim=(np.min(value - error, initial=0.0), None))
    ax.legend(handles=lines)
    return ax


def _mean(values: np.ndarray) -> tuple[float, float]:
    """A mean and its standard error, NaN of a single value."""
    values = np.atleast_1d(np.asarray(values, dtype=float))
    spread = np.isfinite(values).all() and values.size > 1
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size)) if spread else math.nan


def _shown(error: float) -> float | None:
    """An error bar's length; none where the error is unknown."""
    return error if math.isfinite(error) else None


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6, 3.5))[1]
