"""Log-probabilities of given tokens from the network's last states, without the logits of a whole text in memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Sums = tuple[Array, Array, Any]

BLOCK = 4096
"""Tokens of the vocabulary that are looked at together."""


def token_scores(head: Array, vocabulary: int, states: Array, tokens: Array, possible: Any = None) -> Array:
    """Log-probability of each token, nats, of shape ``broadcast(states.shape[:-1], tokens.shape)``.

    :param head: what states are multiplied with for logits, ``(V, D)`` or larger: embedding matrices are often padded
        beyond the tokenizer. No gradient flows into it.
    :param vocabulary: number of tokens ``V``.
    :param states: the state before each token, ``(..., T, D)``.
    :param tokens: ids, ``(..., T)``; of padding the result means nothing.
    :param possible: which tokens may stand there at all, boolean ``(V,)`` or ``(T, V)``; ``None``: all. The given ones
        are taken to be possible.
    """
    head = lax.stop_gradient(head)
    wide = jnp.promote_types(states.dtype, jnp.float32)
    chosen = jnp.einsum("...d,...d->...", states, head[jnp.maximum(tokens, 0)], preferred_element_type=wide)
    return chosen - log_normaliser(vocabulary, states, head, possible)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def log_normaliser(vocabulary: int, states: Array, head: Array, possible: Any) -> Array:
    """The logarithm of the summed exponentials of the possible tokens' logits, ``states.shape[:-1]``, nats."""
    return _over_blocks(vocabulary, states, head, possible, False)[0]


@log_normaliser.defjvp
def _along(vocabulary: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    """Its gradient by a state is the mean row of the head, found in the same pass."""
    states, head, possible = primals
    total, mean = _over_blocks(vocabulary, states, head, possible, True)
    return total, (mean * tangents[0].astype(mean.dtype)).sum(-1)


def _over_blocks(vocabulary: int, states: Array, head: Array, possible: Any, averages: bool) -> tuple[Array, Any]:
    """The normaliser and, if asked for, the mean row of the head under the tokens' probabilities, ``(..., T, D)``.

    As blocks go by, sums are kept relative to the largest logit so far (Milakov and Gimelshein 2018, `Online normalizer
    calculation for softmax`, alg. 3).
    """
    wide = jnp.promote_types(states.dtype, jnp.float32)

    def block(sums: Sums, start: Any, width: int) -> tuple[Sums, None]:
        largest, total, mean = sums
        rows = lax.dynamic_slice_in_dim(head, start, width)
        logits = jnp.matmul(states, rows.T, preferred_element_type=wide)
        if possible is not None:
            logits = jnp.where(lax.dynamic_slice_in_dim(possible, start, width, -1), logits, -jnp.inf)
        new = jnp.maximum(largest, logits.max(-1))
        # While nothing possible was seen there is no largest logit.
        base = jnp.where(jnp.isneginf(new), 0.0, new)
        shares, shrunk = jnp.exp(logits - base[..., None]), jnp.exp(largest - base)
        total = total * shrunk + shares.sum(-1)
        if averages:
            added = jnp.matmul(shares.astype(rows.dtype), rows, preferred_element_type=wide)
            mean = mean * shrunk[..., None] + added
        return (new, total, mean), None

    shape = states.shape[:-1]
    sums = (
        jnp.full(shape, -jnp.inf, wide),
        jnp.zeros(shape, wide),
        jnp.zeros(states.shape, wide) if averages else None,
    )
    blocks, rest = divmod(vocabulary, BLOCK)
    if blocks:
        sums, _ = lax.scan(lambda sums, n: block(sums, n * BLOCK, BLOCK), sums, jnp.arange(blocks))
    if rest:
        sums, _ = block(sums, blocks * BLOCK, rest)
    largest, total, mean = sums
    return largest + jnp.log(total), None if mean is None else mean / total[..., None]
