"""Resampling of weighted particles: unbiased, each in one random pass.

Every scheme maps log-weights to indices and new log-weights such that a particle's expected total
weight after is its weight before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def resample(log_weights: Tensor, scheme: str, retained: bool = False) -> Tensor:
    """As many indices as there are weights, drawn in proportion to them.

    - ``systematic``: one uniform number, evenly spaced points (Kitagawa 1996);
    - ``residual``: each particle ⌊K w⌋ times, the rest by multinomial draws (Liu and Chen 1998);
    - ``multinomial``: independent draws (Gordon et al. 1993).

    :param log_weights: ``(K,)``, some finite.
    :param retained: keep particle 0 in place 0, as the conditional particle filter of Andrieu, Doucet and
        Holenstein (2010, sec. 4.3) asks; multinomial only.
    :returns: ``(K,)``.
    """
    weights = log_weights.double().softmax(0)
    count = len(weights)
    if scheme == "systematic":
        points = (torch.rand((), dtype=torch.float64, device=weights.device) + torch.arange(count)) / count
        return _invert(weights, points)
    if scheme == "residual":
        # Rounding must not turn an exact multiple into one less.
        whole = (weights * count + 1e-12).floor().long()
        sure = torch.arange(count, device=weights.device).repeat_interleave(whole)[:count]
        missing = count - len(sure)
        if not missing:
            return sure
        rest = (weights * count - whole).clamp(min=0)
        return torch.cat([sure, torch.multinomial(rest, missing, replacement=True)])
    index = torch.multinomial(weights, count, replacement=True)
    if retained:
        index[0] = 0
    return index


def without_replacement(log_weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At most ``count`` different particles, and their new log-weights.

    Optimal among unbiased selections: it has the smallest expected squared change of the weights (Fearnhead and
    Clifford 2003, sec. 3). Weights above a threshold ``c`` are kept as they are; of the others each is
    kept with probability w/c and then weighs c. Where no more than ``count`` weights are positive nothing is
    changed.

    :param log_weights: ``(n,)``, some finite; ``n`` may be the number of all tokens after all particles.
    :returns: indices and log-weights, ``(m,)`` each, ``m ≤ count``.
    """
    positive = torch.isfinite(log_weights)
    if int(positive.sum()) <= count:
        index = positive.nonzero()[:, 0]
        return index, log_weights[index]
    largest = log_weights.max()
    weights = (log_weights - largest).double().exp()
    top = weights.topk(count).values
    kept = torch.arange(count, device=weights.device)
    # c for each number of weights kept as they are; the smallest number whose next weight is below its c.
    remaining = weights.sum() - top.cumsum(0) + top
    threshold = remaining / (count - kept)
    number = int((top <= threshold).nonzero()[0]) if bool((top <= threshold).any()) else count - 1
    c = threshold[number]
    sure = (weights > c).nonzero()[:, 0]
    rest = ((weights <= c) & positive).nonzero()[:, 0]
    steps = (weights[rest] / c).cumsum(0)
    missing = count - len(sure)
    points = torch.rand((), dtype=torch.float64, device=weights.device) + torch.arange(missing)
    # The steps sum to the number missing, up to rounding.
    chosen = rest[torch.searchsorted(steps, points * (steps[-1] / missing), right=True).clamp(max=len(rest) - 1)]
    chosen_weights = (c.log() + largest).to(log_weights.dtype).expand(len(chosen))
    return torch.cat([sure, chosen]), torch.cat([log_weights[sure], chosen_weights])


def effective_size(log_weights: Tensor) -> Tensor:
    """Kish's effective sample size over the first dimension; zero where no weight is positive."""
    alive = torch.isfinite(log_weights).any(0)
    shifted = log_weights.masked_fill(~alive, 0.0).double()
    size = (2 * shifted.logsumexp(0) - (2 * shifted).logsumexp(0)).exp()
    return torch.where(alive, size, 0.0)


def log_mean(log_weights: Tensor) -> Tensor:
    """Logarithm of the mean weight, over the first dimension."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def _invert(weights: Tensor, points: Tensor) -> Tensor:
    steps = weights.cumsum(0)
    return torch.searchsorted(steps / steps[-1], points, right=True).clamp(max=len(weights) - 1)
