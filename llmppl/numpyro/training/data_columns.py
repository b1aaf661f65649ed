"""Data as arguments of one compiled step: every text of an argument padded to one width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llmppl.numpyro.network.text_arrays import BUCKET, TextArgument, widen
from llmppl.training.minibatches import Data


class Columns:
    """The arguments of all observations, each a stacked pytree, or one value that all share.

    :param data: the program's argument tuples: strings, numbers, arrays, :class:`TextArgument`.
    :param lm: encodes strings; ``None`` where nothing can.
    :raises TypeError, ValueError: arguments that cannot be stacked; tuples of several lengths.
    """

    def __init__(self, data: Data, lm: Any) -> None:
        if len({len(item) for item in data}) > 1:
            raise ValueError("data has tuples of several lengths. Give every observation the same arguments.")
        columns = [_column(n, column, lm) for n, column in enumerate(zip(*data, strict=True))]
        self.stacked = {n: value for n, (value, varies) in enumerate(columns) if varies}
        self._shared = {n: value for n, (value, varies) in enumerate(columns) if not varies}

    def rows(self, indices: Sequence[int]) -> dict[int, Any]:
        """The stacked arguments of some observations."""
        return {n: jax.tree.map(lambda leaf: leaf[np.asarray(indices)], value) for n, value in self.stacked.items()}

    def arguments(self, rows: dict[int, Any]) -> tuple[Any, ...]:
        """An argument tuple of the program."""
        both = {**self._shared, **rows}
        return tuple(both[n] for n in sorted(both))


def _column(number: int, column: tuple[Any, ...], lm: Any) -> tuple[Any, bool]:
    """All values of an argument, and whether they are stacked."""
    first = column[0]
    if all(isinstance(item, str) for item in column):
        if lm is None:
            raise TypeError(
                f"argument {number} is a string, and the guide has no lm to encode it with. Pass lm.argument(text)."
            )
        return lm.argument(list(column)), True
    if all(isinstance(item, TextArgument) for item in column):
        firsts, verbatims = ([getattr(item, name) for item in column] for name in ("first", "verbatim"))
        return TextArgument(_padded(firsts), _padded(verbatims), all(item.filled for item in column)), True
    if all(hasattr(item, "dtype") and hasattr(item, "shape") for item in column):
        texts = all(jnp.issubdtype(item.dtype, jnp.integer) and item.ndim == 1 for item in column)
        if not texts and len({item.shape for item in column}) > 1:
            raise ValueError(
                f"argument {number} has arrays of shapes {sorted({tuple(item.shape) for item in column})}: one "
                "compiled step needs one shape. Pad them."
            )
        return (_padded(list(column)) if texts else jnp.stack([jnp.asarray(item) for item in column])), True
    numbers = all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in column)
    if all(type(item) is type(first) and item == first for item in column) and not isinstance(first, float):
        return first, False
    if numbers:
        return jnp.asarray(column), True
    kinds = sorted({type(item).__name__ for item in column})
    raise TypeError(
        f"argument {number} of types {kinds} differs between observations, and only strings, numbers and arrays can: "
        "the step is compiled once for all of them."
    )


def _padded(texts: list[Any]) -> Array:
    width = max(text.shape[-1] for text in texts)
    width = -(-width // BUCKET) * BUCKET if len({text.shape[-1] for text in texts}) > 1 else width
    return jnp.stack([widen(text, width) for text in texts])
