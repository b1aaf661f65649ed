"""What texts have in common that come of another text without the network."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution, constraints

from llmppl.numpyro.distributions.conditioning import LanguageModel
from llmppl.text import PAD


class _AnyText(constraints.Constraint):
    """Token ids, then padding."""

    is_discrete = True
    event_dim = 1

    def __call__(self, value: Array) -> Array:
        return (value >= PAD).all(-1)

    def feasible_like(self, prototype: Array) -> Array:
        return jnp.full_like(prototype, PAD)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return (), ((), {})


class DerivedText(Distribution):
    """A law over texts that depends on another text alone, and asks nothing of the network.

    :param lm: the language model whose tokens these are.
    :param text: text array of shape ``batch_shape + (T,)``.
    :param width: most tokens of a value.
    """

    what: ClassVar[str]
    """What it is, as an error message says it."""

    arg_constraints: dict[str, Any] = {}
    reparametrized_params: list[str] = []
    support = _AnyText()
    pytree_data_fields: tuple[str, ...] = ("text",)
    pytree_aux_fields: tuple[str, ...] = ("lm",)

    def __init__(
        self,
        lm: LanguageModel,
        text: Array,
        width: int,
        batch_shape: tuple[int, ...] | None,
        validate_args: bool | None,
    ) -> None:
        self.lm, self.text = lm, text
        shape = np.broadcast_shapes(text.shape[:-1], batch_shape or ())
        super().__init__(shape, (width,), validate_args=validate_args)

    @property
    def context(self) -> tuple[Array, ...]:
        """What it depends on: its text."""
        return (self.text,)

    @property
    def has_rsample(self) -> bool:
        return False

    def with_context(self, context: Any, lora: Any) -> DerivedText:
        raise ValueError(f"{self.what}, which no guide changes. Observe it, or leave it to the program.")

    def draw(self, key: Array, sample_shape: tuple[int, ...] = (), heat: Array | float = 1.0) -> tuple[Array, None]:
        """Draw texts; nothing is recorded, and an extra temperature changes nothing."""
        return self.sample(key, sample_shape), None
