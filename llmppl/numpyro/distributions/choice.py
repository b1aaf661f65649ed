"""One of several given strings, weighted by a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro.distributions import Distribution, constraints

from llmppl.numpyro.decoder import Weights
from llmppl.numpyro.discreteness import refuse_pathwise
from llmppl.numpyro.reading import Reader
from llmppl.numpyro.text import check_text
from llmppl.padding import PAD

if TYPE_CHECKING:
    from llmppl.numpyro.language_model import LM


class _Option(constraints.Constraint):
    """One of the rows of a text array of options."""

    is_discrete = True
    event_dim = 1

    def __init__(self, options: Array) -> None:
        self.options = options

    def __call__(self, value: Array) -> Array:
        return option_index(value, self.options) >= 0

    def feasible_like(self, prototype: Array) -> Array:
        return jnp.broadcast_to(self.options[0], prototype.shape)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return (self.options,), (("options",), {})

    def __repr__(self) -> str:
        return f"Option({len(self.options)} texts)"


def option_index(value: Array, options: Array) -> Array:
    """Which option each text is, of shape ``value.shape[:-1]``; −1 for none."""
    width = max(value.shape[-1], options.shape[-1])

    def widened(texts: Array) -> Array:
        missing = width - texts.shape[-1]
        return jnp.pad(texts, [(0, 0)] * (texts.ndim - 1) + [(0, missing)], constant_values=PAD)

    equal = (widened(value)[..., None, :] == widened(options)).all(-1)
    return jnp.where(equal.any(-1), equal.argmax(-1), -1)


class Choice(Distribution):
    r"""The finite distribution over given strings.

    .. math:: p(o_i) = \frac{P_i}{\sum_j P_j}, \qquad P_i = P(\text{the continuation begins with } o_i)

    Made by :meth:`llmppl.numpyro.LM.choice`. It enumerates.

    :param lm: the language model.
    :param context: text arrays as of :class:`AutoregressiveText`.
    :param options: text array of shape ``(n, T)``, none a prefix of another.
    :param lora: low-rank additions to the weights, or ``None``.
    """

    arg_constraints: dict[str, Any] = {}
    reparametrized_params: list[str] = []
    has_enumerate_support = True
    pytree_data_fields = ("weights", "context", "options", "lora")
    pytree_aux_fields = ("lm",)

    def __init__(
        self,
        lm: LM,
        context: Sequence[Array],
        options: Array,
        lora: Weights | None = None,
        batch_shape: tuple[int, ...] | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.lm, self.context, self.options, self.lora = lm, tuple(context), options, lora
        self.weights = lm.weights
        lm.check_length(sum(text.shape[-1] for text in self.context), options.shape[-1])
        own = np.broadcast_shapes(*(text.shape[:-1] for text in self.context))
        shape = own if batch_shape is None else np.broadcast_shapes(own, batch_shape)
        super().__init__(tuple(shape), options.shape[-1:], validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        return False

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        return _Option(self.options)

    def with_context(self, context: Sequence[Array], lora: Weights | None) -> Choice:
        """The same options after another context, under another adapter."""
        return Choice(
            self.lm, context, self.options, lora, self.batch_shape, validate_args=self.__dict__.get("_validate_args")
        )

    def expand(self, batch_shape: Sequence[int]) -> Choice:
        shape = tuple(batch_shape)
        if shape == self.batch_shape:
            return self
        return Choice(
            self.lm, self.context, self.options, self.lora, shape, validate_args=self.__dict__.get("_validate_args")
        )

    @property
    def logits(self) -> Array:
        """Normalised log-probabilities of the options, of shape ``batch_shape + (n,)``, nats."""
        reader = Reader(self.lm.architecture, self.weights, self.lora)
        before = reader.stretches(self.context)
        count, length = self.options.shape
        rows = before[-1].last.shape[:-1]
        # One more batch dimension, in front: the options.
        options = self.options.reshape((count,) + (1,) * len(rows) + (length,))
        first = jnp.broadcast_to(before[-1].last[..., None, :], (count, *rows, 1, before[-1].last.shape[-1]))
        states = first
        if length > 1:
            rest = reader.stretch(options[..., :-1], before).states
            rest = jnp.broadcast_to(rest, (count, *rows, *rest.shape[-2:]))
            states = jnp.concatenate([first, rest], -2)
        raw = reader.logits(states)[..., : self.lm.vocabulary]
        log_probs = jax.nn.log_softmax(raw.astype(jnp.promote_types(raw.dtype, jnp.float32)), -1)
        tokens = jnp.broadcast_to(options, (count, *rows, length))
        scores = jnp.take_along_axis(log_probs, jnp.maximum(tokens, 0)[..., None], -1)[..., 0]
        weights = jnp.moveaxis(jnp.where(tokens == PAD, 0.0, scores).sum(-1), 0, -1)
        return jnp.broadcast_to(jax.nn.log_softmax(weights, -1), (*self.batch_shape, count))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw options of shape ``sample_shape + batch_shape + (T,)``."""
        refuse_pathwise(self)
        return self.draw(key, sample_shape)[0]

    def draw(self, key: Array, sample_shape: tuple[int, ...] = (), heat: Array | float = 1.0) -> tuple[Array, None]:
        """Draw options at an extra temperature; nothing is recorded."""
        logits = jax.lax.stop_gradient(self.logits)
        heat = jnp.asarray(heat)
        shape = tuple(sample_shape) + self.batch_shape
        index = random.categorical(key, jnp.broadcast_to(logits, (*shape, logits.shape[-1])) / heat[..., None], axis=-1)
        return jnp.asarray(self.options)[index], None

    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        """Log-probability in nats, of shape ``broadcast(value.shape[:-1], batch_shape)``; −inf for a text that is none
        of the options."""
        value = check_text(value, "value", self.lm.vocabulary)
        if self._validate_args:
            self._validate_sample(value)
        index, logits = option_index(value, self.options), self.logits
        shape = jnp.broadcast_shapes(index.shape, self.batch_shape)
        logits, index = jnp.broadcast_to(logits, (*shape, logits.shape[-1])), jnp.broadcast_to(index, shape)
        chosen = jnp.take_along_axis(logits, jnp.maximum(index, 0)[..., None], -1)[..., 0]
        return jnp.where(index >= 0, chosen, -jnp.inf)

    def enumerate_support(self, expand: bool = True) -> Array:
        """The options: ``(n,) + batch_shape + (T,)``, or ones in place of the batch shape."""
        options = jnp.asarray(self.options).reshape((len(self.options),) + (1,) * len(self.batch_shape) + (-1,))
        if not expand:
            return options
        return jnp.broadcast_to(options, (len(self.options), *self.batch_shape, options.shape[-1]))

    def __repr__(self) -> str:
        return f"Choice(batch_shape={self.batch_shape}, {len(self.options)} options)"
