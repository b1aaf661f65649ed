"""Plots of training and of posteriors. Needs numpy and matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from llmppl.history import History
    from llmppl.inference.posterior import Posterior


def plot_weights(posterior: Posterior, ax: Any = None) -> Any:
    """Normalised weights, largest first, one line a batch row, with the equal weight 1/K."""
    ax = _axes(ax)
    weights = np.sort(posterior.weights.reshape(posterior.num_samples, -1), 0)[::-1]
    ax.plot(np.arange(1, posterior.num_samples + 1), weights, marker=".", linewidth=1)
    ax.axhline(1 / posterior.num_samples, color="0.6", linestyle="--", label="equal weights")
    ax.set(xlabel="sample, by weight", ylabel="normalised weight", yscale="log")
    ax.legend()
    return ax


def plot_history(history: History, ax: Any = None) -> Any:
    """The ELBO of the training batches against steps, with its running mean; where there are evaluations
    the held-out gap with its standard error, on an axis of its own."""
    ax = _axes(ax)
    elbo = np.asarray(history.elbo, dtype=float)
    steps = np.arange(1, len(elbo) + 1)
    ax.plot(steps, elbo, color="0.7", linewidth=1, label="ELBO of the step")
    window = max(len(elbo) // 10, 1)
    if len(elbo) >= window:
        mean = np.convolve(elbo, np.ones(window) / window, mode="valid")
        ax.plot(steps[window - 1 :], mean, label=f"mean of {window} steps")
    ax.set(xlabel="step", ylabel="ELBO (nats)")
    lines = list(ax.get_lines())
    if history.evaluations:
        points = np.array([(item.step, item.gap, item.gap_error) for item in history.evaluations])
        at, gap, error = points[np.isfinite(points).all(1)].T
        right = ax.twinx()
        lines += right.plot(at, gap, color="C3", marker=".", label="held-out gap ± s.e.")
        right.fill_between(at, gap - error, gap + error, color="C3", alpha=0.2, linewidth=0)
        right.set(ylabel="gap (nats)", ylim=(np.min(gap - error, initial=0.0), None))
    ax.legend(handles=lines)
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6, 3.5))[1]
