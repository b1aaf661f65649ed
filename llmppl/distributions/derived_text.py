"""What texts have in common that come of another text without the network."""

from __future__ import annotations

from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from llmppl.distributions.conditioned_text import ConditionedText, LanguageModel, Pending
from llmppl.text import PAD


class _AnyText(constraints.Constraint):
    """Token ids, then padding."""

    is_discrete = True
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value >= PAD).all(-1)


class DerivedText(ConditionedText, TorchDistribution):
    """A law over texts that depends on another text alone, and asks nothing of the network.

    :param lm: the language model whose tokens these are.
    :param text: text tensor of shape ``batch_shape + (T,)``.
    :param width: most tokens of a value.
    """

    what: ClassVar[str]
    """What it is, as an error message says it."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_enumerate_support = False

    def __init__(self, lm: LanguageModel, text: Tensor, width: int, validate_args: bool | None = None) -> None:
        self.lm, self.context, self.adapter = lm, text, None
        super().__init__(text.shape[:-1], torch.Size([width]), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        return _AnyText()

    def with_context(self, context: Tensor, adapter: str | None) -> DerivedText:
        raise ValueError(f"{self.what}, which no guide changes. Observe it, or leave it to the program.")

    def pending(self, value: Tensor) -> Pending | None:
        return None

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.lm.dtype, torch.float32)
