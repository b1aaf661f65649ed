"""Masks of a :class:`llmppl.Grammar` inside compiled programs: llguidance is asked on the host."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap

from llmppl.text import PAD
from llmppl.text.grammar import BoundGrammar


def permitted(grammar: BoundGrammar, prefixes: Array) -> Array:
    """Which tokens may follow each text so far, boolean ``(..., V)``; all of them after an end token.

    Works under ``jit``, ``vmap`` and ``scan``. Each call leaves the compiled program once, for all rows together; equal
    prefixes are asked once, and the parser's states are kept from one token to the next.

    :param prefixes: ``(..., T)`` token ids, padded behind.
    :raises ValueError: the grammar permits no token of this vocabulary after one of them (from a compiled program as
        JAX's own error, with the same text).
    """
    vocabulary = grammar.vocabulary
    width = -(-vocabulary // 8)

    def ask(prefixes: Array) -> np.ndarray:
        known = np.asarray(prefixes)
        rows, row = np.unique(known.reshape(-1, known.shape[-1]), axis=0, return_inverse=True)
        masks = grammar.permitted([[int(token) for token in r if token != PAD] for r in rows])
        packed = np.packbits(masks, axis=-1, bitorder="little")
        return packed[row.reshape(-1)].reshape(*known.shape[:-1], width)

    answer = jax.ShapeDtypeStruct((*prefixes.shape[:-1], width), jnp.uint8)
    packed = jax.pure_callback(ask, answer, prefixes, vmap_method="broadcast_all")
    return jnp.unpackbits(packed, axis=-1, count=vocabulary, bitorder="little").astype(bool)


def warn_of_cut(grammar: BoundGrammar, texts: Array, ended: Array) -> None:
    """Say so where drawn texts stop in the middle of the grammar.

    :param texts: ``(..., max_tokens)``, padded behind.
    :param ended: ``(...,)``, which of them have an end.
    """

    def warn(texts: Array, ended: Array) -> None:
        rows = np.asarray(texts)[~np.asarray(ended)]
        if len(rows):
            grammar.warn_of_cut([[int(token) for token in row if token != PAD] for row in rows], texts.shape[-1])

    @custom_vmap
    def leave(texts: Array, ended: Array) -> tuple[()]:
        jax.debug.callback(warn, texts, ended)
        return ()

    # Of itself a callback is compiled once for each row that it is mapped over; here one has all rows.
    @leave.def_vmap
    def _(size: int, mapped: Any, texts: Array, ended: Array) -> tuple[tuple[()], tuple[()]]:
        every = [
            value if is_mapped else jnp.broadcast_to(value, (size, *value.shape))
            for value, is_mapped in zip((texts, ended), mapped, strict=True)
        ]
        return leave(*every), ()

    leave(texts, ended)
