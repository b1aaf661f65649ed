"""One of several given strings, weighted by a language model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro.distributions import Distribution, constraints
from numpyro.util import find_stack_level

from llmppl.numpyro.distributions.autoregressive_text import expanded, is_settled, own_batch_shape
from llmppl.numpyro.distributions.conditioning import LanguageModel
from llmppl.numpyro.distributions.discreteness import refuse_enumeration, refuse_pathwise
from llmppl.numpyro.network.decoder import Weights
from llmppl.numpyro.network.lifting import compiled
from llmppl.numpyro.network.reading import Reader
from llmppl.numpyro.network.scoring import token_scores
from llmppl.numpyro.network.text_arrays import check_batch, check_text, count, is_concrete, is_known, widen
from llmppl.text import PAD


class _Option(constraints.Constraint):
    """One of the rows of a text array of options."""

    is_discrete = True
    event_dim = 1

    def __init__(self, options: Array) -> None:
        self.options = options

    def __call__(self, value: Array) -> Array:
        return option_index(value, self.options) >= 0

    def feasible_like(self, prototype: Array) -> Array:
        row = widen(self.options[0], jnp.shape(prototype)[-1])
        return jnp.broadcast_to(row[: jnp.shape(prototype)[-1]], jnp.shape(prototype))

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return (self.options,), (("options",), {})

    def __repr__(self) -> str:
        return f"Option({len(self.options)} texts)"


def option_index(value: Array, options: Array) -> Array:
    """Which option each text is, of shape ``value.shape[:-1]``; −1 for none."""
    width = max(value.shape[-1], options.shape[-1])
    equal = (widen(value, width)[..., None, :] == widen(options, width)).all(-1)
    return jnp.where(equal.any(-1), equal.argmax(-1), -1)


class Choice(Distribution):
    r"""The finite distribution over given strings.

    .. math:: p(o_i) = \frac{P_i e^{t_i}}{\sum_j P_j e^{t_j}}, \qquad P_i = P(\text{the continuation begins with } o_i)

    Made by :meth:`llmppl.numpyro.LM.choice`. A value that is none of the options has log-probability −inf; where
    validation is on and the numbers are known, a warning says so.

    NumPyro enumerates in parallel only sites whose values are the numbers 0, 1, ..., and an option is a text:
    ``TraceEnum_ELBO`` and ``config_enumerate`` raise on this site. They are exact on the option's number::

        choice = lm.choice(beginning, options=["a mile", "a league"])
        number = numpyro.sample("plan", dist.Categorical(logits=choice.logits), infer={"enumerate": "parallel"})
        numpyro.sample("ending", lm(beginning, choice.option(number)), obs=ending)

    :param lm: the language model.
    :param context: text arrays as of :class:`AutoregressiveText`.
    :param options: text array of shape ``(n, T)``, none a prefix of another.
    :param lora: low-rank additions to the weights, or ``None``.
    :param given: normalised log-probabilities of the options that stand in for the model's, ``(n,)``.
    :param tilt: added to them before they are normalised, ``batch_shape + (n,)``, nats.
    """

    arg_constraints: dict[str, Any] = {}
    reparametrized_params: list[str] = []
    has_enumerate_support = True
    pytree_data_fields = ("weights", "context", "options", "lora", "given", "tilt")
    pytree_aux_fields = ("lm",)

    def __init__(
        self,
        lm: LanguageModel,
        context: Sequence[Array],
        options: Array,
        lora: Weights | None = None,
        batch_shape: tuple[int, ...] | None = None,
        *,
        weights: Weights | None = None,
        given: Array | None = None,
        tilt: Array | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.lm, self.context, self.options, self.lora, self.given = lm, tuple(context), options, lora, given
        self.tilt = tilt
        self.weights = lm.weights if weights is None else weights
        lm.check_length(count(self.context), options.shape[-1])
        tilted = () if tilt is None else np.shape(tilt)[:-1]
        shape = np.broadcast_shapes(own_batch_shape(self.context), batch_shape or (), tilted)
        super().__init__(shape, options.shape[-1:], validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        return False

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        return _Option(self.options)

    def with_context(self, context: Sequence[Array], lora: Weights | None) -> Choice:
        """The same options after another context, under another adapter, weighted by the model."""
        return Choice(
            self.lm, context, self.options, lora, self.batch_shape, validate_args=self.__dict__.get("_validate_args")
        )

    def expand(self, batch_shape: Sequence[int]) -> Choice:
        shape = tuple(batch_shape)
        if shape == self.batch_shape:
            return self
        return Choice(
            self.lm,
            self.context,
            self.options,
            self.lora,
            expanded(self.batch_shape, shape),
            weights=self.weights,
            given=self.given,
            tilt=self.tilt,
            validate_args=self.__dict__.get("_validate_args"),
        )

    @property
    def logits(self) -> Array:
        """Normalised log-probabilities of the options, of shape ``batch_shape + (n,)``, nats."""
        return _compiled_logits(self) if is_settled(self) else self._logits()

    def _logits(self) -> Array:
        found = self._untilted()
        return found if self.tilt is None else jax.nn.log_softmax(found + self.tilt, -1)

    def _untilted(self) -> Array:
        if self.given is not None:
            return jnp.broadcast_to(self.given, (*self.batch_shape, len(self.options)))
        reader = Reader(self.lm.architecture, self.weights, self.lora)
        before = reader.stretches(self.context)
        number, length = self.options.shape
        rows = before[-1].last.shape[:-1]
        # One more batch dimension, in front: the options.
        options = jnp.asarray(self.options).reshape((number,) + (1,) * len(rows) + (length,))
        first = jnp.broadcast_to(before[-1].last[..., None, :], (number, *rows, 1, before[-1].last.shape[-1]))
        states = first
        if length > 1:
            rest = reader.stretch(options[..., :-1], before).states
            rest = jnp.broadcast_to(rest, (number, *rows, *rest.shape[-2:]))
            states = jnp.concatenate([first, rest], -2)
        tokens = jnp.broadcast_to(options, (number, *rows, length))
        scores = token_scores(reader.head, self.lm.vocabulary, states, tokens)
        weights = jnp.moveaxis(jnp.where(tokens == PAD, 0.0, scores).sum(-1), 0, -1)
        return jnp.broadcast_to(jax.nn.log_softmax(weights, -1), (*self.batch_shape, number))

    def option(self, number: Array) -> Array:
        """The options of some numbers, ``number.shape + (T,)``."""
        return jnp.asarray(self.options)[number]

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
        return self.option(index), None

    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        """Log-probability in nats, of shape ``broadcast(value.shape[:-1], batch_shape)``; −inf for a text that is none
        of the options."""
        value = check_text(value, "value", self.lm.vocabulary)
        check_batch(value, self.batch_shape)
        if self._validate_args:
            self._validate_sample(value)
        index, logits = option_index(value, self.options), self.logits
        shape = jnp.broadcast_shapes(index.shape, self.batch_shape)
        logits, index = jnp.broadcast_to(logits, (*shape, logits.shape[-1])), jnp.broadcast_to(index, shape)
        chosen = jnp.take_along_axis(logits, jnp.maximum(index, 0)[..., None], -1)[..., 0]
        return jnp.where(index >= 0, chosen, -jnp.inf)

    def enumerate_support(self, expand: bool = True) -> Array:
        """The options: ``(n,) + batch_shape + (T,)``, or ones in place of the batch shape.

        :raises TypeError: NumPyro's parallel enumeration asks.
        """
        refuse_enumeration()
        options = jnp.asarray(self.options).reshape((len(self.options),) + (1,) * len(self.batch_shape) + (-1,))
        if not expand:
            return options
        return jnp.broadcast_to(options, (len(self.options), *self.batch_shape, options.shape[-1]))

    def _validate_sample(self, value: Array) -> Array:
        inside = self.support(value)
        if is_concrete(inside) and not np.all(inside):
            row = tuple(np.argwhere(~np.asarray(inside))[0].tolist())
            warnings.warn(
                "Out-of-support values provided to log prob method. The text "
                f"{self.lm.decode(np.asarray(value)[row])!r} (row {row}) is none of the options "
                f"{self.lm.decode(self.options)}. Its log-probability is -inf. Observe one of them, encoded by "
                "lm.encode.",
                stacklevel=find_stack_level(),
            )
        return inside

    def __repr__(self) -> str:
        options = repr(self.lm.decode(self.options)) if is_known(self.options) else f"{self.options!r}"
        more = ", with adapter" if self.lora is not None else ""
        more += ", tilted" if self.tilt is not None else ""
        return f"Choice(batch_shape={self.batch_shape}, options={options}{more})"


_compiled_logits = compiled(lambda fn: fn._logits())
