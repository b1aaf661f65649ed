"""A program's arguments as those of a compiled function: strings as token ids, Python objects as constants."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax import Array

from llmppl.numpyro.language_model import LM
from llmppl.numpyro.network.lifting import jit
from llmppl.numpyro.network.text_arrays import TextArgument
from llmppl.numpyro.programs.tracing import Program, Trace, is_text


class Compiled:
    """A function ``(keys, params, args, kwargs)`` of a program's arguments, compiled once for arguments of one shape.

    Strings and lists of strings go in as :meth:`LM.argument` makes them and arrays as they are; anything else (numbers,
    flags, ``None``) is a constant, and another constant compiles anew.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.variants: dict[Hashable, Callable[..., Any]] = {}

    def __call__(
        self,
        keys: Any,
        params: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        lm: LM | None,
    ) -> Any:
        return self.at(params, args, kwargs, lm)(keys)

    def at(
        self, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], lm: LM | None
    ) -> Callable[[Any], Any]:
        """The function of the keys alone, for arguments that are encoded once."""
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda value: value is not args and _is_leaf(value))
        leaves = [_argument(leaf, lm) for leaf in leaves]
        moving = [leaf if _moves(leaf) else None for leaf in leaves]
        fixed = [None if _moves(leaf) else leaf for leaf in leaves]
        which = (tree, *(_constant(leaf) for leaf in fixed))

        if which not in self.variants:

            def function(keys: Any, params: dict[str, Any], moving: list[Any]) -> Any:
                own = [f if m is None else m for m, f in zip(moving, fixed, strict=True)]
                own_args, own_kwargs = jax.tree.unflatten(tree, own)
                return self.function(keys, params, own_args, own_kwargs)

            self.variants[which] = jit(function)
        variant = self.variants[which]
        return lambda keys: variant(keys, params, moving)

    def count(self) -> int:
        """How often it was compiled."""
        return sum(variant.compilations() for variant in self.variants.values())  # type: ignore[attr-defined]


def language_model(guide: Program | None, *traces: Trace) -> LM | None:
    """The one whose tokens stand for strings: that of the texts, or the guide's; ``None`` where there are several, or
    none, and strings stay constants."""
    found = {
        id(s["fn"].lm): s["fn"].lm for trace in traces for s in trace.values() if s["type"] == "sample" and is_text(s)
    }
    own = getattr(guide, "lm", None)
    if isinstance(own, LM):
        found[id(own)] = own
    return next(iter(found.values())) if len(found) == 1 else None


def check_key(rng_key: Any) -> None:
    """Refuse what is no key.

    :raises TypeError: saying how to make one.
    """
    mend = "The first argument is a key: pass jax.random.key(0), then the program's own arguments."
    if not isinstance(rng_key, Array):
        raise TypeError(f"rng_key must be a JAX key, got {type(rng_key).__name__}. {mend}")
    if not jax.dtypes.issubdtype(rng_key.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"rng_key is an array of {rng_key.dtype}: a key of the old style, as jax.random.PRNGKey makes, or none. "
            + mend
        )
    if rng_key.ndim:
        raise TypeError(f"rng_key must be one key, got {rng_key.shape[0]} of them. Pass one; it is split here.")


def _is_leaf(value: Any) -> bool:
    return isinstance(value, TextArgument) or value is None or _is_texts(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(text, str) for text in value)


def _argument(leaf: Any, lm: LM | None) -> Any:
    if lm is not None and (isinstance(leaf, str) or _is_texts(leaf)):
        return lm.argument(leaf)
    return leaf


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, (Array, np.ndarray, TextArgument))


def _constant(leaf: Any) -> Hashable:
    if _is_texts(leaf):
        return tuple(leaf)
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return (type(leaf), leaf)
