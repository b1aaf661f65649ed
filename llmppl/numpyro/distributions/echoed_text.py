"""A text that is said again, now and then with a mistake."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, random

from llmppl.numpyro.distributions.autoregressive_text import expanded
from llmppl.numpyro.distributions.conditioning import LanguageModel
from llmppl.numpyro.distributions.derived_text import DerivedText
from llmppl.numpyro.distributions.discreteness import refuse_pathwise
from llmppl.numpyro.network.text_arrays import check_batch, check_text, widen
from llmppl.text import PAD
from llmppl.text.echoes import check_echo


class EchoedText(DerivedText):
    r"""A text as it is, and with probability ``mistake`` any text of up to ``T`` tokens.

    .. math:: p(t \mid z) = (1 - \varepsilon)\, 1[t = z] + \varepsilon\, \frac{V^{-|t|}}{T + 1}\, 1[|t| \le T]

    from a vocabulary of ``V``. ``T`` is the program's to say, not the width of ``z``: that of a computed text is of
    the longest of all rows, and a row's density must not depend on others. As
    :class:`llmppl.distributions.EchoedText`. Made by :meth:`llmppl.numpyro.LM.echo`.

    :param lm: the language model whose tokens these are.
    :param text: text array of shape ``batch_shape + (W,)``.
    :param mistake: :math:`\varepsilon`, in (0, 1).
    :param max_tokens: ``T``.
    :raises ValueError: either out of its range.
    """

    what = "an echo is of its own text"
    pytree_aux_fields = ("lm", "mistake", "max_tokens")

    def __init__(
        self,
        lm: LanguageModel,
        text: Array,
        mistake: float,
        max_tokens: int,
        batch_shape: tuple[int, ...] | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        check_echo(mistake, max_tokens)
        self.mistake, self.max_tokens = mistake, max_tokens
        width = max(text.shape[-1], max_tokens)
        super().__init__(lm, widen(text, width), width, batch_shape, validate_args)

    def expand(self, batch_shape: Sequence[int]) -> EchoedText:
        """The text is not repeated.

        :raises ValueError: a shape that the batch shape does not broadcast to.
        """
        shape = tuple(batch_shape)
        if shape == self.batch_shape:
            return self
        validate = self.__dict__.get("_validate_args")
        return EchoedText(
            self.lm, self.text, self.mistake, self.max_tokens, expanded(self.batch_shape, shape), validate_args=validate
        )

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Texts of shape ``sample_shape + batch_shape + (max(T, W),)``."""
        refuse_pathwise(self)
        shape, width = tuple(sample_shape) + self.batch_shape, self.text.shape[-1]
        keys = random.split(key, 3)
        length = random.randint(keys[0], (*shape, 1), 0, self.max_tokens + 1)
        other = random.randint(keys[1], (*shape, width), 0, self.lm.vocabulary, jnp.int32)
        other = jnp.where(jnp.arange(width) < length, other, PAD)
        wrong = random.uniform(keys[2], (*shape, 1)) < self.mistake
        return jnp.where(wrong, other, jnp.broadcast_to(self.text, (*shape, width)))

    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        """Log-probability in nats, of shape ``broadcast(value.shape[:-1], batch_shape)``; −inf of another text
        than the echo's that has more than ``T`` tokens.

        :raises TypeError, ValueError: no well-formed text array; one whose rows do not broadcast.
        """
        value = check_text(value, "value", self.lm.vocabulary)
        check_batch(value, self.batch_shape)
        count = (value != PAD).sum(-1)
        dtype = jnp.promote_types(self.lm.dtype, jnp.float32)
        other = (
            math.log(self.mistake) - math.log(self.max_tokens + 1) - count.astype(dtype) * math.log(self.lm.vocabulary)
        )
        other = jnp.where(count <= self.max_tokens, other, -jnp.inf)
        width = max(value.shape[-1], self.text.shape[-1])
        same = (widen(value, width) == widen(self.text, width)).all(-1)
        found = jnp.logaddexp(jnp.where(same, math.log1p(-self.mistake), -jnp.inf).astype(dtype), other)
        return jnp.broadcast_to(found, jnp.broadcast_shapes(found.shape, self.batch_shape))

    def __repr__(self) -> str:
        return f"EchoedText(batch_shape={self.batch_shape}, mistake={self.mistake}, max_tokens={self.max_tokens})"
