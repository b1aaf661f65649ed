"""What may come next: the law of one token given what stands before it, as :mod:`llmppl.stopping` for torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import constraints

from llmppl.grammar import BoundGrammar
from llmppl.numpyro.grammar import permitted
from llmppl.numpyro.text import is_known, is_right_padded, lengths
from llmppl.padding import PAD

Mask = Array | np.ndarray


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class TextLaw:
    """The law of a text as a process over tokens.

    :param vocabulary: number of tokens ``V``.
    :param max_tokens: most tokens of a text, the stop token included; ``None`` is the unbounded stream.
    :param min_tokens: fewest tokens of a text, the stop token included.
    :param stop: which tokens end a text, boolean ``(V,)``, or ``None``: nothing ends it early.
    :param allowed: which tokens may occur at all, boolean ``(V,)``, or ``None``.
    :param temperature: divides the logits; a number, or an array that broadcasts with the batch (a latent of the
        program, say: the log-probability is differentiable in it).
    :param grammar: what continuations a grammar permits, or ``None``. Its end token is one of ``stop``.
    """

    vocabulary: int
    max_tokens: int | None
    min_tokens: int
    stop: Mask | None
    allowed: Mask | None = None
    temperature: float | Array = 1.0
    grammar: BoundGrammar | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "min_tokens"):
            count = getattr(self, name)
            if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
                raise TypeError(f"{name} must be a whole number of tokens, got {count!r}. It cannot be a JAX value.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(
                f"max_tokens must be at least 1, got {self.max_tokens}. Leave it out for the unbounded stream."
            )
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must not be negative, got {self.min_tokens}.")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} is less than min_tokens={self.min_tokens}. "
                "Raise max_tokens or lower min_tokens."
            )
        if self.max_tokens is None and (self.stop is not None or self.min_tokens or self.grammar is not None):
            raise ValueError(
                "stop, min_tokens and grammar need max_tokens: without it the distribution is the unbounded stream, "
                "which never ends. Pass max_tokens, or leave the others out."
            )
        self._check_temperature()
        if is_known(self.allowed) and is_known(self.stop):
            self._check_masks()

    def _check_temperature(self) -> None:
        heat = self.temperature
        if not isinstance(heat, (int, float)) and not hasattr(heat, "dtype"):
            raise TypeError(f"temperature must be a number or an array of numbers, got {heat!r}.")
        if is_known(heat) and not bool(np.all((np.asarray(heat) > 0) & np.isfinite(np.asarray(heat)))):
            raise ValueError(
                f"temperature must be positive and finite, got {heat}. "
                "The most probable text is a matter of decoding, not of a distribution."
            )

    def _check_masks(self) -> None:
        """Whether some text is possible."""
        allowed, stop = self._masks()
        if not allowed.any():
            raise ValueError("allowed= permits no token at all. Allow at least one.")
        if self.grammar is not None and not (allowed & self.grammar.permitted([[]])[0]).any():
            raise ValueError(
                f"grammar={self.grammar!r} begins with no token that allowed= permits. Allow what it begins with."
            )
        if self.stop is None:
            return
        if not (allowed & stop).any():
            raise ValueError(
                "allowed= excludes every stop token, so no text could end. "
                "Allow at least one stop token, or leave stop out."
            )
        if self.min_tokens > 1 and not (allowed & ~stop).any():
            raise ValueError(
                f"min_tokens={self.min_tokens} cannot be reached: every allowed token is a stop token. "
                "Allow others, or lower min_tokens."
            )

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        static = self.temperature if isinstance(self.temperature, (int, float)) else None
        heat = None if static is not None else self.temperature
        counts = (self.vocabulary, self.max_tokens, self.min_tokens)
        return (self.stop, self.allowed, heat), (*counts, static, self.grammar)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, ...], children: tuple[Any, ...]) -> TextLaw:
        law = object.__new__(cls)
        stop, allowed, heat = children
        vocabulary, max_tokens, min_tokens, static, grammar = aux
        fields = {"vocabulary": vocabulary, "max_tokens": max_tokens, "min_tokens": min_tokens, "stop": stop}
        fields |= {"allowed": allowed, "temperature": heat if static is None else static, "grammar": grammar}
        for name, value in fields.items():  # unchecked: JAX puts in whatever it pleases
            object.__setattr__(law, name, value)
        return law

    def ends(self, tokens: Array) -> Array:
        """Which tokens end a text; padding does not."""
        if self.stop is None:
            return jnp.zeros(tokens.shape, dtype=bool)
        return jnp.asarray(self.stop)[jnp.clip(tokens, 0, self.vocabulary - 1)] & (tokens != PAD)

    def log_probs(self, logits: Array, step: Array, prefixes: Array | None) -> Array:
        """The log-probabilities of this law, nats, from the network's logits ``batch_shape + (T, V)``.

        :param step: how many tokens of the text stand before each, ``(T,)``.
        :param prefixes: the text so far before each, ``batch_shape + (T, n)``; only a grammar reads them.
        """
        # Embedding matrices are often padded beyond the tokenizer; those ids are no text.
        scaled = self.tempered(logits)[..., : self.vocabulary]
        scaled = scaled.astype(jnp.promote_types(scaled.dtype, jnp.float32))
        possible = self.possible(step)
        if possible is not None:
            scaled = jnp.where(possible, scaled, -jnp.inf)
        if self.grammar is not None:
            assert prefixes is not None
            # What follows an ended text is padding, and nobody's question.
            ended = self.ends(prefixes).any(-1, keepdims=True)
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

    @property
    def free_tokens(self) -> int:
        """How many tokens may follow one another in a text without ending it."""
        allowed, stop = self._masks()
        return int((allowed & ~stop).sum())

    def support_size(self) -> float:
        """Number of texts of the support (an upper bound under a grammar); infinite for the stream."""
        if self.max_tokens is None:
            return float("inf")
        allowed, stop = self._masks()
        stops, free = int((allowed & stop).sum()), int((allowed & ~stop).sum())
        ended = sum(float(free) ** (n - 1) * stops for n in range(max(self.min_tokens, 1), self.max_tokens + 1))
        return ended + float(free) ** self.max_tokens

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
        stops = xp.zeros(value.shape, bool)
        if law.stop is not None:
            stops = xp.asarray(law.stop)[xp.clip(value, 0, law.vocabulary - 1)] & ~pad
        ended = (stops & last).any(-1)
        valid = valid & ~(stops & ~last).any(-1) & (length <= law.max_tokens)
        return valid & (length >= law.min_tokens) & (ended | (length == law.max_tokens))

    def feasible_like(self, prototype: Array) -> Array:
        """A text of the support, as short as may be; where stop and allowed are not known, of zeros."""
        law = self.law
        if not is_known((law.allowed, law.stop)):
            return jnp.zeros_like(prototype)
        allowed, stop = law._masks()
        free, stops = np.flatnonzero(allowed & ~stop)[:1], np.flatnonzero(allowed & stop)[:1]
        count = max(law.min_tokens, 1) if len(stops) else law.max_tokens or 1
        row = [*(int(free[0]) for _ in range(count - len(stops))), *map(int, stops)]
        row = [*row, *[PAD] * prototype.shape[-1]][: prototype.shape[-1]]
        return jnp.broadcast_to(jnp.asarray(row, jnp.asarray(prototype).dtype), jnp.shape(prototype))

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return (self.law,), (("law",), {})

    def __repr__(self) -> str:
        law = self.law
        if law.max_tokens is None:
            return f"Text(vocabulary={law.vocabulary})"
        stops = (
            f", {int(np.asarray(law.stop).sum())} stop tokens" if is_known(law.stop) and law.stop is not None else ""
        )
        return f"Text(vocabulary={law.vocabulary}, min_tokens={law.min_tokens}, max_tokens={law.max_tokens}{stops})"


def enumerate_texts(law: TextLaw, limit: int = 1_000_000) -> np.ndarray:
    """Every text of a small support, of shape ``(n, max_tokens)``.

    :raises ValueError: unbounded, or more than ``limit`` texts.
    """
    size = law.support_size()
    if law.max_tokens is None or size > limit:
        raise ValueError(
            f"the support holds {size:.3g} texts; at most {limit:,} can be enumerated. "
            "Lower max_tokens, restrict the vocabulary with allowed=, or use importance sampling."
        )
    allowed, stop = law._masks()
    stops, free = np.flatnonzero(allowed & stop), np.flatnonzero(allowed & ~stop)
    open_texts = np.empty((1, 0), dtype=np.int32)
    finished = []
    for n in range(1, law.max_tokens + 1):
        if n >= max(law.min_tokens, 1):
            finished.append(_extend(open_texts, stops, law.max_tokens))
        open_texts = _extend(open_texts, free, n)
    texts = np.concatenate([*finished, open_texts])
    if law.grammar is None:
        return texts
    return texts[law.grammar.reachable([[int(token) for token in row if token != PAD] for row in texts])]


def _extend(texts: np.ndarray, tokens: np.ndarray, width: int) -> np.ndarray:
    """Every text followed by every token, padded to ``width``."""
    rows = np.concatenate([np.repeat(texts, len(tokens), 0), np.tile(tokens, len(texts))[:, None]], -1)
    return np.pad(rows, [(0, 0), (0, width - rows.shape[-1])], constant_values=PAD).astype(np.int32)
