"""Names of observations, from a program's arguments, and what it is conditioned on, by value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.poutine.condition_messenger import ConditionMessenger
from torch import Tensor

from llmppl.programs.structure import Program
from llmppl.text import PAD


def key(args: Sequence[Any]) -> str:
    """An observation's name in a buffer, from the program's arguments by value."""
    return "; ".join(map(_canonical, args))


def rows_of(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], data_plate: bool) -> list[str]:
    """The keys of the observations of one call: one a row of the data plate, or one in all."""
    named = (*sorted(kwargs.items()), *conditions(program))
    if not data_plate:
        return [key((*args, *named))]
    return [key((*row, *named)) for row in zip(*args, strict=True)]


def conditions(program: Program) -> list[tuple[str, Any]]:
    """What ``pyro.condition`` has put into a program, by site: observed, and no argument of its."""
    found: list[tuple[str, Any]] = []
    while program is not None:
        for handler in getattr(getattr(program, "func", None), "args", ()):  # a program under a handler of Pyro's
            if isinstance(handler, ConditionMessenger):
                data = handler.data
                values = data if isinstance(data, Mapping) else {n: site["value"] for n, site in data.nodes.items()}
                found += sorted(values.items())
        program = getattr(program, "__wrapped__", None)  # type: ignore[assignment]
    return found


def _canonical(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.dtype == torch.long and value.dim() == 1:
            return f"ids {[token for token in value.tolist() if token != PAD]}"
        return repr(value.tolist()) if value.dim() else _number(value.item())
    if isinstance(value, np.ndarray):
        return f"array {value.tolist()}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {_canonical(own)}" for name, own in value.items()) + "}"
    if isinstance(value, (list, tuple)):  # arrays within, whose repr leaves entries out
        return f"[{', '.join(map(_canonical, value))}]"
    return _number(value) if isinstance(value, (int, float)) else repr(value)


def _number(value: float) -> str:
    """As a batch has it, in single precision, unless it is an integer."""
    return repr(float(value) if value == value // 1 else float(np.float32(value)))
