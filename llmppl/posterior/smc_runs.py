"""What sequential Monte Carlo is asked for, and several runs as one. Needs numpy only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from llmppl.posterior.columns import widened
from llmppl.posterior.posterior import Array, Posterior

TARGETS = ("prefixes", "flows")
FLOWS_EVERY = 4
SCHEMES = ("systematic", "residual", "multinomial")


def pooled(parts: list[Posterior]) -> Posterior:
    """Several runs as one: the mean of all their weights is the mean of their estimates of Z."""
    if len(parts) == 1:
        return parts[0]
    columns = ("samples", "token_log_p", "token_log_q", "log_likelihood")
    if parts[0].complete and parts[-1].complete:
        return parts[0]  # nothing was left to chance
    joined: dict[str, Any] = {
        column: {name: _joined([getattr(p, column)[name] for p in parts]) for name in getattr(parts[0], column)}
        for column in columns
    }
    ancestors = [p.ancestors + n * p.num_ancestors for n, p in enumerate(parts)]  # type: ignore[operator]
    return replace(
        parts[0],
        **joined,
        log_weights=np.concatenate([p.log_weights for p in parts]),
        log_joint=np.concatenate([p.log_joint for p in parts]),
        ancestors=np.concatenate(ancestors),
        num_ancestors=sum(p.num_ancestors for p in parts),
        # Each run competes in itself: their sizes add up.
        ess_history=np.sum([p.ess for p in parts], 0)[None],
    )


def _joined(values: list[Array]) -> Array:
    # Texts that a program computes are as wide as the longest of their run.
    width = max(value.shape[-1] for value in values)
    return np.concatenate([widened(value, width) for value in values])


def check_settings(
    num_samples: int,
    num_runs: int,
    targets: str | None,
    resampling: str | None,
    ess_threshold: float,
    check_every: int | None,
) -> None:
    for name, value in (("num_samples", num_samples), ("num_runs", num_runs), ("check_every", check_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if num_samples < 2:
        raise ValueError("num_samples must be at least 2: a single particle has none to compete with.")
    if targets is not None and targets not in TARGETS:
        raise ValueError(f"targets={targets!r} must be one of {TARGETS}, or left out.")
    if resampling not in (None, *SCHEMES, "optimal"):
        raise ValueError(f"resampling={resampling!r} must be one of {(*SCHEMES, 'optimal')}.")
    if not 0 <= ess_threshold <= 1:
        raise ValueError(f"ess_threshold={ess_threshold} must be a share of the particles, from 0 (never) to 1.")
