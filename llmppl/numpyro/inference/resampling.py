"""Resampling of weighted particles as compiled code: the same schemes as :mod:`llmppl.inference.resampling`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, random


def resample(key: Array, log_weights: Array, members: Array, scheme: str) -> Array:
    """Where each member of a group goes on from, drawn in proportion to the members' weights.

    - ``systematic``: one uniform number, evenly spaced points (Kitagawa 1996);
    - ``residual``: each particle ⌊n w⌋ times, the rest by multinomial draws (Liu and Chen 1998);
    - ``multinomial``: independent draws (Gordon et al. 1993).

    :param log_weights: ``(K,)``, nats; some member's finite.
    :param members: who competes, boolean ``(K,)``; the others stay where they are.
    :returns: ``(K,)``.
    """
    count, number = len(log_weights), members.sum()
    place = jnp.arange(count)
    order = jnp.argsort(~members, stable=True)
    weights = jax.nn.softmax(jnp.where(members, log_weights, -jnp.inf))[order]
    if scheme == "systematic":
        chosen = _inverse(weights, (random.uniform(key) + place) / number)
    elif scheme == "residual":
        expected = weights * number
        # Rounding must not turn an exact multiple into one less.
        whole = jnp.floor(expected + 2 * count * jnp.finfo(weights.dtype).eps)
        sure = jnp.cumsum(whole)
        rest = jnp.maximum(expected - whole, 0)
        drawn = _inverse(rest, random.uniform(key, (count,)))
        chosen = jnp.where(place < sure[-1], jnp.searchsorted(sure, place, side="right"), drawn)
    else:
        chosen = _inverse(weights, random.uniform(key, (count,)))
    chosen = jnp.minimum(chosen, count - 1)
    return jnp.zeros(count, order.dtype).at[order].set(jnp.where(place < number, order[chosen], order))


def compete(
    key: Array, log_weights: Array, members: Array, scheme: str, threshold: float
) -> tuple[Array, Array, Array]:
    """Resample a group where its effective sample size is below a share of it; the group keeps its total weight.

    :returns: where each particle goes on from, ``(K,)``; the new log-weights, ``(K,)``; whether anything was done.
    """
    number = members.sum()
    own = jnp.where(members, log_weights, -jnp.inf)
    low = (number > 1) & jnp.isfinite(own).any() & (effective_size(own) < threshold * number)
    index = jnp.where(low, resample(key, log_weights, members, scheme), jnp.arange(len(log_weights)))
    mean = jax.nn.logsumexp(own) - jnp.log(number)
    return index, jnp.where(low & members, mean, log_weights), low


def effective_size(log_weights: Array) -> Array:
    """Kish's effective sample size over the first dimension; zero where no weight is positive."""
    alive = jnp.isfinite(log_weights).any(0) | jnp.isnan(log_weights).any(0)
    shifted = jnp.where(alive, log_weights, 0.0)
    size = jnp.exp(2 * jax.nn.logsumexp(shifted, 0) - jax.nn.logsumexp(2 * shifted, 0))
    return jnp.where(alive, size, 0.0)


def _inverse(weights: Array, points: Array) -> Array:
    steps = jnp.cumsum(weights)
    steps = steps / jnp.where(steps[-1] > 0, steps[-1], 1)
    # A point that is rounded up to one would find a particle without weight.
    return jnp.searchsorted(steps, jnp.minimum(points, 1 - jnp.finfo(steps.dtype).epsneg), side="right")
