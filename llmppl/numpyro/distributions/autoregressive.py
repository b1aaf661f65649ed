"""The distribution over the continuation of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from numpyro.distributions import Distribution, constraints

from llmppl.numpyro.decoder import Past, Weights
from llmppl.numpyro.discreteness import refuse_pathwise
from llmppl.numpyro.reading import Reader, Reading, shares
from llmppl.numpyro.stopping import TextLaw, _Text, enumerate_texts
from llmppl.numpyro.text import check_text, is_concrete
from llmppl.padding import PAD

if TYPE_CHECKING:
    from llmppl.numpyro.language_model import LM


class AutoregressiveText(Distribution):
    r"""The law of the continuation of a context, as a process: tokens until a stop token or ``max_tokens``.

    .. math:: p(z) = \prod_t p(z_t \mid \text{context}, z_{<t})

    Made by calling an :class:`llmppl.numpyro.LM`. Values are int32 arrays ``batch_shape + (max_tokens,)``, padded with
    ``PAD`` behind the end. With ``max_tokens=None`` it is the unbounded stream: :meth:`log_prob` is the probability
    that the stream begins with the value, and it cannot be sampled.

    It is a pytree whose leaves are the weights, the context and the law, so that it can be an argument of compiled
    functions.

    :param lm: the language model.
    :param context: text arrays, read one after the other; each has its own batch shape, padding in them is skipped.
    :param law: stop tokens, lengths, temperature, vocabulary.
    :param lora: low-rank additions to the weights, as a guide has them, or ``None``: the model itself.
    """

    arg_constraints: dict[str, Any] = {}
    reparametrized_params: list[str] = []
    pytree_data_fields = ("weights", "context", "law", "lora")
    pytree_aux_fields = ("lm",)

    def __init__(
        self,
        lm: LM,
        context: Sequence[Array],
        law: TextLaw,
        lora: Weights | None = None,
        batch_shape: tuple[int, ...] | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.lm, self.law, self.lora = lm, law, lora
        self.context = tuple(context)
        self.weights = lm.weights
        lm.check_length(sum(text.shape[-1] for text in self.context), law.max_tokens or 0)
        heat = law.temperature
        shapes = [text.shape[:-1] for text in self.context] + [getattr(heat, "shape", ())]
        own = np.broadcast_shapes(*shapes)
        shape = own if batch_shape is None else np.broadcast_shapes(own, batch_shape)
        # The stream has no length of its own; NumPyro broadcasts a length of one with any.
        super().__init__(tuple(shape), (law.max_tokens or 1,), validate_args=validate_args)

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
        """The context is not repeated: all rows share what is read of it."""
        shape = tuple(batch_shape)
        if shape == self.batch_shape:
            return self
        return AutoregressiveText(
            self.lm, self.context, self.law, self.lora, shape, validate_args=self.__dict__.get("_validate_args")
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
        tokens, scores = self.draw(key, sample_shape)
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

        def step(carry: tuple[Any, ...], at: tuple[Array, Array]) -> tuple[tuple[Any, ...], tuple[Array, Array]]:
            cache, state, ended = carry
            number, own_key = at
            log_probs = law.log_probs(reader.logits(state)[..., None, :], number[None])[..., 0, :]
            token = random.categorical(own_key, log_probs / heat[..., None], axis=-1).astype(jnp.int32)
            score = jnp.take_along_axis(log_probs, token[..., None], -1)[..., 0]
            token, score = jnp.where(ended, PAD, token), jnp.where(ended, 0.0, score)
            written = Reading(cache, state, state, count + number)
            new = reader.stretch(token[..., None], [*before, written])
            cache = Past(
                lax.dynamic_update_slice_in_dim(cache.keys, new.past.keys, number, -3),
                lax.dynamic_update_slice_in_dim(cache.values, new.past.values, number, -3),
                lax.dynamic_update_slice_in_dim(cache.seen, new.past.seen, number, -1),
            )
            return (cache, new.states[..., 0, :], ended | law.ends(token)), (token, score)

        ended = jnp.zeros(shape, bool)
        keys = random.split(key, length)
        _, (tokens, scores) = lax.scan(step, (empty, state, ended), (jnp.arange(length), keys))
        return jnp.moveaxis(tokens, 0, -1), jnp.moveaxis(scores, 0, -1)

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
        if self.law.max_tokens is None:
            self.lm.check_length(sum(text.shape[-1] for text in self.context), value.shape[-1])
        elif value.shape[-1] > self.law.max_tokens and not is_concrete(value):
            raise ValueError(
                f"the value has room for {value.shape[-1]} tokens, max_tokens is {self.law.max_tokens}: pass "
                "lm.encode(text, width=max_tokens)."
            )
        if self._validate_args:
            self._validate_sample(value)
        reader = Reader(self.lm.architecture, self.weights, self.lora)
        before = reader.stretches(self.context)
        length = value.shape[-1]
        first = before[-1].last[..., None, :]
        if length == 1:
            states = first
        else:
            # The last token is read only where another site may be told it.
            texts = (*self.context, value if shares() else value[..., :-1])
            rest = reader.stretches(texts)[-1].states[..., : length - 1, :]
            shape = jnp.broadcast_shapes(first.shape[:-2], rest.shape[:-2])
            first, rest = (jnp.broadcast_to(s, (*shape, *s.shape[-2:])) for s in (first, rest))
            states = jnp.concatenate([first, rest], -2)
        log_probs = self.law.log_probs(reader.logits(states), jnp.arange(length))
        shape = jnp.broadcast_shapes(log_probs.shape[:-2], value.shape[:-1], self.batch_shape)
        log_probs = jnp.broadcast_to(log_probs, (*shape, *log_probs.shape[-2:]))
        value = jnp.broadcast_to(value, (*shape, length))
        scores = jnp.take_along_axis(log_probs, jnp.maximum(value, 0)[..., None], -1)[..., 0]
        scores = jnp.where(value == PAD, 0.0, scores)
        return jnp.where(_Text(self.law)(value)[..., None], scores, -jnp.inf)

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
        parts += [] if law.stop is None or not is_concrete(law.stop) else [f"{int(law.stop.sum())} stop tokens"]
        parts += ["with adapter"] if self.lora is not None else []
        return f"AutoregressiveText({', '.join(parts)})"
