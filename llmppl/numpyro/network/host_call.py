"""Python functions of arrays inside compiled programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from llmppl.numpyro.network.text_arrays import is_concrete


def host_call(function: Callable[..., np.ndarray], shape: Sequence[int], dtype: Any, *arrays: Any) -> Array:
    """The result of a numpy function of arrays: at once where their numbers are known, else whenever the compiled
    program runs, which it then leaves once. Results are constants.

    :param function: may run any number of times. Under ``vmap`` its arrays have the same further dimensions in front,
        and so must its result.
    :param shape, dtype: of the result, without those.
    """
    if all(map(is_concrete, arrays)):
        return jnp.asarray(np.asarray(function(*map(np.asarray, arrays))).astype(dtype))

    def in_halves(*halves: Any) -> np.ndarray:
        known = map(np.asarray, halves)
        found = function(*(_whole(k, array.dtype) for k, array in zip(known, arrays, strict=True)))
        return _halves(np.asarray(found).astype(dtype))

    wide = jnp.dtype(dtype).itemsize == 8
    answer = jax.ShapeDtypeStruct((*shape, 2) if wide else tuple(shape), jnp.uint32 if wide else dtype)
    found = jax.pure_callback(in_halves, answer, *map(_halves, arrays), vmap_method="broadcast_all")
    return lax.bitcast_convert_type(found, dtype) if wide else found


def _halves(array: Any) -> Any:
    """Numbers of 64 bits as pairs of 32: the callback may run in a thread without 64 bits, which would round them."""
    if array.dtype.itemsize != 8:
        return array
    if isinstance(array, np.ndarray):
        return array[..., None].copy().view(np.uint32)
    return lax.bitcast_convert_type(array, jnp.uint32)


def _whole(halves: np.ndarray, dtype: Any) -> np.ndarray:
    return halves if dtype.itemsize != 8 else halves.copy().view(dtype)[..., 0]
