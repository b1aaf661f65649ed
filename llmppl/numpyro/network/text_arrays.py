"""Text as JAX arrays: int32 token ids, then padding; the values of :mod:`llmppl.network.text_tensors` for torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llmppl.text import PAD

Piece = Any
"""A string, a list of strings (one a batch row), a :class:`TextArgument` or a text array."""

BUCKET = 16
"""Strings that are arguments of a compiled program are padded to multiples of so many tokens, lest each length be
compiled anew."""


_NO_STRING = (
    "a program that is compiled gets its strings as token ids, so that they cannot be put together or changed as "
    "strings. Pass them as pieces of their own: lm(beginning, ' ', ending); or change them inside of lm.map(function, "
    "beginning)."
)


@jax.tree_util.register_pytree_node_class
class TextArgument:
    """A string, or several, as the argument of a compiled program: strings are no JAX values.

    A tokenizer may treat the beginning of a text in a way of its own, so both readings are here; ``lm(...)`` takes the
    one that the piece's place asks for, and ``lm.encode`` the verbatim one.

    :param first: ``batch_shape + (T,)``, the token ids where the piece begins a text.
    :param verbatim: the same anywhere else.
    :param filled: whether every row has tokens, which a compiled program cannot see: a context with such a piece needs
        no token for the beginning of a text.
    """

    def __init__(self, first: Array, verbatim: Array, filled: bool = False) -> None:
        self.first, self.verbatim, self.filled = first, verbatim, filled

    def tree_flatten(self) -> tuple[tuple[Array, Array], bool]:
        return (self.first, self.verbatim), self.filled

    @classmethod
    def tree_unflatten(cls, filled: bool, children: tuple[Array, Array]) -> TextArgument:
        return cls(*children, filled)

    def __str__(self) -> str:
        raise TypeError(_NO_STRING)

    __format__ = __add__ = __radd__ = __mod__ = lambda self, *others: str(self)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            raise TypeError(
                f"a program that is compiled gets its strings as token ids, so that they cannot be compared, here with "
                f"{other!r}. Choose before the program is compiled, or pass a number as an argument of its own."
            )
        return self is other

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        is_method = not name.startswith("_") and hasattr(str, name)
        raise AttributeError(_NO_STRING if is_method else f"'TextArgument' object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"TextArgument(shape={tuple(self.verbatim.shape)})"


def lengths(value: Array) -> Array:
    """Number of tokens of each text, of shape ``value.shape[:-1]``."""
    return (value != PAD).sum(-1)


def is_right_padded(value: Array) -> Array:
    """Whether no token follows a padding, of shape ``value.shape[:-1]``."""
    pad = value == PAD
    return ~(pad[..., :-1] & ~pad[..., 1:]).any(-1)


def pad_rows(rows: Sequence[Sequence[int]], width: int | None = None) -> np.ndarray:
    """Stack token lists into a text array of shape ``(len(rows), width)``."""
    width = max((len(row) for row in rows), default=0) if width is None else width
    stacked = np.full((len(rows), width), PAD, dtype=np.int32)
    for n, row in enumerate(rows):
        stacked[n, : len(row)] = row
    return stacked


def widen(value: Any, width: int) -> Array:
    """Pad the last dimension on the right up to ``width`` tokens."""
    value = jnp.asarray(value)
    missing = max(width - value.shape[-1], 0)
    return jnp.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, missing)], constant_values=PAD)


def is_concrete(value: Any) -> bool:
    """Whether numbers can be looked at: no, while a program is being compiled."""
    return not isinstance(value, jax.core.Tracer)


def is_known(tree: Any) -> bool:
    """Whether all of a pytree are numbers that can be looked at: no tracers, and none of JAX's placeholders."""
    return all(
        isinstance(leaf, (Array, np.ndarray, np.generic, int, float)) and is_concrete(leaf)
        for leaf in jax.tree.leaves(tree)
    )


def check_text(value: object, name: str, vocabulary: int) -> Array:
    """Return ``value`` if it is a well-formed text array, or say what is wrong with ``name``.

    While a program is being compiled only its shape and type can be checked.

    :raises TypeError: not an integer array.
    :raises ValueError: ids outside the vocabulary, or padding before a token.
    """
    if isinstance(value, str) or (isinstance(value, (list, tuple)) and value and isinstance(value[0], str)):
        raise TypeError(
            f"{name} is a string, {value!r}; a text array belongs here. Pass lm.encode(text) instead: traces hold "
            "arrays only."
        )
    if isinstance(value, TextArgument):
        value = value.verbatim
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"{name} must be a text array of token ids, got {type(value).__name__}. Pass lm.encode(text).")
    array: Any = value
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integer token ids, got dtype {array.dtype}. Pass lm.encode(text).")
    if not array.ndim:
        raise ValueError(f"{name} must have a token dimension, batch_shape + (T,); got a scalar.")
    if is_concrete(array) and array.size:
        known = np.asarray(array)
        smallest, largest = int(known.min()), int(known.max())
        if smallest < PAD or largest >= vocabulary:
            wrong = smallest if smallest < PAD else largest
            raise ValueError(
                f"{name} holds the token id {wrong}, outside the vocabulary of {vocabulary} tokens. Ids go from 0 to "
                f"{vocabulary - 1}; padding is llmppl.text.PAD = {PAD}."
            )
        pad = known == PAD
        holes = (pad[..., :-1] & ~pad[..., 1:]).any(-1)
        if holes.any():
            row = tuple(np.argwhere(holes)[0].tolist())
            raise ValueError(
                f"{name} has padding before a token (row {row}). PAD may stand only after the end of a text; to join "
                "texts pass them as separate pieces: lm(first, second)."
            )
    return array if array.dtype == jnp.int32 else array.astype(jnp.int32)


def check_batch(value: Array, batch_shape: tuple[int, ...]) -> None:
    """Refuse a value whose rows do not broadcast with a distribution's.

    :raises ValueError: with both shapes.
    """
    try:
        np.broadcast_shapes(value.shape[:-1], batch_shape)
    except ValueError:
        raise ValueError(
            f"value of batch shape {tuple(value.shape[:-1])} does not broadcast with the distribution's batch shape "
            f"{tuple(batch_shape)}. Give the observed text and the pieces of its context the same number of rows."
        ) from None


def count(texts: Sequence[Array]) -> int:
    """Most tokens of the joined texts; padding counts where the numbers are not known."""
    counts = [(np.asarray(t) != PAD).sum(-1) if is_concrete(t) else np.asarray(t.shape[-1]) for t in texts]
    return int(np.max(sum(counts, np.zeros((), int)), initial=0))
