"""Log-probabilities of given tokens from the network's last states, and their gradient, without the vocabulary's.

The last layer is frozen, so that the gradient by a state is known in closed form: the token's row of the embedding
matrix less the mean row under the law. It is computed beside the log-probability, in one product, and none of the
arrays of the vocabulary's size is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from llmppl.numpyro import decoder
from llmppl.numpyro.architecture import Architecture
from llmppl.numpyro.decoder import Weights
from llmppl.numpyro.stopping import TextLaw


def token_log_probs(
    architecture: Architecture, weights: Weights, law: TextLaw, states: Array, value: Array, prefixes: Array | None
) -> Array:
    """Log-probability of each token, nats, of the shape of ``value``; what stands at padding means nothing.

    :param weights: frozen.
    :param states: what predicts each token, ``(..., T, D)``, of a batch that broadcasts to that of ``value``.
    :param value: ``batch_shape + (T,)``.
    :param prefixes: as :meth:`TextLaw.scaled` has them.
    """

    def plain(states: Array) -> tuple[Array, Array, Array]:
        """The tokens' log-probabilities, the law's logits and their normalisers."""
        scaled = law.scaled(decoder.logits(weights, architecture, states), jnp.arange(value.shape[-1]), prefixes)
        # Only the written tokens' log-probabilities: those of the whole vocabulary are many numbers to write down.
        total = jax.nn.logsumexp(scaled, -1)
        logits = jnp.broadcast_to(scaled, (*value.shape, scaled.shape[-1]))
        taken = jnp.take_along_axis(logits, jnp.maximum(value, 0)[..., None], -1)[..., 0]
        return taken - total, scaled, total

    if isinstance(law.temperature, jax.core.Tracer):  # it may want a gradient too
        return plain(states)[0]

    @jax.custom_jvp
    def score(states: Array) -> Array:
        return plain(states)[0]

    @score.defjvp
    def _score_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        (states,), (moved,) = primals, tangents
        scores, scaled, total = plain(states)
        rows = weights["head" if "head" in weights else "embed"]
        probs = jnp.exp(scaled - total[..., None]).astype(rows.dtype)
        mean = probs @ rows[: probs.shape[-1]]
        slope: Any = (rows[jnp.maximum(value, 0)] - mean) / jnp.asarray(law.temperature, mean.dtype)[..., None, None]
        return scores, (slope * moved).sum(-1).astype(scores.dtype)

    return score(states)
