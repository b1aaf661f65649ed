"""A decoder as pure functions of its weights: :func:`embed`, :func:`forward`, :func:`logits`.

Another backend (flax, a Pallas kernel) can take the place of these three. Weights are a dictionary of arrays, those of
the layers stacked along a first axis that ``lax.scan`` runs over, so that a deep network compiles as fast as one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from llmppl.numpyro.network.architecture import Architecture

Weights = dict[str, Any]
"""``embed`` ``(V, D)``, ``positions`` (gpt2), ``layers``, ``norm``, and ``head`` ``(V, D)`` where it is not tied."""

Pair = tuple[Array, Array]
"""Keys and values of one layer."""

MASKED = -1e30
"""Added to the attention scores of what may not be seen: finite, so that a row that sees nothing has no NaN. (Of
float16 half of the least number stands in, which is finite with a score added to it.)"""


PRODUCT = "product"
"""Name of what is kept of a layer for its gradient, the products with its weights. The rest is soon worked out again,
and takes more than twice the memory."""


class Past(NamedTuple):
    """Keys and values of tokens read before.

    :param keys: ``(layers, ..., S, kv_heads, head_dim)``; the batch in the middle broadcasts with that of the queries.
    :param values: same shape.
    :param seen: which of them are tokens, boolean ``(..., S)``.
    """

    keys: Array
    values: Array
    seen: Array


def embed(
    weights: Weights, architecture: Architecture, tokens: Array, positions: Array, virtual: Array | None = None
) -> Array:
    """Embeddings ``(..., T, D)`` of token ids; padding becomes the token 0, which nothing sees.

    :param virtual: embeddings ``(n, D)`` of virtual tokens, whose ids are those behind the embedding matrix.
    """
    first = weights["embed"].shape[0]
    if virtual is None:
        states = weights["embed"][jnp.maximum(tokens, 0)]
    else:
        known = weights["embed"][jnp.where(tokens < first, jnp.maximum(tokens, 0), 0)]
        own = virtual[jnp.clip(tokens - first, 0, len(virtual) - 1)].astype(known.dtype)
        states = jnp.where((tokens >= first)[..., None], own, known)
    if "positions" in weights:
        states = states + weights["positions"][positions]
    return states


def forward(
    weights: Weights,
    architecture: Architecture,
    states: Array,
    positions: Array,
    seen: Array,
    past: Sequence[Past] = (),
    lora: Weights | None = None,
) -> tuple[Array, Past]:
    """Run embeddings through all layers.

    :param states: ``(..., T, D)``.
    :param positions: of each token in its text, ``(..., T)``.
    :param seen: which of the new tokens are tokens at all, boolean ``(..., T)``. Each sees those up to itself, and all
        of ``past``.
    :param lora: low-rank additions by layer name, stacked as the weights are, already scaled:
        ``{"q": {"A": (layers, D, r), "B": (layers, r, outputs)}}``.
    :returns: normed last states ``(..., T, D)``, and the new keys and values.
    """
    length = states.shape[-2]
    causal = jnp.tril(jnp.ones((length, length), dtype=bool))
    masks = [jnp.broadcast_to(p.seen[..., None, :], (*p.seen.shape[:-1], length, p.seen.shape[-1])) for p in past]
    masks.append(causal & seen[..., None, :])
    turn = _rotation(architecture, positions, states.dtype)

    def layer(hidden: Array, own: tuple[Weights, Weights, list[Pair]]) -> tuple[Array, Pair]:
        layer_weights, layer_lora, layer_past = own
        block = _gpt2_layer if architecture.family == "gpt2" else _llama_layer
        return block(architecture, layer_weights, layer_lora, hidden, turn, masks, layer_past)

    kept = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    layer = jax.checkpoint(layer, prevent_cse=False, policy=kept)
    caches = [(p.keys, p.values) for p in past]
    # A as (r, D) here: for the gradient of one that is (D, r) XLA transposes all inputs of the layer.
    lora = {n: {"A": own["A"].swapaxes(-1, -2), "B": own["B"]} for n, own in (lora or {}).items()}
    states, (keys, values) = lax.scan(layer, states, (weights["layers"], lora, caches))
    return _norm(architecture, weights["norm"], states), Past(keys, values, seen)


def logits(weights: Weights, architecture: Architecture, states: Array) -> Array:
    """Logits ``(..., T, V)`` of states ``(..., T, D)``."""
    return _product(head(weights), states)


def head(weights: Weights) -> Array:
    """What states are multiplied with for logits, ``(V, D)``."""
    return weights["head" if "head" in weights else "embed"]


def _llama_layer(
    architecture: Architecture,
    weights: Weights,
    lora: Weights,
    hidden: Array,
    turn: tuple[Array, Array] | None,
    masks: Sequence[Array],
    past: Sequence[tuple[Array, Array]],
) -> tuple[Array, tuple[Array, Array]]:
    normed = _norm(architecture, weights["input_norm"], hidden)
    heads, kv_heads = architecture.heads, architecture.kv_heads
    queries = _heads(_linear(weights, lora, "q", normed), heads)
    keys = _heads(_linear(weights, lora, "k", normed), kv_heads)
    values = _heads(_linear(weights, lora, "v", normed), kv_heads)
    if "q_norm" in weights:
        queries = _norm(architecture, weights["q_norm"], queries)
        keys = _norm(architecture, weights["k_norm"], keys)
    assert turn is not None
    queries, keys = _turned(queries, turn), _turned(keys, turn)
    attended = _attend(queries, [*past, (keys, values)], masks)
    hidden = hidden + _linear(weights, lora, "o", attended)
    normed = _norm(architecture, weights["post_norm"], hidden)
    gate = _activation(architecture.activation)(_linear(weights, lora, "gate", normed))
    hidden = hidden + _linear(weights, lora, "down", gate * _linear(weights, lora, "up", normed))
    return hidden, (keys, values)


def _gpt2_layer(
    architecture: Architecture,
    weights: Weights,
    lora: Weights,
    hidden: Array,
    turn: tuple[Array, Array] | None,
    masks: Sequence[Array],
    past: Sequence[tuple[Array, Array]],
) -> tuple[Array, tuple[Array, Array]]:
    normed = _norm(architecture, weights["input_norm"], hidden)
    parts = jnp.split(_linear(weights, lora, "qkv", normed), 3, -1)
    queries, keys, values = (_heads(part, architecture.heads) for part in parts)
    attended = _attend(queries, [*past, (keys, values)], masks)
    hidden = hidden + _linear(weights, lora, "o", attended)
    normed = _norm(architecture, weights["post_norm"], hidden)
    inner = _activation(architecture.activation)(_linear(weights, lora, "up", normed))
    return hidden + _linear(weights, lora, "down", inner), (keys, values)


def _linear(weights: Weights, lora: Weights, name: str, inputs: Array) -> Array:
    own = weights[name]
    outputs = _product(own["w"], inputs)
    if "b" in own:
        outputs = outputs + own["b"]
    if name in lora:
        outputs = outputs + (inputs @ lora[name]["A"].T) @ lora[name]["B"]
    return checkpoint_name(outputs, PRODUCT)


def _product(weights: Array, inputs: Array) -> Array:
    """Weights ``(outputs, D)`` times inputs ``(..., T, D)``."""
    if inputs.shape[-2:-1] != (1,) or jax.default_backend() != "cpu":
        return inputs @ weights.T
    # On a CPU the right factor is rearranged in memory first, which takes longer than multiplying it by the few rows of
    # a single token; XLA has to be kept from exchanging the two.
    found = lax.dot_general(weights, inputs, (((1,), (inputs.ndim - 1,)), ((), ())))
    return jnp.moveaxis(lax.optimization_barrier(found), 0, -1)


def _heads(states: Array, heads: int) -> Array:
    return states.reshape(*states.shape[:-1], heads, -1)


def _attend(queries: Array, caches: Sequence[tuple[Array, Array]], masks: Sequence[Array]) -> Array:
    """Attention of ``(..., T, heads, width)`` over several stretches of keys, whose batches broadcast."""
    kv_heads, width = caches[0][0].shape[-2:]
    grouped = jnp.moveaxis(queries.reshape(*queries.shape[:-2], kv_heads, -1, width), -3, -4)  # (..., kv, T, g, width)
    scores = []
    for (keys, _), mask in zip(caches, masks, strict=True):
        score = _by_head(grouped, keys, -1) * width**-0.5
        hidden = max(MASKED, float(jnp.finfo(score.dtype).min) / 2)
        scores.append(score + jnp.where(mask, 0.0, hidden).astype(score.dtype)[..., None, :, None, :])
    batch = jnp.broadcast_shapes(*(s.shape[:-1] for s in scores))
    joined = jnp.concatenate([jnp.broadcast_to(s, (*batch, s.shape[-1])) for s in scores], -1)
    shares = jax.nn.softmax(joined, -1)
    total, start = jnp.zeros((), queries.dtype), 0
    for (_, values), score in zip(caches, scores, strict=True):
        share = shares[..., start : start + score.shape[-1]]
        total = total + _by_head(share, values, -3)
        start += score.shape[-1]
    total = jnp.moveaxis(total, -4, -3)
    return total.reshape(*total.shape[:-3], -1)


def _by_head(rows: Array, cache: Array, axis: int) -> Array:
    """Rows ``(..., kv, T, g, n)`` times keys or values ``(..., S, kv, width)`` along an axis of these; where the batch
    of the latter has size one it is not repeated.

    As one product with the rows on the left: einsum puts them on the right, and transposes every number of them.
    """
    batch = rows.ndim - 4
    missing = batch - (cache.ndim - 3)
    shared = [n for n in range(missing, batch) if cache.shape[n - missing] == rows.shape[n]]
    left, right = (*shared, batch), (*(n - missing for n in shared), cache.ndim - 2)
    single = [n for n in range(cache.ndim - 3) if n not in right]
    cache = cache.squeeze(single)
    right = tuple(n - sum(m < n for m in single) for n in right)
    found = lax.dot_general(rows, cache, (((rows.ndim - 1,), (cache.ndim + axis,)), (left, right)))
    # The batch that both have comes first, then the heads.
    return jnp.moveaxis(found, range(len(left)), left)


def _rotation(architecture: Architecture, positions: Array, dtype: Any) -> tuple[Array, Array] | None:
    if not architecture.inv_freq:
        return None
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(architecture.inv_freq, dtype=jnp.float32)
    angles = jnp.concatenate([angles, angles], -1)
    scale = architecture.rotary_scaling
    return (jnp.cos(angles) * scale).astype(dtype)[..., None, :], (jnp.sin(angles) * scale).astype(dtype)[..., None, :]


def _turned(states: Array, turn: tuple[Array, Array]) -> Array:
    cos, sin = turn
    first, second = jnp.split(states, 2, -1)
    return states * cos + jnp.concatenate([-second, first], -1) * sin


def _norm(architecture: Architecture, weights: Weights, states: Array) -> Array:
    wide = states.astype(jnp.promote_types(states.dtype, jnp.float32))
    if architecture.family == "gpt2":
        centred = wide - wide.mean(-1, keepdims=True)
        scaled = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + architecture.eps)
        return scaled.astype(states.dtype) * weights["w"] + weights["b"]
    scaled = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + architecture.eps)
    return weights["w"] * scaled.astype(states.dtype)


def _activation(name: str) -> Any:
    known = {
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "relu": jax.nn.relu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
        "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    }
    return known[name]
