"""What a gap report holds: the parts of the inference gap at each observation, and their reading."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmppl.display.plots import plot_gaps
from llmppl.posterior.brackets import Estimate

PARTS = ("inference", "approximation", "amortization")


@dataclass(frozen=True, repr=False)
class Gaps:
    r"""The gaps of a guide at ``N`` observations, nats; every array has shape ``(N,)`` but ``start_elbo``.

    :param log_evidence: log Z, or what stands for it.
    :param log_evidence_error: its Monte Carlo standard error; zero where exact.
    :param elbo: of the guide as it is.
    :param best_elbo: of the best member of its family that was found for each x alone, from latents that
        had no part in finding it.
    :param elbo_error, best_elbo_error: their Monte Carlo standard errors.
    :param starts: the candidates for the best member: the guide itself, then each start of a fit.
    :param start_elbo: ELBO by which they were compared, ``(len(starts), N)``. The largest is biased
        upwards, hence ``best_elbo``.
    :param best_start: index of the one chosen.
    """

    log_evidence: np.ndarray
    log_evidence_error: np.ndarray
    elbo: np.ndarray
    elbo_error: np.ndarray
    best_elbo: np.ndarray
    best_elbo_error: np.ndarray
    starts: tuple[str, ...]
    start_elbo: np.ndarray
    best_start: np.ndarray

    @property
    def inference(self) -> np.ndarray:
        """log Z − ELBO of the guide: the sum of the other two."""
        return self.log_evidence - self.elbo

    @property
    def approximation(self) -> np.ndarray:
        """log Z − ELBO of the family's best member for each x."""
        return self.log_evidence - self.best_elbo

    @property
    def amortization(self) -> np.ndarray:
        """What the one guide for all x loses against the best member for each."""
        return self.best_elbo - self.elbo

    def mean(self, name: str) -> Estimate:
        """Mean over x, with its standard error over x (NaN for a single one).

        :param name: of a gap or another array of shape ``(N,)``.
        """
        values = getattr(self, name)
        error = values.std(ddof=1) / math.sqrt(values.size) if values.size > 1 else math.nan
        return Estimate(float(values.mean()), float(error))

    def __len__(self) -> int:
        return self.elbo.size

    def __repr__(self) -> str:
        return f"Gaps({len(self)} x: {', '.join(f'{part} {self.mean(part)}' for part in PARTS)} nats)"


@dataclass(frozen=True, repr=False)
class GapReport:
    """The gaps of a guide on what it was trained on and on what it was not; see :func:`gap_report`.

    :param certified: whether log Z is exact for every x.
    :param source: where log Z comes from.
    """

    train: Gaps
    held_out: Gaps | None
    certified: bool
    source: str

    def __repr__(self) -> str:
        columns = [("train", self.train)] + ([] if self.held_out is None else [("held out", self.held_out)])
        rows = [["", *(name for name, _ in columns)]]
        rows += [[part, *(_shown(gaps.mean(part)) for _, gaps in columns)] for part in PARTS]
        widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
        table = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([f"GapReport({self._head()})", *(line.rstrip() for line in table), *self.reading()])

    def _repr_html_(self) -> str:
        columns = [("train", self.train)] + ([] if self.held_out is None else [("held out", self.held_out)])
        head = "".join(f"<th>{name}</th>" for name, _ in columns)
        body = "".join(
            f"<tr><th style='text-align:left'>{part}</th>"
            + "".join(f"<td>{_shown(gaps.mean(part))}</td>" for _, gaps in columns)
            + "</tr>"
            for part in PARTS
        )
        text = "".join(f"<p>{html.escape(line)}</p>" for line in [self._head(), *self.reading()])
        return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>{text}"

    def _head(self) -> str:
        held_out = "" if self.held_out is None else f" and {len(self.held_out)} held-out"
        return f"nats, mean ± s.e. over {len(self.train)} training{held_out} x; log Z by {self.source}"

    def reading(self) -> list[str]:
        """What the numbers say, in words: a sentence a line."""
        lines = []
        if len(self.train.starts) == 1:
            lines.append(
                "The guide has no parameters: its family has one member, and all of the gap is approximation. "
                "Take a guide that trains."
            )
        else:
            approximation, amortization = self.train.mean("approximation"), self.train.mean("amortization")
            if approximation.value > amortization.value:
                lines.append(
                    "On training x most of the gap is approximation: the family has no better member (a larger "
                    "rank may), or the fits have not found it (more steps or restarts may)."
                )
            else:
                lines.append(
                    "On training x most of the gap is amortization: the family has better members for each x than "
                    "the one guide for all (longer training or a larger rank may)."
                )
            lines += self._generalisation()
            lines.append(self._starts())
        if not self.certified:
            lines.append("log Z is a lower bound, hence so is the inference gap: it may be larger.")
        return lines

    def _generalisation(self) -> list[str]:
        if self.held_out is None:
            return []
        train, new = self.train.mean("amortization"), self.held_out.mean("amortization")
        more = Estimate(new.value - train.value, math.hypot(new.error, train.error))
        said = f"Amortization costs {_shown(more)} nats more on held-out x than on training x"
        if math.isnan(more.error):
            return [f"{said}; with a single x on a side there is no error to judge that by."]
        if more.value > 2 * more.error:
            return [f"{said}: the guide has overfitted its x. Regularise it, stop earlier, or train on more x."]
        return [f"{said}, not beyond 2 s.e.: no overfitting is seen."]

    def _starts(self) -> str:
        groups = [self.train] if self.held_out is None else [self.train, self.held_out]
        chosen = np.concatenate([gaps.best_start for gaps in groups])
        counts = [f"{start} {int((chosen == n).sum())}" for n, start in enumerate(self.train.starts)]
        return f"Best member for each x, by start: {', '.join(counts)}."

    def plot(self, ax: Any = None) -> Any:
        """See :func:`llmppl.display.plots.plot_gaps`."""
        return plot_gaps(self, ax)


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.2f}" if math.isnan(estimate.error) else str(estimate)
