"""Ranks of simulated latents among draws, by scalar functionals of latents and observations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from llmppl.inference.simulated_pairs import Array, Pair, Scored

Functional = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
LOG_P, LOG_Q = "log p(x,z)", "log q(z|x)"
CREDIBILITY = "credibility of "


def ranks_of(pair: Pair, functionals: Mapping[str, Functional], generator: np.random.Generator) -> dict[str, Array]:
    """Ranks in (0, 1) of every functional of one simulated pair, ``(S,)`` for its rows."""
    found = {}
    if pair.drawn is not None:
        same = _same(pair.drawn, pair.truth)
        drawn, truth = (_values(each, pair.observations, functionals) for each in (pair.drawn, pair.truth))
        for name in drawn:
            # A text drawn and the same text simulated were scored in two passes, and may differ in the last digit.
            ties = ((drawn[name] == truth[name]) | same).sum(0)
            below = ((drawn[name] < truth[name]) & ~same).sum(0)
            rank = below + generator.random(ties.shape) * (ties + 1)
            found[name] = (rank / (len(same) + 1)).reshape(-1)
    for site, value in pair.credibility.items():
        found[CREDIBILITY + site] = value.reshape(-1)
    return found


def _values(of: Scored, observations: dict[str, Tensor], functionals: Mapping[str, Functional]) -> dict[str, Array]:
    """Every functional, ``(K,) + batch_shape``."""
    posterior, shape = of.posterior, of.log_q.shape
    values = {
        f"length of {name}": (posterior.samples[name] >= 0).reshape(*shape, -1).sum(-1)
        for name in posterior.token_log_p
    }
    values |= {LOG_P: posterior.log_joint, LOG_Q: of.log_q}
    latents = {name: torch.as_tensor(value) for name, value in posterior.samples.items()}
    for name, functional in functionals.items():
        if name in values:
            raise ValueError(f"functionals= names {name!r}, which is measured already. Give it another name.")
        value = torch.as_tensor(functional(latents, observations))
        if tuple(value.shape) != shape:
            raise ValueError(
                f"functional {name!r} returned shape {tuple(value.shape)} for {shape[0]} particles; it must be "
                f"{shape}, one number for each particle and observation."
            )
        if bool(value.isnan().any()):
            raise ValueError(f"functional {name!r} is NaN, which has no rank. Return a number that can be ordered.")
        values[name] = value.double().cpu().numpy()
    return values


def _same(drawn: Scored, truth: Scored) -> Array:
    """Which draws are the simulated latents themselves, ``(K,) + batch_shape``."""
    shape = drawn.log_q.shape
    equal = np.ones(shape, dtype=bool)
    for name, value in drawn.posterior.samples.items():
        if name in drawn.posterior.deterministic:
            continue  # as the latents are
        equal &= (value == truth.posterior.samples[name]).reshape(*shape, -1).all(-1)
    return equal
