"""What a training run reported."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from llmppl.display.plots import plot_history

HARD = ("floored", "skipped")
"""Counts that objectives without hard conditions do not report."""

COLUMNS = ("loss", "elbo", "log_evidence", "ess", "gradient_norm", "learning_rate", *HARD, "seconds")
"""Of every run."""

REPLAYED = ("staleness", "sampled")
"""Of runs with a replay buffer, beside those."""

COUNTS = (*HARD, "sampled")
"""Columns that are zero where nothing is said of them."""


@dataclass
class Evaluated:
    """One evaluation, means over the held-out observations, nats.

    :param gap: log Z − ELBO; see :class:`~llmppl.Evaluation` for what stands for log Z.
    :param gap_error: Monte Carlo standard error of the gap, for these observations.
    :param elbo, elbo_error: of the guide, with its standard error.
    :param log_evidence: the mean log Ẑ of this evaluation alone.
    :param ess: effective sample size, of ``num_samples``.
    :param kl_q_p: lower and upper estimate of KL(q‖p) on simulated observations; NaN without simulations.
    :param kl_p_q: the same of KL(p‖q).
    :param seconds: of the run at the end of this evaluation.
    :param gain, gain_error: mean of log q(z|x) − log p(z) over simulated pairs that training never sees, with its
        standard error; NaN without ``pairs``.
    :param impossible: share of the guide's draws that a hard condition of the program excludes. Where there are any,
        ELBO and gap are infinite, and the gain is what to look at.
    """

    step: int
    gap: float
    gap_error: float
    elbo: float
    elbo_error: float
    log_evidence: float
    ess: float
    kl_q_p: tuple[float, float]
    kl_p_q: tuple[float, float]
    seconds: float
    gain: float = math.nan
    gain_error: float = math.nan
    impossible: float = 0.0


@dataclass(repr=False)
class History:
    """What a training run reported at each step.

    :param loss: of the objective, for one observation.
    :param elbo: nats, mean over the step's observations; NaN where the objective reports none.
    :param log_evidence: nats, log of the mean weight of the step's on-policy particles, mean over observations; in
        expectation below log p(x). It is what a program that learns by EM raises.
    :param ess: effective sample size of the step's on-policy particles, mean over observations.
    :param gradient_norm: before clipping.
    :param seconds: since the start, without the pauses between a stop and its resumption.
    :param learning_rate: of the step.
    :param floored: joints of the step that counted as the balance objective's ``floor``.
    :param staleness: steps since the guide was what it was when it drew the step's replayed particles, in the mean;
        NaN where none was replayed.
    :param sampled: configurations of samplers that were taken into the replay buffer before the step.
    :param skipped: observations of the step of which no particle of wake-φ was possible.
    :param evaluations: on held-out data, where ``fit`` was given an :class:`~llmppl.Evaluation`.
    :param learned: names of the program's own parameters, where it has any that learn.
    :param readings: how often each pair of a simulated set is read in all; NaN of other data.
    :param parted: the step from which on the held-out gain was worse than its best while the loss went on falling.
    :param restored: the step whose parameters were put back where training stopped early.
    """

    loss: list[float] = field(default_factory=list)
    elbo: list[float] = field(default_factory=list)
    log_evidence: list[float] = field(default_factory=list)
    ess: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    floored: list[float] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)
    staleness: list[float] = field(default_factory=list)
    sampled: list[float] = field(default_factory=list)
    evaluations: list[Evaluated] = field(default_factory=list)
    learned: tuple[str, ...] = ()
    readings: float = math.nan
    parted: int | None = None
    restored: int | None = None

    def append(self, **values: float) -> None:
        """Add a step's numbers."""
        for name in (*COLUMNS, *REPLAYED):
            default = 0.0 if name in COUNTS else math.nan
            getattr(self, name).append(float(values.get(name, default)))

    def state_dict(self) -> dict[str, Any]:
        columns = {name: list(getattr(self, name)) for name in (*COLUMNS, *REPLAYED)}
        return {**columns, "evaluations": [asdict(item) for item in self.evaluations], "parted": self.parted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        steps = len(state["loss"])
        for name in (*COLUMNS, *REPLAYED):  # checkpoints of before a column was there have none of it
            setattr(self, name, list(state.get(name, [0.0 if name in COUNTS else math.nan] * steps)))
        self.parted = state["parted"]
        # In place: the evaluations of a run go on in this list.
        self.evaluations[:] = [Evaluated(**item) for item in state["evaluations"]]

    def __repr__(self) -> str:
        if not self.loss:
            return "History(no steps)"
        last = max(len(self.loss) // 5, 1)
        text = (
            f"History({len(self.loss)} steps in {self.seconds[-1]:.0f} s, mean of the last {last}: "
            f"loss {np.mean(self.loss[-last:]):.2f}"
        )
        known = ~np.isnan(self.elbo[-last:])
        if known.any():
            elbo, ess = (np.asarray(column[-last:])[known].mean() for column in (self.elbo, self.ess))
            text += f", ELBO {elbo:.2f} nats, ESS {ess:.1f}"
            if self.learned:
                evidence = np.asarray(self.log_evidence[-last:])[known].mean()
                text += f", log p̂ {evidence:.2f}; the program learned, too"
        if sum(self.floored):
            text += f"; {np.mean(self.floored):.3g} joints a step counted as the floor"
        if sum(self.skipped):
            text += f"; {sum(self.skipped):.0f} times no particle of an observation was possible, and it was skipped"
        if sum(self.sampled):
            text += f"; {sum(self.sampled):.0f} texts of samplers, replayed {np.nanmean(self.staleness):.1f} steps old"
        if self.evaluations:
            first, newest = self.evaluations[0], self.evaluations[-1]
            steps = f"at step {first.step}", f"at step {newest.step}"
            if not math.isnan(newest.gain):
                newest_gain = f"{newest.gain:.2f} ± {newest.gain_error:.2f}"
                text += f"; held-out gain {first.gain:.2f} nats {steps[0]}, {newest_gain} {steps[1]}"
            if math.isfinite(newest.gap):
                text += f"; held-out gap {first.gap:.2f} {steps[0]}, {newest.gap:.2f} {steps[1]}"
            elif newest.impossible:
                text += f"; {newest.impossible:.0%} of the held-out draws are impossible, so the gap is infinite"
        if self.readings > 1:
            text += f"; each pair read {self.readings:.1f} times"
        if self.parted is not None:
            text += f"; from step {self.parted} on the held-out gain fell while the loss went on falling"
        if self.restored is not None:
            text += f"; stopped early, the parameters are those of step {self.restored}"
        return text + ")"

    def plot(self, ax: Any = None) -> Any:
        """See :func:`llmppl.display.plots.plot_history`."""
        return plot_history(self, ax)
