"""A function of strings and numbers over the rows of arrays, inside compiled programs: what
:meth:`llmppl.numpyro.LM.map` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from llmppl.numpyro.network.host_call import host_call
from llmppl.numpyro.network.text_arrays import TextArgument, check_text, is_concrete
from llmppl.text.marks import Marks
from llmppl.text.row_function import (
    Column,
    Kind,
    batch_shape,
    constant_column,
    number_column,
    result_kind,
    run_rows,
    text_column,
)
from llmppl.text.spelling import Spelling

_decoders = Marks()


def map_rows(
    spelling: Spelling,
    decode: Callable[[Any], str],
    function: Callable[..., Any],
    values: Sequence[Any],
    max_tokens: int | None,
    returns: Kind | None,
) -> Array:
    """The results of :meth:`llmppl.numpyro.LM.map`. Works under ``jit``, ``vmap`` and ``scan``; each call leaves the
    compiled program once, for all rows together.

    :param decode: of one text's ids, for whoever shows a text made here.
    """
    kind = result_kind(function, values, max_tokens, returns) or float
    if kind is str and max_tokens is None:
        raise ValueError(
            "returns=str needs max_tokens= too, the width of the result: a compiled program must know it before the "
            "function has run."
        )
    parts = [_part(value, n, spelling) for n, value in enumerate(values)]
    shape = batch_shape([part.index.shape if isinstance(part, Column) else _rows(part) for part in parts])
    arrays = [jnp.broadcast_to(p, shape + p.shape[len(_rows(p)) :]) for p in parts if not isinstance(p, Column)]
    whole = shape if kind is not str else (*shape, int(max_tokens or 0))
    dtype = {str: jnp.int32, float: jnp.result_type(float), int: jnp.int32, bool: jnp.bool_}[kind]

    def ask(*arrays: np.ndarray) -> np.ndarray:
        rest = iter(arrays)
        columns = [p if isinstance(p, Column) else _column(p, next(rest), spelling) for p in parts]
        # Under vmap there are more rows, and a program's own are the last dimensions.
        return run_rows(function, columns, spelling.ids, kind, max_tokens)

    result = host_call(ask, whole, dtype, *arrays)
    if kind is str and is_concrete(result):
        _decoders.put(result, decode)
    return result


def decoder_of(value: Any) -> Callable[[Any], str] | None:
    """The strings of a text that :meth:`llmppl.numpyro.LM.map` made outside of compiled code, this very array and no
    other; else ``None``."""
    return _decoders.get(value)


def _part(value: Any, number: int, spelling: Spelling) -> Any:
    """A constant as a column, anything else as an array: a text where it is of int32."""
    name = f"value {number} of lm.map"
    if isinstance(value, TextArgument):
        return value.verbatim
    if isinstance(value, np.generic) or not hasattr(value, "dtype"):
        return constant_column(value, number, "array")
    if _is_text(value):
        if not value.ndim:
            raise ValueError(
                f"{name} is an array of {value.dtype} without dimensions, and integers are a text, of shape "
                "batch_shape + (T,). Pass a number as a Python int, or by value.astype(float)."
            )
        return check_text(value, name, spelling.vocabulary)
    if np.dtype(value.dtype).kind == "c":
        raise TypeError(f"{name} holds complex numbers. Pass floats, integers or booleans.")
    return lax.stop_gradient(jnp.asarray(value))


def _is_text(array: Any) -> bool:
    return array.dtype in (jnp.int32, jnp.int64)


def _rows(array: Any) -> tuple[int, ...]:
    return tuple(array.shape[:-1] if _is_text(array) else array.shape)


def _column(part: Any, known: np.ndarray, spelling: Spelling) -> Column:
    return text_column(known, spelling.codec.decode) if _is_text(part) else number_column(known, "value")
