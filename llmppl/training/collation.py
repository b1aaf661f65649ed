"""Minibatches as arguments of a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmppl.network.text_tensors import pad_rows, unpad_rows
from llmppl.programs.simulated_pair import SimulatedPair, stacked
from llmppl.training.minibatches import Data


def collate(batch: Data) -> tuple[Any, ...]:
    """A minibatch as one argument tuple: lists of strings, stacked tensors.

    :raises TypeError, ValueError: arguments that cannot be batched; tuples of several lengths.
    """
    if all(isinstance(item, SimulatedPair) for item in batch):
        return SimulatedPair.of(
            _columns(batch),
            *(
                {name: stacked([getattr(item, kind)[name] for item in batch]) for name in getattr(batch[0], kind)}
                for kind in ("latents", "observations")
            ),
        )
    return _columns(batch)


def _columns(batch: Data) -> tuple[Any, ...]:
    if len({len(item) for item in batch}) > 1:
        raise ValueError("vectorize_data=True needs tuples of one length. Leave it out for others.")
    columns: list[Any] = []
    for n, column in enumerate(zip(*batch, strict=True)):
        if all(isinstance(item, str) for item in column):
            columns.append(list(column))
        elif all(isinstance(item, Tensor) for item in column):
            if all(item.dtype == torch.long and item.dim() == 1 for item in column):
                rows = [unpad_rows(item[None])[0] for item in column]
                columns.append(pad_rows(rows, device=column[0].device))
            else:
                columns.append(torch.stack(column))
        elif all(isinstance(item, (int, float)) for item in column):
            columns.append(_numbers(column, n))
        else:
            kinds = sorted({type(item).__name__ for item in column})
            raise TypeError(
                f"vectorize_data=True cannot batch argument {n} of types {kinds}: strings, numbers and tensors can be. "
                "Leave vectorize_data out."
            )
    return tuple(columns)


def _numbers(column: Sequence[int | float], n: int) -> Tensor:
    """Integers as int32: int64 is text everywhere."""
    numbers = torch.tensor(column)
    if numbers.dtype != torch.long:
        return numbers
    if bool((numbers.abs() >= 1 << 31).any()):
        raise TypeError(
            f"argument {n} has integers of more than 31 bits, which no batch can hold. Give them as floats."
        )
    return numbers.int()
