"""What may come next: the law of one token given what stands before it, as :mod:`llmppl.network.text_law` for torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import constraints

from llmppl.numpyro.network.grammar_masks import permitted
from llmppl.numpyro.network.text_arrays import is_known, is_right_padded, lengths
from llmppl.text import PAD
from llmppl.text.grammar import BoundGrammar
from llmppl.text.stop_automaton import END, StopAutomaton
from llmppl.text.text_support import (
    LARGEST,
    check_lengths,
    check_temperature,
    check_tokens,
    enumerate_rows,
    moves_of,
    shortest_row,
    support_size,
)

Mask = Array | np.ndarray


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class TextLaw:
    """The law of a text as a process over tokens.

    :param vocabulary: number of tokens ``V``.
    :param max_tokens: most tokens of a text, the stop token included; ``None`` is the unbounded stream.
    :param min_tokens: fewest tokens of a text, the stop token included.
    :param stop: which tokens end a text whatever stands before them, boolean ``(V,)``, or ``None``: nothing ends it
        early.
    :param allowed: which tokens may occur at all, boolean ``(V,)``, or ``None``.
    :param temperature: divides the logits; a number, or an array that broadcasts with the batch (a latent of the
        program, say: the log-probability is differentiable in it).
    :param grammar: what continuations a grammar permits, or ``None``. Its end token is one of ``stop``.
    :param automaton: which tokens end a text after what stands before, where stop strings are written by several
        tokens; those of ``stop`` among them.
    """

    vocabulary: int
    max_tokens: int | None
    min_tokens: int
    stop: Mask | None
    allowed: Mask | None = None
    temperature: float | Array = 1.0
    grammar: BoundGrammar | None = None
    automaton: StopAutomaton | None = None
    _table: Mask | None = field(default=None, init=False, repr=False)
    """The moves of the automaton, with a last state for texts that have ended: a leaf, as large as the vocabulary."""

    def __post_init__(self) -> None:
        if self.automaton is not None:
            moves = np.where(self.automaton.moves == END, self.automaton.size, self.automaton.moves)
            table = np.pad(moves, [(0, 1), (0, 0)], constant_values=self.automaton.size)
            object.__setattr__(self, "_table", table)
        ends = self.stop is not None or self.grammar is not None
        check_lengths(self.max_tokens, self.min_tokens, ends, " It cannot be a JAX value.")
        self._check_temperature()
        if is_known(self.allowed) and is_known(self.stop):
            self._check_masks()

    def _check_temperature(self) -> None:
        heat = self.temperature
        if not isinstance(heat, (int, float)) and not hasattr(heat, "dtype"):
            raise TypeError(f"temperature must be a number or an array of numbers, got {heat!r}.")
        if is_known(heat):
            check_temperature(heat, bool(np.all((np.asarray(heat) > 0) & np.isfinite(np.asarray(heat)))))

    def _check_masks(self) -> None:
        """Whether some text is possible."""
        check_tokens(*self.alphabet(), self.stop is not None, self.min_tokens)
        allowed, _ = self._masks()
        if self.grammar is not None and not (allowed & self.grammar.permitted([[]])[0]).any():
            raise ValueError(
                f"grammar={self.grammar!r} begins with no token that allowed= permits. Allow what it begins with."
            )

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        static = self.temperature if isinstance(self.temperature, (int, float)) else None
        heat = None if static is not None else self.temperature
        counts = (self.vocabulary, self.max_tokens, self.min_tokens)
        return (self.stop, self.allowed, heat, self._table), (*counts, static, self.grammar, self.automaton)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, ...], children: tuple[Any, ...]) -> TextLaw:
        law = object.__new__(cls)
        stop, allowed, heat, table = children
        vocabulary, max_tokens, min_tokens, static, grammar, automaton = aux
        fields = {"vocabulary": vocabulary, "max_tokens": max_tokens, "min_tokens": min_tokens, "stop": stop}
        fields |= {"allowed": allowed, "temperature": heat if static is None else static, "grammar": grammar}
        fields |= {"automaton": automaton, "_table": table}
        for name, value in fields.items():  # unchecked: JAX puts in whatever it pleases
            object.__setattr__(law, name, value)
        return law

    @property
    def reads_prefix(self) -> bool:
        """Whether what may come next depends on the tokens before, and not on their number alone."""
        return self.grammar is not None or (self.automaton is not None and self.min_tokens > 1)

    def ends(self, begun: Array, tokens: Array) -> Array:
        """Which tokens ``(...)`` end the texts that have begun with ``(..., n)``; padding does not."""
        if self.automaton is not None:
            state = self._states(begun)[..., -1]
            return (self._step(state, tokens) == self.automaton.size) & (tokens != PAD)
        return self._stops(tokens)

    def ended(self, texts: Array) -> Array:
        """Which tokens of texts ``(..., T)`` stand at the end of the text or behind it; padding does not."""
        if self.automaton is not None:
            if is_known(texts):
                return self.automaton.ended(np.asarray(texts))  # type: ignore[return-value]
            return (self._states(texts)[..., 1:] == self.automaton.size) & (texts != PAD)
        xp: Any = np if is_known((texts, self.stop)) else jnp
        return (xp.cumsum(self._stops(texts), -1) > 0) & (xp.asarray(texts) != PAD)

    def _stops(self, tokens: Array) -> Array:
        """Which tokens end a text whatever stands before them."""
        xp: Any = np if is_known((tokens, self.stop)) else jnp
        tokens = xp.asarray(tokens)
        if self.stop is None:
            return xp.zeros(tokens.shape, dtype=bool)
        return xp.asarray(self.stop)[xp.clip(tokens, 0, self.vocabulary - 1)] & (tokens != PAD)

    def _step(self, state: Array, token: Array) -> Array:
        assert self._table is not None
        after = jnp.asarray(self._table)[state, jnp.clip(token, 0, self.vocabulary - 1)]
        return jnp.where((token >= 0) & (token < self.vocabulary), after, state)

    def _states(self, texts: Array) -> Array:
        """The automaton's states before each token of ``(..., T)`` and after the last, ``(..., T + 1)``."""

        def step(state: Array, token: Array) -> tuple[Array, Array]:
            after = self._step(state, token)
            return after, after

        assert self._table is not None
        first = jnp.zeros(texts.shape[:-1], self._table.dtype)
        _, rest = jax.lax.scan(step, first, jnp.moveaxis(texts, -1, 0))
        return jnp.concatenate([first[..., None], jnp.moveaxis(rest, 0, -1)], -1)

    def log_probs(self, logits: Array, step: Array, prefixes: Array | None) -> Array:
        """The log-probabilities of this law, nats, from the network's logits ``batch_shape + (T, V)``.

        :param step: how many tokens of the text stand before each, ``(T,)``.
        :param prefixes: the text so far before each, ``batch_shape + (T, n)``; read where :attr:`reads_prefix`.
        """
        # Embedding matrices are often padded beyond the tokenizer; those ids are no text.
        scaled = self.tempered(logits)[..., : self.vocabulary]
        scaled = scaled.astype(jnp.promote_types(scaled.dtype, jnp.float32))
        possible = self.possible(step)
        if possible is not None:
            scaled = jnp.where(possible, scaled, -jnp.inf)
        if self.automaton is not None and self.min_tokens > 1:
            assert prefixes is not None
            assert self._table is not None
            closing = jnp.asarray(self._table)[self._states(prefixes)[..., -1]] == self.automaton.size
            scaled = jnp.where((step < self.min_tokens - 1)[:, None] & closing, -jnp.inf, scaled)
        if self.grammar is not None:
            assert prefixes is not None
            # What follows an ended text is padding, and nobody's question.
            ended = self.ended(prefixes).any(-1, keepdims=True)
            scaled = jnp.where(permitted(self.grammar, jnp.where(ended, self.grammar.end, prefixes)), scaled, -jnp.inf)
        return jax.nn.log_softmax(scaled, -1)

    def tempered(self, values: Array) -> Array:
        """Logits, or the states that they are linear in, ``batch_shape + (T, n)``, divided by the temperature."""
        heat = self.temperature
        if isinstance(heat, (int, float)) and heat == 1:
            return values
        wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        return wide / (heat if isinstance(heat, (int, float)) else jnp.asarray(heat)[..., None, None])

    def possible(self, step: Array) -> Array | None:
        """Which tokens may follow so many others, whatever a grammar says of it: boolean ``(V,)`` or ``(T, V)``, or
        ``None``: all.

        :param step: how many, ``(T,)``.
        """
        allowed = None if self.allowed is None else jnp.asarray(self.allowed)
        if self.stop is None or self.min_tokens <= 1:
            return allowed
        early = (step < self.min_tokens - 1)[:, None]
        late = ~(early & jnp.asarray(self.stop))
        return late if allowed is None else late & allowed

    def described_stop(self) -> str:
        """What ends a text, for a ``repr``."""
        if self.automaton is not None:
            return f"stop={', '.join(map(repr, self.automaton.strings))}"
        return f"{int(np.asarray(self.stop).sum())} stop tokens"

    @property
    def free_tokens(self) -> int:
        """How many tokens may follow one another in a text without ending it."""
        allowed, stop = self._masks()
        return int((allowed & ~stop).sum())

    def support_size(self) -> float:
        """Number of texts of the support (an upper bound under a grammar); infinite for the stream."""
        if self.max_tokens is None:
            return float("inf")
        return support_size(*self.alphabet(), self.min_tokens, self.max_tokens)

    def alphabet(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the tokens that may occur, ``(A,)``, and the state after each token of the vocabulary, ``(S, V)``."""
        allowed, stop = self._masks()
        return np.flatnonzero(allowed), moves_of(self.vocabulary, np.flatnonzero(stop).tolist(), self.automaton)

    def _masks(self) -> tuple[np.ndarray, np.ndarray]:
        if not (is_known(self.allowed) and is_known(self.stop)):
            raise ValueError(
                "the support can be enumerated only where stop and allowed are known numbers, and here they are "
                "arguments of a compiled program. Make the distribution inside it, by lm(...)."
            )
        allowed = np.ones(self.vocabulary, bool) if self.allowed is None else np.asarray(self.allowed)
        stop = np.zeros(self.vocabulary, bool) if self.stop is None else np.asarray(self.stop)
        return allowed, stop


class _Text(constraints.Constraint):
    """Well-formed texts of a law."""

    is_discrete = True
    event_dim = 1

    def __init__(self, law: TextLaw) -> None:
        self.law = law

    def __call__(self, value: Array) -> Array:
        law = self.law
        # Known numbers need no compiled program.
        xp: Any = np if is_known((value, law.stop, law.allowed)) else jnp
        value = xp.asarray(value)
        pad = value == PAD
        length = lengths(value)
        valid = (((value >= 0) & (value < law.vocabulary)) | pad).all(-1) & is_right_padded(value) & (length > 0)
        if law.allowed is not None:
            valid = valid & (xp.asarray(law.allowed)[xp.clip(value, 0, law.vocabulary - 1)] | pad).all(-1)
        if law.max_tokens is None:
            return valid
        last = xp.arange(value.shape[-1]) == length[..., None] - 1
        stops = law.ended(value)
        ended = (stops & last).any(-1)
        valid = valid & ~(stops & ~last).any(-1) & (length <= law.max_tokens)
        return valid & (length >= law.min_tokens) & (ended | (length == law.max_tokens))

    def feasible_like(self, prototype: Array) -> Array:
        """A text of the support, as short as may be; where stop and allowed are not known, of zeros."""
        law = self.law
        if not is_known((law.allowed, law.stop)):
            return jnp.zeros_like(prototype)
        row = shortest_row(*law.alphabet(), law.min_tokens, law.max_tokens)
        row = [*row, *[PAD] * prototype.shape[-1]][: prototype.shape[-1]]
        return jnp.broadcast_to(jnp.asarray(row, jnp.asarray(prototype).dtype), jnp.shape(prototype))

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return (self.law,), (("law",), {})

    def __repr__(self) -> str:
        law = self.law
        if law.max_tokens is None:
            return f"Text(vocabulary={law.vocabulary})"
        stops = f", {law.described_stop()}" if is_known(law.stop) and law.stop is not None else ""
        return f"Text(vocabulary={law.vocabulary}, min_tokens={law.min_tokens}, max_tokens={law.max_tokens}{stops})"


def enumerate_texts(law: TextLaw, limit: int = LARGEST) -> np.ndarray:
    """Every text of a small support, of shape ``(n, max_tokens)``.

    :raises ValueError: unbounded, or more than ``limit`` texts.
    """
    texts = enumerate_rows(*law.alphabet(), law.min_tokens, law.max_tokens, law.grammar, limit)
    return texts.astype(np.int32)
