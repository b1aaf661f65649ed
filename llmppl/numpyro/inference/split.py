"""A program's arguments as those of compiled code: strings become token ids, whole numbers and the like stay fixed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array

from llmppl.numpyro.language_model import LM
from llmppl.numpyro.tracing import Program, is_text, structure

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def with_texts(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments with :class:`~llmppl.numpyro.text.TextArgument` in place of strings and lists of strings.

    :raises ValueError: the program has several language models, so that it is not known whose tokens are meant.
    """
    flat = [*args, *kwargs.values()]
    if not any(_is_string(value) for value in flat):
        return args, kwargs
    lms: list[LM] = []
    for site in structure(model, args, kwargs).values():
        if site["type"] == "sample" and is_text(site) and all(site["fn"].lm is not lm for lm in lms):
            lms.append(site["fn"].lm)
    if any(lm.tokenizer is not lms[0].tokenizer for lm in lms):
        raise ValueError(
            f"the program has {len(lms)} language models with tokenizers of their own, so a string argument could mean "
            "either's tokens. Pass strings as lm.argument(text) of the model that reads them."
        )
    if not lms:
        return args, kwargs

    def text(value: Any) -> Any:
        return lms[0].argument(value) if _is_string(value) else value

    return tuple(text(value) for value in args), {name: text(value) for name, value in kwargs.items()}


class Split:
    """Arguments in two: numbers that compiled code takes in, and the rest, which it is compiled for.

    Arrays and floating-point numbers are taken in; whole numbers, truth values, strings and objects are not, for the
    shape of a program may hang on them.
    """

    def __init__(self, arguments: Any) -> None:
        leaves, self._tree = jax.tree.flatten(arguments, is_leaf=lambda value: value is None)
        self._moving = tuple(_moves(leaf) for leaf in leaves)
        self.numbers = [leaf for leaf, moving in zip(leaves, self._moving, strict=True) if moving]
        self._fixed = tuple(leaf for leaf, moving in zip(leaves, self._moving, strict=True) if not moving)

    @property
    def key(self) -> Any:
        """What has to be equal for the same compiled code to do."""
        shapes = tuple((np.shape(n), str(getattr(n, "dtype", type(n).__name__))) for n in self.numbers)
        return self._tree, self._moving, tuple((type(f), _hashable(f)) for f in self._fixed), shapes

    def joined(self, numbers: list[Any]) -> Any:
        """The arguments again, with other numbers."""
        moving, fixed = iter(numbers), iter(self._fixed)
        return jax.tree.unflatten(self._tree, [next(moving if m else fixed) for m in self._moving])


def _is_string(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, str) for v in value)
    return isinstance(value, str)


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, (Array, np.ndarray, float, complex, np.generic))


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
