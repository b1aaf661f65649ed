"""Why the weights of a posterior may not be trusted, as far as they can tell. Needs numpy only."""

from __future__ import annotations

from typing import Protocol

import numpy as np

FEWEST = 10
"""Effective samples or ancestors below which a mean of weights is a matter of luck."""

LARGEST_KHAT = 0.7
"""Above it no practical number of samples is enough (Vehtari et al. 2024)."""


LONG = 64
"""Tokens of a sample's latent texts from which on their number is what makes weights degenerate: the variance of a
log-weight grows with every token that the proposal gets wrong."""

_TRAINING = (
    "train towards the condition at higher temperatures first, fit(..., target_temperature=), or train a guide longer"
)

FOR_LONG = f"resample while they grow, smc(..., check_every=) with about a sentence's tokens, {_TRAINING}"

FOR_LONG_RESAMPLED = f"take more particles, or let them see ahead, smc(..., targets='flows') with a guide, {_TRAINING}"
"""What helps where particles are resampled already, and are still surprised by what comes behind the texts."""


class Weighted(Protocol):
    """What is asked of a posterior to doubt it."""

    @property
    def method(self) -> str: ...
    @property
    def weighted(self) -> bool: ...
    @property
    def complete(self) -> bool: ...
    @property
    def masked(self) -> tuple[str, ...]: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def num_ancestors(self) -> int: ...
    @property
    def distinct_ancestors(self) -> np.ndarray: ...
    @property
    def mean_tokens(self) -> float: ...
    @property
    def ess(self) -> np.ndarray: ...
    @property
    def khat(self) -> np.ndarray: ...
    @property
    def log_evidence_error(self) -> np.ndarray: ...


def doubts(posterior: Weighted) -> list[str]:
    """Reasons for distrust, by the worst row of each number; empty where the weights show none.

    An empty list certifies nothing: a guide that misses a mode draws no weight that would show it.
    """
    found: list[str] = []
    if not posterior.weighted or posterior.method == "enumeration":
        return found
    for site in posterior.masked:
        if not posterior.complete:
            found.append(
                f"the guide writes {site!r} under a mask that the program has not, and texts that masked decoding "
                "seldom writes may have the mass: use smc(..., resampling='optimal')"
            )
    if posterior.complete:
        return found
    ess, khat = np.min(posterior.ess), posterior.khat
    fewest = min(FEWEST, posterior.num_samples / 2)
    if posterior.method == "smc":
        if np.isnan(posterior.log_evidence_error).any():
            found.append("one run under optimal resampling has no standard error: use num_runs=2 or more")
        elif np.min(posterior.distinct_ancestors) < fewest:
            found.append(f"only {np.min(posterior.distinct_ancestors)} ancestors are left of {posterior.num_ancestors}")
    if ess < fewest:
        tokens, long = posterior.mean_tokens, ""
        if tokens >= LONG:
            long = f" of texts of {tokens:.0f} tokens, too many for one weight: {FOR_LONG}"
            if posterior.method == "smc":
                long = f" at some token of {tokens:.0f}: {FOR_LONG_RESAMPLED}"
        found.append(f"the effective sample size is {ess:.1f}{long}")
    if (khat > LARGEST_KHAT).any():
        found.append(f"k̂ is {np.nanmax(khat):.2f}, above {LARGEST_KHAT}")
    return found
