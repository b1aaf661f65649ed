"""The distribution over the continuation of a text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from numpyro.distributions import Distribution, constraints
from numpyro.util import find_stack_level

from llmppl.numpyro.distributions.conditioning import LanguageModel
from llmppl.numpyro.distributions.discreteness import refuse_pathwise
from llmppl.numpyro.network.decoder import Past, Weights
from llmppl.numpyro.network.grammar_masks import warn_of_cut
from llmppl.numpyro.network.lifting import compiled
from llmppl.numpyro.network.reading import Reader, Reading, shares
from llmppl.numpyro.network.scoring import token_scores
from llmppl.numpyro.network.text_arrays import check_batch, check_text, count, is_concrete, is_known
from llmppl.numpyro.network.text_law import TextLaw, _Text, enumerate_texts
from llmppl.text import PAD


class AutoregressiveText(Distribution):
    r"""The law of the continuation of a context, as a process: tokens until a stop token or ``max_tokens``.

    .. math:: p(z) = \prod_t p(z_t \mid \text{context}, z_{<t})

    Made by calling an :class:`llmppl.numpyro.LM`. Values are int32 arrays ``batch_shape + (max_tokens,)``, padded with
    ``PAD`` behind the end. With ``max_tokens=None`` it is the unbounded stream: :meth:`log_prob` is the probability
    that the stream begins with the value, and it cannot be sampled.

    It is a pytree whose leaves are the weights, the context and the law, so that it can be an argument of compiled
    functions. Outside of them drawing and scoring compile themselves, once for each shape.

    A value outside the support has log-probability −inf; where validation is on and the numbers are known, a warning
    says what is wrong with it, as NumPyro does.

    :param lm: the language model.
    :param context: text arrays, read one after the other; each has its own batch shape, padding in them is skipped.
    :param law: stop tokens, lengths, temperature, vocabulary, grammar.
    :param lora: low-rank additions to the weights, as a guide has them, or ``None``: the model itself.
    """

    arg_constraints: dict[str, Any] = {}
    reparametrized_params: list[str] = []
    pytree_data_fields = ("weights", "context", "law", "lora")
    pytree_aux_fields = ("lm",)

    def __init__(
        self,
        lm: LanguageModel,
        context: Sequence[Array],
        law: TextLaw,
        lora: Weights | None = None,
        batch_shape: tuple[int, ...] | None = None,
        *,
        weights: Weights | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.lm, self.law, self.lora = lm, law, lora
        self.context = tuple(context)
        self.weights = lm.weights if weights is None else weights
        if law.max_tokens is not None:
            lm.check_length(count(self.context), law.max_tokens)
        shape = np.broadcast_shapes(own_batch_shape(self.context, law.temperature), batch_shape or ())
        # The stream has no length of its own; NumPyro broadcasts a length of one with any.
        super().__init__(shape, (law.max_tokens or 1,), validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """No: with nothing said, a distribution without constrained arguments counts as reparametrised."""
        return False

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        return _Text(self.law)

    def with_context(self, context: Sequence[Array], lora: Weights | None) -> AutoregressiveText:
        """The same law after another context, under another adapter."""
        return AutoregressiveText(
            self.lm, context, self.law, lora, self.batch_shape, validate_args=self.__dict__.get("_validate_args")
        )

    def expand(self, batch_shape: Sequence[int]) -> AutoregressiveText:
        """The context is not repeated: all rows share what is read of it.

        :raises ValueError: a shape that the batch shape does not broadcast to.
        """
        shape = tuple(batch_shape)
        if shape == self.batch_shape:
            return self
        return AutoregressiveText(
            self.lm,
            self.context,
            self.law,
            self.lora,
            expanded(self.batch_shape, shape),
            weights=self.weights,
            validate_args=self.__dict__.get("_validate_args"),
        )

    # --- drawing -----------------------------------------------------------------------------------

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw texts of shape ``sample_shape + batch_shape + (max_tokens,)``.

        :raises ValueError: the unbounded stream.
        """
        return self.sample_with_intermediates(key, sample_shape)[0]

    def sample_with_intermediates(self, key: Array, sample_shape: tuple[int, ...] = ()) -> tuple[Array, list[Any]]:
        """Draw texts, and the log-probability of each token recorded while drawing, nats, of the same shape."""
        refuse_pathwise(self)
        draw = _compiled_draw if is_settled(self, key) else AutoregressiveText.draw
        tokens, scores = draw(self, key, tuple(sample_shape))
        return tokens, [scores]

    def draw(self, key: Array, sample_shape: tuple[int, ...] = (), heat: Array | float = 1.0) -> tuple[Array, Array]:
        """As :meth:`sample_with_intermediates`, without gradients.

        :param heat: an extra temperature to draw at, of a shape that broadcasts with ``sample_shape + batch_shape``;
            the scores are those of the law itself.
        """
        law = self.law
        if law.max_tokens is None:
            raise ValueError(
                "the unbounded stream cannot be sampled: nothing ends it. Pass max_tokens to lm(...), and stop if a "
                "text may end earlier."
            )
        shape = tuple(sample_shape) + self.batch_shape
        reader = Reader(self.lm.architecture, self.weights, jax.tree.map(lax.stop_gradient, self.lora))
        before = reader.stretches(self.context)
        length = law.max_tokens
        architecture = self.lm.architecture
        dtype = before[-1].states.dtype
        size = (architecture.num_layers, *shape, length, architecture.kv_heads, architecture.head_dim)
        empty = Past(jnp.zeros(size, dtype), jnp.zeros(size, dtype), jnp.zeros((*shape, length), bool))
        state = jnp.broadcast_to(before[-1].last, (*shape, before[-1].last.shape[-1]))
        count = jnp.broadcast_to(before[-1].tokens, shape)
        heat = jnp.asarray(heat)

        def step(carry: tuple[Any, ...], at: tuple[Array, Array]) -> tuple[tuple[Any, ...], Array]:
            cache, state, text, ended = carry
            number, own_key = at
            logits = reader.logits(state[..., None, :])
            log_probs = law.log_probs(logits, number[None], text[..., None, :])[..., 0, :]
            token = choose(own_key, log_probs / heat[..., None])
            score = jnp.take_along_axis(log_probs, token[..., None], -1)[..., 0]
            token, score = jnp.where(ended, PAD, token), jnp.where(ended, 0.0, score)
            written = Reading(cache, state, state, count + number)
            new = reader.stretch(token[..., None], [*before, written])
            cache = Past(
                lax.dynamic_update_slice_in_dim(cache.keys, new.past.keys, number, -3),
                lax.dynamic_update_slice_in_dim(cache.values, new.past.values, number, -3),
                lax.dynamic_update_slice_in_dim(cache.seen, new.past.seen, number, -1),
            )
            ended = ended | law.ends(text, token)
            text = lax.dynamic_update_slice_in_dim(text, token[..., None], number, -1)
            return (cache, new.states[..., 0, :], text, ended), score

        text, ended = jnp.full((*shape, length), PAD, jnp.int32), jnp.zeros(shape, bool)
        keys = random.split(key, length)
        (_, _, text, ended), scores = lax.scan(step, (empty, state, text, ended), (jnp.arange(length), keys))
        if law.grammar is not None:
            warn_of_cut(law.grammar, text, ended)
        return text, jnp.moveaxis(scores, 0, -1)

    # --- scoring -----------------------------------------------------------------------------------

    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        """Log-probability in nats, of shape ``broadcast(value.shape[:-1], batch_shape)``.

        :param intermediates: what was recorded while drawing; used where no adapter could want a gradient.
        """
        if intermediates and self.lora is None and not isinstance(self.law.temperature, jax.core.Tracer):
            return intermediates[0].sum(-1)
        return self.token_log_prob(value).sum(-1)

    def token_log_prob(self, value: Array) -> Array:
        """Log-probability of each token, in nats, zero behind the end.

        :returns: shape ``broadcast(value.shape[:-1], batch_shape) + (T,)``.
        """
        value = check_text(value, "value", self.law.vocabulary)
        check_batch(value, self.batch_shape)
        if self.law.max_tokens is None:
            self.lm.check_length(count(self.context), count((value,)))
        if self._validate_args:
            self._validate_sample(value)
        score = _compiled_scores if is_settled(self, value) else AutoregressiveText._scores
        return score(self, value)

    def _scores(self, value: Array) -> Array:
        inside, width, law = _Text(self.law)(value), value.shape[-1], self.law
        if law.max_tokens is not None and width > law.max_tokens:
            # What stands there is padding, or the text is none of the support.
            value = value[..., : law.max_tokens]
        reader = Reader(self.lm.architecture, self.weights, self.lora)
        before = reader.stretches(self.context)
        length = value.shape[-1]
        first = before[-1].last[..., None, :]
        if length == 1:
            states = first
        else:
            # The last token is read only where another site may be told it.
            read = value if shares() else value[..., :-1]
            # What stands before it may have been read with it, in one stretch.
            rest = reader.stretches((*self.context, read))[-1].states[..., -read.shape[-1] :, :][..., : length - 1, :]
            shape = jnp.broadcast_shapes(first.shape[:-2], rest.shape[:-2])
            first, rest = (jnp.broadcast_to(s, (*shape, *s.shape[-2:])) for s in (first, rest))
            states = jnp.concatenate([first, rest], -2)
        scores = self._token_scores(reader, states, value)
        shape = jnp.broadcast_shapes(scores.shape[:-1], self.batch_shape)
        scores, value = (jnp.broadcast_to(x, (*shape, length)) for x in (scores, value))
        scores = jnp.where(value == PAD, 0.0, scores)
        scores = jnp.pad(scores, [(0, 0)] * len(shape) + [(0, width - length)])
        return jnp.where(inside[..., None], scores, -jnp.inf)

    def _token_scores(self, reader: Reader, states: Array, value: Array) -> Array:
        """Log-probability of each token of a text of the support, ``(..., T)``, nats."""
        law, steps = self.law, jnp.arange(value.shape[-1])
        if not law.reads_prefix:
            return token_scores(reader.head, law.vocabulary, law.tempered(states), value, law.possible(steps))
        # Masks of a grammar, or of what would end the text too early, are as large as the logits.
        prefixes = jnp.where(steps < steps[:, None], value[..., None, :], PAD)
        log_probs = law.log_probs(reader.logits(states), steps, prefixes)
        return jnp.take_along_axis(log_probs, jnp.maximum(value, 0)[..., None], -1)[..., 0]

    def _validate_sample(self, value: Array) -> Array:
        inside = self.support(value)
        if is_concrete(inside) and not np.all(inside):
            warnings.warn(self._why_outside(np.asarray(value), np.asarray(inside)), stacklevel=find_stack_level())
        return inside

    def _why_outside(self, value: np.ndarray, inside: np.ndarray) -> str:
        law = self.law
        row = tuple(np.argwhere(~inside)[0].tolist())
        text = value[row]
        tokens = [int(token) for token in text if token != PAD]
        if not tokens:
            reason = "it is empty; a text has at least one token"
        elif law.max_tokens is not None and len(tokens) > law.max_tokens:
            reason = f"it has {len(tokens)} tokens, more than max_tokens={law.max_tokens}"
        elif len(tokens) < law.min_tokens:
            reason = f"it has {len(tokens)} tokens, fewer than min_tokens={law.min_tokens}"
        elif law.allowed is not None and not np.asarray(law.allowed)[tokens].all():
            reason = "it holds tokens that allowed= excludes"
        elif np.asarray(law.ended(jnp.array(tokens[:-1], dtype=jnp.int32))).any():
            reason = "a stop token stands before its end"
        else:
            reason = f"it neither ends with a stop token nor has max_tokens={law.max_tokens} tokens"
        return (
            f"Out-of-support values provided to log prob method. The text {self.lm.decode(text)!r} (row {row}) is "
            f"outside the support {self.support}: {reason}. Its log-probability is -inf. For an observed text of any "
            "form leave stop and max_tokens out of lm(...)."
        )

    def enumerate_support(self, expand: bool = True) -> Array:
        """Every text: ``(n,) + batch_shape + (max_tokens,)``, or ones in place of the batch shape.

        :raises ValueError: more than a million texts, or the unbounded stream.
        """
        texts = jnp.asarray(enumerate_texts(self.law))
        texts = texts.reshape((len(texts),) + (1,) * len(self.batch_shape) + (-1,))
        return jnp.broadcast_to(texts, (len(texts), *self.batch_shape, texts.shape[-1])) if expand else texts

    def __repr__(self) -> str:
        law = self.law
        parts = [f"batch_shape={self.batch_shape}"]
        parts += ["unbounded stream"] if law.max_tokens is None else [f"max_tokens={law.max_tokens}"]
        parts += [f"min_tokens={law.min_tokens}"] if law.min_tokens else []
        parts += [law.described_stop()] if law.stop is not None and is_known(law.stop) else []
        known = law.allowed is not None and is_known(law.allowed)
        parts += [f"{int(np.asarray(law.allowed).sum())} allowed tokens"] if known else []
        fixed = isinstance(law.temperature, (int, float))
        parts += [] if fixed and law.temperature == 1 else [f"temperature={law.temperature if fixed else 'an array'}"]
        parts += [f"{law.grammar!r}"] if law.grammar is not None else []
        parts += ["with adapter"] if self.lora is not None else []
        return f"AutoregressiveText({', '.join(parts)})"


def choose(key: Array, log_probs: Array) -> Array:
    """A token for each row of ``(..., V)``: a block of tokens, then one in it, each by a uniform number and a
    cumulative sum.

    A random number for each token of the vocabulary took longer than the network's last layer. In single precision a
    uniform number has 2²³ values: the blocks' probabilities, about √V of them, are met to 10⁻⁷ each, those within a
    block to 10⁻⁷ of the block's. Tokens of probability zero are not drawn.
    """
    probs = jax.nn.softmax(log_probs, -1)
    vocabulary = probs.shape[-1]
    width = max(int(vocabulary**0.5), 1)
    blocks = jnp.pad(probs, [(0, 0)] * (probs.ndim - 1) + [(0, -vocabulary % width)])
    blocks = blocks.reshape(*probs.shape[:-1], -1, width)
    first, second = random.split(key)
    block = _reached(first, blocks.sum(-1))
    within = _reached(second, jnp.take_along_axis(blocks, block[..., None, None], -2)[..., 0, :])
    return (block * width + within).astype(jnp.int32)


def _reached(key: Array, weights: Array) -> Array:
    """Which entry of ``(..., n)`` weights a uniform share of their total falls on."""
    steps = jnp.cumsum(weights, -1)
    point = random.uniform(key, (*weights.shape[:-1], 1), weights.dtype) * steps[..., -1:]
    # Rounding must not end on an entry of weight zero behind the last.
    last = weights.shape[-1] - 1 - jnp.argmax(weights[..., ::-1] > 0, -1)
    return jnp.minimum((steps <= point).sum(-1), last)


def own_batch_shape(context: Sequence[Array], *others: Any) -> tuple[int, ...]:
    """What the texts of a context, and numbers that vary with them, broadcast to."""
    return tuple(np.broadcast_shapes(*(text.shape[:-1] for text in context), *(np.shape(x) for x in others)))


def expanded(batch_shape: tuple[int, ...], wanted: Sequence[int]) -> tuple[int, ...]:
    """``wanted``, if ``batch_shape`` broadcasts to it."""
    fits = len(batch_shape) <= len(wanted)
    if not fits or any(n not in (1, m) for n, m in zip(batch_shape[::-1], tuple(wanted)[::-1], strict=False)):
        raise ValueError(
            f"a distribution of batch shape {tuple(batch_shape)} cannot be expanded to {tuple(wanted)}. Give the "
            "pieces of its context, or its plates, the same number of rows."
        )
    return tuple(wanted)


def is_settled(*trees: Any) -> bool:
    """Whether nothing is being traced: then a function of these may be compiled by itself."""
    return not shares() and all(is_concrete(leaf) for leaf in jax.tree.leaves(trees))


_compiled_draw = compiled(lambda fn, key, shape: fn.draw(key, shape), static_argnums=2)
_compiled_scores = compiled(lambda fn, value: fn._scores(value))
