"""A text as one particle writes it, a token at a time: what was read, and the law of what comes next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from llmppl.numpyro.distributions.autoregressive_text import AutoregressiveText
from llmppl.numpyro.inference.following import Follow
from llmppl.numpyro.network.decoder import Past
from llmppl.numpyro.network.reading import Reader, Reading
from llmppl.numpyro.network.text_law import TextLaw


class Stream(NamedTuple):
    """What a network has read of a text and of what stands before it.

    :param before: the context's stretches.
    :param written: keys and values of the tokens written so far, room for all.
    :param state: what predicts the next token, ``batch_shape + (D,)``.
    :param law: of the tokens.
    """

    before: tuple[Reading, ...]
    written: Past
    state: Array
    law: TextLaw

    def following(self, follow: Follow) -> Stream:
        """The stream of the particle that this one goes on from."""
        before = tuple(
            Reading(_past(r.past, follow), state := follow(r.last, 1), state, follow(r.tokens, 0)) for r in self.before
        )
        return Stream(before, _past(self.written, follow), follow(self.state, 1), followed_law(self.law, follow))


def followed_law(law: TextLaw, follow: Follow) -> TextLaw:
    """The law of the particle that this one goes on from: a latent may set its temperature and what it allows."""
    if not isinstance(law.temperature, (int, float)):
        law = replace(law, temperature=follow(law.temperature, 0))
    return law if law.allowed is None else replace(law, allowed=follow(jnp.asarray(law.allowed), 1))


class Writer:
    """The network that reads along at one text site; it holds no state."""

    def __init__(self, fn: AutoregressiveText) -> None:
        self.fn = fn
        self.reader = Reader(fn.lm.architecture, fn.weights, fn.lora)

    def start(self) -> Stream:
        """The context read, nothing written."""
        before = self.reader.stretches(self.fn.context)
        shape, length, architecture = self.fn.batch_shape, self.fn.event_shape[0], self.fn.lm.architecture
        dtype = before[-1].states.dtype
        size = (architecture.num_layers, *shape, length, architecture.kv_heads, architecture.head_dim)
        written = Past(jnp.zeros(size, dtype), jnp.zeros(size, dtype), jnp.zeros((*shape, length), bool))
        state = jnp.broadcast_to(before[-1].last, (*shape, before[-1].last.shape[-1]))
        # All states of the context are not needed any more.
        slim = tuple(Reading(r.past, r.last, r.last, r.tokens) for r in before)
        return Stream(slim, written, state, self.fn.law)

    def next(self, stream: Stream, number: Array, tokens: Array) -> Array:
        """Log-probabilities of the token after ``number``, ``batch_shape + (V,)``, nats.

        :param tokens: the text so far, ``batch_shape + (max_tokens,)``; only a grammar reads it.
        """
        logits = self.reader.logits(stream.state[..., None, :])
        return stream.law.log_probs(logits, number[None], tokens[..., None, :])[..., 0, :]

    def read(self, stream: Stream, token: Array, number: Array) -> Stream:
        """Read a token ``batch_shape``, the one after ``number`` others."""
        start = jnp.broadcast_to(stream.before[-1].tokens, token.shape)
        so_far = Reading(stream.written, stream.state, stream.state, start + number)
        new = self.reader.stretch(token[..., None], [*stream.before, so_far])
        old = stream.written
        written = Past(
            lax.dynamic_update_slice_in_dim(old.keys, new.past.keys, number, -3),
            lax.dynamic_update_slice_in_dim(old.values, new.past.values, number, -3),
            lax.dynamic_update_slice_in_dim(old.seen, new.past.seen, number, -1),
        )
        return stream._replace(written=written, state=new.states[..., 0, :])


def _past(past: Past, follow: Follow) -> Past:
    return Past(follow(past.keys, 3, 1), follow(past.values, 3, 1), follow(past.seen, 1))


def check_same_length(q: AutoregressiveText, p: Any) -> None:
    """Refuse a guide that writes texts of another length.

    :raises ValueError: with both numbers.
    """
    if q.law.max_tokens is None or q.event_shape != p.event_shape:
        raise ValueError(
            f"the guide writes texts of {q.law.max_tokens} tokens, the program {p.law.max_tokens}. Give both the same "
            "max_tokens."
        )
