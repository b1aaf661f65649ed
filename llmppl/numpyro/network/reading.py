"""Reading a text in stretches, each once: contexts that several particles, sites or tokens share.

Stretches keep the batch shape that they have themselves. A prompt that all particles share is read once however many
particles there are (under ``vmap`` too), and what a later site is told again is not read again inside :func:`sharing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import tree_leaves, tree_map

from llmppl.numpyro.network import decoder
from llmppl.numpyro.network.architecture import Architecture
from llmppl.numpyro.network.decoder import Past, Weights
from llmppl.text import PAD

VIRTUAL = "virtual_tokens"


class Reading(NamedTuple):
    """A stretch of text after it was read.

    :param past: its keys and values.
    :param states: the network's last states, ``(..., T, D)``.
    :param last: the state that predicts what follows, ``(..., D)``: at the last token of this stretch or, where it is
        all padding, of those before.
    :param tokens: how many so far, this stretch included, ``(...)``.
    """

    past: Past
    states: Array
    last: Array
    tokens: Array


class Reader:
    """A decoder under one set of weights.

    :param weights: frozen: no gradient flows into them.
    :param lora: low-rank additions, already scaled, with gradients; or ``None``. Under :data:`VIRTUAL` it may hold the
        embeddings ``(n, D)`` of virtual tokens, whose ids are those behind the embedding matrix.
    """

    def __init__(self, architecture: Architecture, weights: Weights, lora: Weights | None = None) -> None:
        self.architecture, self.lora = architecture, lora
        self._layers = None if lora is None else {name: own for name, own in lora.items() if name != VIRTUAL}
        self._virtual = None if lora is None else lora.get(VIRTUAL)
        self._given = weights
        self.weights = tree_map(lax.stop_gradient, weights)
        self._own: Memo = {}

    def stretch(self, tokens: Array, before: Sequence[Reading]) -> Reading:
        """Read ``(..., T)`` token ids, padding anywhere, after other stretches."""
        seen = tokens != PAD
        start = before[-1].tokens if before else jnp.zeros((), jnp.int32)
        positions = start[..., None] + jnp.maximum(jnp.cumsum(seen, -1) - 1, 0)
        embedded = decoder.embed(self.weights, self.architecture, tokens, positions, self._virtual)
        return self.embedded(embedded, positions, seen, before)

    def embedded(self, embedded: Array, positions: Array, seen: Array, before: Sequence[Reading]) -> Reading:
        """Read embeddings ``(..., T, D)``: tokens of the vocabulary, or virtual ones."""
        past = [reading.past for reading in before]
        shape = jnp.broadcast_shapes(embedded.shape[:-2], *(p.seen.shape[:-1] for p in past))
        # The batch of what was read before widens the states, but not the stretches before.
        embedded = jnp.broadcast_to(embedded, (*shape, *embedded.shape[-2:]))
        seen = jnp.broadcast_to(seen, (*shape, seen.shape[-1]))
        positions = jnp.broadcast_to(positions, seen.shape)
        states, new = decoder.forward(self.weights, self.architecture, embedded, positions, seen, past, self._layers)
        length = seen.shape[-1]
        place = length - 1 - jnp.argmax(seen[..., ::-1], -1)
        own = jnp.take_along_axis(states, place[..., None, None], -2)[..., 0, :]
        # Where nothing was read yet nothing can be predicted: NaN, lest a number be taken for a probability.
        last = jnp.where(seen.any(-1)[..., None], own, before[-1].last if before else jnp.nan)
        start = before[-1].tokens if before else 0
        return Reading(new, states, last, start + seen.sum(-1).astype(jnp.int32))

    def stretches(self, texts: Sequence[Array]) -> list[Reading]:
        """Read texts one after the other; what this reader read before, and inside :func:`sharing` what any did, is
        not read again: XLA does not see that two loops over the layers are the same."""
        shared = _memo.get()
        memo = self._own if shared is None else shared
        readings: list[Reading] = []
        whole: tuple[Any, ...] = (id(self._given), *(id(leaf) for leaf in tree_leaves(self.lora)))
        for own in _joined(texts):
            whole = (*whole, *map(_key, own))
            if whole not in memo:
                stretch = jnp.asarray(own[0]) if len(own) == 1 else jnp.concatenate(own, -1)
                # What the key names is kept, so that no id is used twice.
                memo[whole] = (self.stretch(stretch, readings), own, self._given, self.lora)
            readings.append(memo[whole][0])
        return readings

    @property
    def head(self) -> Array:
        """What states are multiplied with for logits, ``(V, D)``."""
        return decoder.head(self.weights)

    def logits(self, states: Array) -> Array:
        return decoder.logits(self.weights, self.architecture, states)


Memo = dict[tuple[Any, ...], Any]
_memo: ContextVar[Memo | None] = ContextVar("memo", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Inside this block every stretch of text is read once, for all sites together.

    Enter it inside the function that is transformed (by ``vmap``, ``grad`` or ``jit``), not around it. A block in
    another, for the body of a loop say, knows what was read before it; what it reads is forgotten at its end.
    """
    token = _memo.set(dict(_memo.get() or {}))
    try:
        yield
    finally:
        _memo.reset(token)


def shares() -> bool:
    """Whether readings are kept for other sites."""
    return _memo.get() is not None


def _joined(texts: Sequence[Array]) -> list[Sequence[Array]]:
    """The texts as they are read: a token that begins a text, or the padding in its place, with what follows it, as a
    loop over the layers of its own takes as long to compile as that over a long text."""
    if len(texts) > 1 and texts[0].shape[-1] == 1 and texts[0].shape[:-1] == texts[1].shape[:-1]:
        return [texts[:2], *([text] for text in texts[2:])]
    return [[text] for text in texts]


def _key(text: Any) -> Any:
    """Known numbers by value, those of a program being compiled by identity."""
    if isinstance(text, np.ndarray):
        return text.shape, text.tobytes()
    return id(text)
