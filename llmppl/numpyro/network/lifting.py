"""Weights as arguments of compiled functions, although programs and guides hold their language models.

A program closes over its ``lm``. Compiled as it stands, the weights would become constants of the executable: slow to
compile, and in memory twice. :func:`jit` finds the language models that a function reads and passes their weights in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from llmppl.numpyro.network.decoder import Weights


class HasWeights(Protocol):
    """A language model: what is asked of it here."""

    @property
    def weights(self) -> Weights: ...


_bound: ContextVar[dict[int, Any]] = ContextVar("bound", default={})  # noqa: B039 (never changed in place)
_read: ContextVar[list[HasWeights] | None] = ContextVar("read", default=None)


def weights_of(lm: HasWeights, own: Weights) -> Weights:
    """The weights that stand for those of a language model here: what is bound, or its own."""
    read = _read.get()
    if read is not None and all(lm is not other for other in read):
        read.append(lm)
    return _bound.get().get(id(lm), own)


@contextmanager
def bound(lms: tuple[HasWeights, ...], weights: tuple[Weights, ...]) -> Iterator[None]:
    """Inside this block other weights, tracers say, stand for those of some language models."""
    token = _bound.set({**_bound.get(), **{id(lm): w for lm, w in zip(lms, weights, strict=True)}})
    try:
        yield
    finally:
        _bound.reset(token)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``jax.jit``, with the compiler set for these programs where it is not part of another compiled function.

    :param options: of ``jax.jit``.
    :returns: the function; its ``compilations()`` tells how often it was compiled.
    """
    traced = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal traced
        traced += 1
        return function(*args, **kwargs)

    inner = jax.jit(counted, **options)
    outer: Callable[..., Any] | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal outer
        if isinstance(jnp.zeros(()), jax.core.Tracer):
            return inner(*args, **kwargs)
        if outer is None:
            outer = jax.jit(counted, compiler_options=compiler_options(), **options)
        return outer(*args, **kwargs)

    call.compilations = lambda: traced  # type: ignore[attr-defined]
    return call


@cache
def compiler_options() -> dict[str, Any]:
    """What XLA is told on a CPU: without its fusion emitters these programs, of many small kernels, compile
    faster by a quarter to a half, and run as fast. Nothing elsewhere, or where this XLA has no such choice."""
    options = {"xla_cpu_use_fusion_emitters": False}
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit`` with the weights of every language model that ``function`` reads as arguments.

    Use it for your own compiled functions of programs, e.g. ``llmppl.numpyro.jit(svi.update)``. As with ``jax.jit``,
    another shape of an argument compiles anew: pad texts to one width (``lm.encode(text, width=...)``).
    """
    lms: tuple[HasWeights, ...] | None = None

    def with_weights(weights: tuple[Weights, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert lms is not None
        with bound(lms, weights):
            return function(*args, **kwargs)

    program = compiled(with_weights)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal lms
        if lms is None:
            token = _read.set([])
            try:
                jax.eval_shape(lambda a, k: function(*a, **k), args, kwargs)
                lms = tuple(_read.get() or ())
            finally:
                _read.reset(token)
        return program(tuple(lm.weights for lm in lms), args, kwargs)

    call.compilations = program.compilations  # type: ignore[attr-defined]
    return call
