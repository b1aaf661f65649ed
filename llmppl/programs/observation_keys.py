"""Names of observations, from a program's arguments by value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmppl.text import PAD


def key(args: Sequence[Any]) -> str:
    """An observation's name in a buffer, from the program's arguments by value."""
    return "; ".join(map(_canonical, args))


def rows_of(args: tuple[Any, ...], data_plate: bool) -> list[str]:
    """The keys of the observations of one call: one a row of the data plate, or one in all."""
    if not data_plate:
        return [key(args)]
    return [key(row) for row in zip(*args, strict=True)]


def _canonical(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.dtype == torch.long and value.dim() == 1:
            return f"ids {[token for token in value.tolist() if token != PAD]}"
        return repr(value.tolist() if value.dim() else float(value))
    return repr(float(value) if isinstance(value, (int, float)) else value)
