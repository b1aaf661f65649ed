"""calibrate() and expected_coverage(): level for exact posteriors, power against planted errors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story
from scipy import stats
from test_objectives import perturbed
from torch import Tensor
from torch.distributions import constraints

from llmppl import LM, calibrate, exact_posterior, expected_coverage, importance
from llmppl.diagnostics import Calibration
from llmppl.diagnostics import calibration as module
from llmppl.diagnostics.uniformity import ecdf_band, uniformity_p_value
from llmppl.guides import AutoregressiveGuide, PromptGuide

Reshape = Callable[[Tensor], Tensor]


class Table(pyro.distributions.TorchDistribution):
    """A finite distribution over given texts: a guide of any shape, −inf where it does not go."""

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, texts: Tensor, logits: Tensor) -> None:
        self.texts, self.logits = texts, logits.log_softmax(-1)
        super().__init__(logits.shape[:-1], texts.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: object = None) -> Table:
        return Table(self.texts, self.logits.expand(torch.Size(batch_shape) + self.logits.shape[-1:]))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.texts[torch.distributions.Categorical(logits=self.logits).sample(sample_shape)]

    def log_prob(self, value: Tensor) -> Tensor:
        index = (value[..., None, :] == self.texts).all(-1).long().argmax(-1)
        shape = torch.broadcast_shapes(index.shape, self.batch_shape)
        logits = self.logits.expand(shape + self.logits.shape[-1:])
        return logits.gather(-1, index.expand(shape)[..., None])[..., 0]


def table_guide(story: Story, change: Reshape = lambda logits: logits) -> Callable[..., None]:
    """The exact posterior of any two-token ending as a guide, its logits ``(..., 156)`` changed."""
    texts, _ = story.joint()
    endings = story.lm(story.beginning, max_tokens=2).enumerate_support()
    with torch.no_grad():
        likelihood = story.lm(story.beginning, texts[:, None]).log_prob(endings)
        table = change((story.prior().log_prob(texts)[:, None] + likelihood).T.log_softmax(-1))

    def guide(beginning: Any, ending: Any, observations: dict[str, Tensor] | None = None) -> None:
        told = story.lm.encode(ending) if observations is None else observations["ending"]
        index = (told[..., None, :] == endings).all(-1).long().argmax(-1)
        pyro.sample("middle", Table(texts, table[index]))

    return guide


def without_mass(share: float, floor: float = -math.inf) -> Reshape:
    """Take texts, heaviest first, that together have at most ``share`` of the mass, out of a posterior.

    :param floor: what is left of their log-probability.
    """

    def change(logits: Tensor) -> Tensor:
        changed = logits.clone()
        for row in changed.reshape(-1, logits.shape[-1]):
            taken = 0.0
            for n in row.argsort(descending=True).tolist():
                if taken + float(row[n].exp()) <= share:
                    taken += float(row[n].exp())
                    row[n] = floor
        return changed

    return change


def pairs(story: Story, guide: Callable[..., Any], count: int, **options: Any) -> Calibration:
    run = calibrate(story.program, guide, vectorize_data=True, simulations=1, progress=False, **options)
    return run([story.beginning] * count, [story.ending] * count)
