"""The inference gap: log evidence minus ELBO, with the source of the evidence named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmppl.posterior.posterior import Posterior
from llmppl.text.declared import declared


@dataclass(frozen=True)
class InferenceGap:
    r"""log Z − ELBO(q) = KL(q‖p(z|x)), in nats, for each batch row (Cremer et al. 2018).

    :param gap: shape ``batch_shape``.
    :param error: its standard error, from those of both terms.
    :param log_evidence: the log Z used.
    :param elbo: of the guide.
    :param source: where log Z comes from.
    :param certified: whether the gap is exact up to its error. With log Z from importance sampling it
        is a lower bound in expectation: the true gap may be larger.
    """

    gap: np.ndarray
    error: np.ndarray
    log_evidence: np.ndarray
    elbo: np.ndarray
    source: str
    certified: bool

    def __repr__(self) -> str:
        sign = "" if self.certified else "at least "
        values = ", ".join(
            f"{gap:.2f} ± {error:.2f}" for gap, error in zip(self.gap.flat, self.error.flat, strict=True)
        )
        return f"InferenceGap({sign}{values} nats; log evidence by {self.source})"


@declared
def inference_gap(posterior: Posterior, *references: Posterior) -> InferenceGap:
    """The inference gap of the guide that proposed ``posterior``.

    It is the whole gap: what the family cannot express and what amortization costs, together.

    :param references: posteriors of the same observation. An enumerated one gives log Z exactly.
        Otherwise, for each row, the largest log Ẑ of all given posteriors stands for log Z: every one
        is below it in expectation.
    :raises ValueError: batch shapes that differ.
    """
    for reference in references:
        if reference.batch_shape != posterior.batch_shape:
            raise ValueError(
                f"a reference of batch shape {reference.batch_shape} does not fit the posterior's "
                f"{posterior.batch_shape}. Give posteriors of the same observations."
            )
    everything = [posterior, *(reference for reference in references if reference is not posterior)]
    exact = [p for p in everything if p.method == "enumeration"]
    if exact:
        evidence, error = exact[0].log_evidence, np.zeros(posterior.batch_shape)
        source, certified = "enumeration", True
    else:
        evidence, error = best_log_evidence(everything)
        samples = " + ".join(str(p.num_samples) for p in everything)
        source, certified = f"importance sampling ({samples} samples), a lower bound", False
    return InferenceGap(
        gap=np.asarray(evidence - posterior.elbo),
        error=np.sqrt(np.square(posterior.elbo_error) + np.square(error)),
        log_evidence=evidence,
        elbo=posterior.elbo,
        source=source,
        certified=certified,
    )


def best_log_evidence(posteriors: Sequence[Posterior]) -> tuple[Any, Any]:
    """The largest log Ẑ of several posteriors, row by row, with its standard error."""
    estimates = np.stack([p.log_evidence for p in posteriors])
    errors = np.stack([p.log_evidence_error for p in posteriors])
    best = estimates.argmax(0)[None]
    return np.take_along_axis(estimates, best, 0)[0], np.take_along_axis(errors, best, 0)[0]
