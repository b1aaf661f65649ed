"""A function of Python strings and numbers, run once for each distinct row of a batch. Needs numpy only."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmppl.text import PAD

Array = NDArray[Any]
Scalar = str | float | bool
Kind = type[str] | type[float] | type[int] | type[bool]
KINDS: tuple[Kind, ...] = (str, float, int, bool)
SHOWN = 60
"""Characters of an input or result that an error message shows."""


@dataclass(frozen=True)
class Column:
    """One argument of the function in every row.

    :param values: distinct values, strings or Python scalars.
    :param index: of ``batch_shape``, which of them each row has.
    """

    values: list[Scalar]
    index: Array


def text_column(ids: Array, decode: Callable[[list[int]], str]) -> Column:
    """Texts as strings.

    :param ids: ``batch_shape + (T,)``, token ids with ``PAD`` behind.
    """
    shape, width = ids.shape[:-1], ids.shape[-1]
    rows: dict[bytes, Array] = {}
    of_row = []
    for row in np.ascontiguousarray(ids).reshape(math.prod(shape), width):
        rows.setdefault(row.tobytes(), row)
        of_row.append(row.tobytes())
    # Other tokens may spell the same string, and the function is asked for strings.
    values, codes = _distinct([decode([int(token) for token in row if token != PAD]) for row in rows.values()])
    code = dict(zip(rows, codes, strict=True))
    return Column(values, np.array([code[row] for row in of_row], dtype=np.int64).reshape(shape))


def number_column(array: Array, name: str) -> Column:
    """Numbers or booleans as Python scalars.

    :param array: ``batch_shape``.
    :raises TypeError: neither floats, integers nor booleans.
    """
    if array.dtype.kind not in "biufV":
        raise TypeError(f"{name} holds {array.dtype} numbers. Pass floats, integers or booleans.")
    if array.dtype.kind == "V":  # what numpy has no type for, such as bfloat16
        array = array.astype(np.float32)
    flat = array.reshape(-1).copy()
    # Bits, not numbers: NaN is itself, and 0.0 is printed otherwise than −0.0.
    bits = flat.view(f"u{flat.itemsize}")
    _, first, index = np.unique(bits, return_index=True, return_inverse=True)
    return Column(flat[first].tolist(), index.reshape(array.shape))


def constant_column(value: Any, number: int, tensor: str) -> Column:
    """A string or number that all rows share, or a list of strings, one a row.

    :param number: of the value among those of the call, from 0.
    :param tensor: what the framework calls its arrays.
    :raises TypeError: anything else.
    """
    if isinstance(value, (list, tuple)) and value and all(isinstance(text, str) for text in value):
        return Column(*_distinct(value))
    if isinstance(value, (np.number, np.bool_)):
        value = value.item()
    if not isinstance(value, (str, bool, int, float)):
        raise TypeError(
            f"value {number} of lm.map must be a string, a non-empty list of strings, a number, or a {tensor} of texts "
            f"or numbers, got {_shown(value)}. What is the same in all rows the function can hold itself: "
            "lm.map(lambda text: f(text, table), text)."
        )
    return Column([value], np.zeros((), dtype=np.int64))


def result_kind(function: Any, values: Sequence[Any], max_tokens: int | None, returns: Any) -> Kind | None:
    """What the function is said to return, ``None`` where nobody says.

    :raises TypeError, ValueError: a malformed call, naming the argument.
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {_shown(function)}. lm.map(function, *values) calls it.")
    if not values:
        raise ValueError("lm.map has no values, so that there are no rows to run the function for. Pass at least one.")
    if returns is not None and not any(returns is kind for kind in KINDS):
        raise TypeError(f"returns={_shown(returns)} must be one of the types str, float, int and bool.")
    if max_tokens is None:
        return returns
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or not 1 <= max_tokens < 2**31:
        raise ValueError(f"max_tokens={max_tokens!r} must be a number of tokens, at least 1.")
    if returns not in (None, str):
        raise ValueError(
            f"max_tokens={max_tokens} is for texts, and returns={returns.__name__}. Leave one of them out."
        )
    return str


def batch_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The rows of all arguments together.

    :raises ValueError: two arguments whose batch shapes do not broadcast.
    """
    for n, shape in enumerate(shapes):
        for m, other in enumerate(shapes[:n]):
            try:
                np.broadcast_shapes(shape, other)
            except ValueError:
                raise ValueError(
                    f"values {m} and {n} of lm.map do not broadcast: their batch shapes are {tuple(other)} and "
                    f"{tuple(shape)}. Give both the same number of rows, or one of them a single one."
                ) from None
    return np.broadcast_shapes(*shapes)


def run_rows(
    function: Callable[..., Any],
    columns: Sequence[Column],
    ids: Callable[[str], list[int]],
    kind: Kind | None = None,
    max_tokens: int | None = None,
) -> Array:
    """The function's results, computed once for each distinct row.

    :param ids: the token ids of a string.
    :param kind: what it returns; by default what it does return, numbers as floats.
    :param max_tokens: width of a text; by default that of the longest.
    :returns: ``batch_shape + (T,)`` token ids (int64) for strings, else ``batch_shape`` of float64, int32 or bool.
    :raises TypeError: results of the wrong type, or of several.
    :raises ValueError: a text that is too long or has no tokens, an integer outside int32, no rows at all.
    :raises Exception: what the function raises, of the same type where it can be made from a message, else
        ``RuntimeError``. All errors name the row and its inputs.
    """
    shape = batch_shape([column.index.shape for column in columns])
    codes = np.stack([np.broadcast_to(column.index, shape).reshape(-1) for column in columns], -1)
    found, first, of_row = np.unique(codes, axis=0, return_index=True, return_inverse=True)
    calls = _Calls(getattr(function, "__name__", type(function).__name__), shape, kind is None)
    results: list[Any] = [None] * len(found)
    for n in np.argsort(first):  # in the order of the rows, so that an error is that of the first
        inputs = tuple(column.values[code] for column, code in zip(columns, found[n], strict=True))
        result = calls.run(function, inputs, int(first[n]))
        own = calls.kind_of(result)
        kind = kind or (float if own is int else own)
        calls.check(result, own, kind)
        results[n] = calls.encoded(result, ids, max_tokens) if kind is str else calls.number(result, kind)
    if kind is None:
        raise ValueError("lm.map has a batch without rows, so that nothing says what it returns. Pass returns=.")
    of_row = of_row.reshape(-1)
    if kind is not str:
        dtype: Any = {float: np.float64, int: np.int32, bool: np.bool_}[kind]
        return np.array(results, dtype=dtype)[of_row].reshape(shape)
    width = max_tokens or max((len(row) for row in results), default=1)
    texts = np.full((len(results), width), PAD, dtype=np.int64)
    for n, row in enumerate(results):
        texts[n, : len(row)] = row
    return texts[of_row].reshape(*shape, width)


class _Calls:
    """Calls of one function: what its errors say.

    :param open: whether nobody said what it returns.
    """

    def __init__(self, name: str, shape: tuple[int, ...], open: bool) -> None:
        self.name, self.shape, self.open = name, shape, open
        self.place = ""
        self.first: str | None = None

    def run(self, function: Callable[..., Any], inputs: tuple[Scalar, ...], row: int) -> Any:
        where = tuple(int(n) for n in np.unravel_index(row, self.shape)) if self.shape else ()
        of_row = f"in row {where} of a batch {self.shape}, " if self.shape else ""
        self.place = f"{of_row}for the inputs ({', '.join(map(_shown, inputs))})"
        try:
            return function(*inputs)
        except Exception as error:
            raise _again(error, f"{self._begin()} raised {type(error).__name__} {self.place}: {error}") from error

    def kind_of(self, result: Any) -> Kind:
        if isinstance(result, str):
            return str
        if isinstance(result, (bool, np.bool_)):
            return bool
        if isinstance(result, numbers.Integral):
            return int
        if isinstance(result, numbers.Real):
            return float
        raise TypeError(
            f"{self._begin()} returned {_shown(result)} {self.place}. It must return a string, a number or a boolean "
            "of Python's; a tensor of one number by .item()."
        )

    def check(self, result: Any, own: Kind, kind: Kind) -> None:
        self.first = self.first or f"{_shown(result)} {self.place}"
        if own is kind or (own is int and kind is float):
            return
        wrong = f"{self._begin()} returned {_shown(result)} {self.place}"
        if self.open:
            raise TypeError(f"{wrong}, and {self.first}. Return one type for all rows.")
        mend = "returns=str, max_tokens=..." if own is str else f"returns={own.__name__}"
        raise TypeError(f"{wrong}, where a {kind.__name__} was to come. Pass {mend}, or return {kind.__name__}(...).")

    def encoded(self, result: str, ids: Callable[[str], list[int]], max_tokens: int | None) -> list[int]:
        row = ids(str(result))
        if not row:
            raise ValueError(
                f"{self._begin()} returned {_shown(result)} {self.place}, which has no tokens; a text has at least "
                "one. Return something else for nothing, e.g. ' ' or 'none'."
            )
        if max_tokens is not None and len(row) > max_tokens:
            raise ValueError(
                f"{self._begin()} returned {_shown(result)} {self.place}: {len(row)} tokens, more than "
                f"max_tokens={max_tokens}. Raise max_tokens, or return a shorter text."
            )
        return row

    def number(self, result: Any, kind: Kind) -> Any:
        if kind is int and not -(2**31) <= int(result) < 2**31:
            raise ValueError(f"{self._begin()} returned {result} {self.place}, outside int32. Pass returns=float.")
        return kind(result)

    def _begin(self) -> str:
        return f"lm.map: {self.name!r}"


def _distinct(values: Sequence[str]) -> tuple[list[Scalar], Array]:
    numbering: dict[str, int] = {}
    index = [numbering.setdefault(value, len(numbering)) for value in values]
    return list(numbering), np.asarray(index, dtype=np.int64)


def _again(error: Exception, message: str) -> Exception:
    """An error of the same type with another message."""
    try:
        again = type(error)(message)
    except Exception:
        return RuntimeError(message)
    # Some take a message for something else, and would say nothing of it.
    return again if again.args == (message,) else RuntimeError(message)


def _shown(value: Any) -> str:
    """A value as an error message names it."""
    if not isinstance(value, (str, int, float, bool, np.generic)):
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        return "None" if value is None else f"a {type(value).__name__}{shape}"
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...{text[-1]}"
