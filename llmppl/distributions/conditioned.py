"""What the distributions over text given a context have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmppl.language_model import LM


class ConditionedText:
    """A distribution over text tensors given a context, made by an :class:`~llmppl.LM`."""

    lm: LM
    context: Tensor  # batch_shape + (L,), with padding anywhere
    adapter: str | None
    batch_shape: torch.Size
    site: str | None = None
    """Name of the site that a guide proposes with this, for error messages."""

    def with_context(self, context: Tensor, adapter: str | None) -> ConditionedText:
        raise NotImplementedError

    def _broadcast(self, value: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
        """``(N, T)`` values and ``(N, L)`` contexts row by row, and the batch shape they come from."""
        try:
            shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"value of batch shape {tuple(value.shape[:-1])} does not broadcast with the "
                f"distribution's batch shape {tuple(self.batch_shape)}. Give the observed text and the "
                "pieces of its context the same number of rows."
            ) from None
        flat = value.expand(shape + value.shape[-1:]).reshape(-1, value.shape[-1])
        context = self.context.expand(shape + self.context.shape[-1:])
        return flat, context.reshape(-1, context.shape[-1]), shape
