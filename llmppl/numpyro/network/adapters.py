"""Low-rank adapters as pytrees: how they start, and as the tensors that ``peft`` has of them.

A pytree has the decoder's layers by name, stacked along the first axis: ``{"q": {"A": (layers, D, r), "B": (layers, r,
outputs)}}``. Files hold one pair of matrices a layer, by its place in the Hugging Face model, both transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from llmppl.numpyro.network.architecture import Architecture
from llmppl.numpyro.network.decoder import Weights
from llmppl.numpyro.network.folder_weights import layer_places
from llmppl.text.arguments import check_endings


def targets(architecture: Architecture, target_modules: Sequence[str] | None) -> list[str]:
    """Which linear layers of the decoder name endings of Hugging Face layers stand for; all by default.

    :raises TypeError, ValueError: no list of endings; an ending of no layer.
    """
    places = layer_places(architecture)
    if target_modules is None:
        return list(places)
    check_endings(target_modules)
    chosen = set()
    for ending in target_modules:
        found = {name for name, place in places.items() if f".{place}".endswith(f".{ending}")}
        if not found:
            raise ValueError(
                f"target_modules names {ending!r}, which is the end of no linear layer of this {architecture.family} "
                f"model; its layers are {sorted({place.rsplit('.', 1)[-1] for place in places.values()})}. A kind of "
                "layer is adapted throughout the network."
            )
        chosen |= found
    return [name for name in places if name in chosen]


def initial(weights: Weights, names: Sequence[str], rank: int, key: Array, dtype: Any) -> Weights:
    """A new adapter, which changes nothing: ``A`` uniform as ``peft`` draws it (Kaiming, a = √5), ``B`` zero."""
    adapter: Weights = {}
    for name, own in zip(names, random.split(key, len(names)), strict=True):
        layers, outputs, inputs = weights["layers"][name]["w"].shape
        bound = inputs**-0.5
        adapter[name] = {
            "A": random.uniform(own, (layers, inputs, rank), dtype, -bound, bound),
            "B": jnp.zeros((layers, rank, outputs), dtype),
        }
    return adapter


def scaled(adapter: Weights, scale: float, dtype: Any) -> Weights:
    """The adapter as the decoder takes it, in the precision of its weights."""
    return {name: {"A": own["A"].astype(dtype), "B": (own["B"] * scale).astype(dtype)} for name, own in adapter.items()}


def to_tensors(adapter: Weights, architecture: Architecture) -> dict[str, np.ndarray]:
    """The adapter's matrices by their names in a file."""
    tensors = {}
    for name, own in adapter.items():
        place = layer_places(architecture)[name]
        for side, stacked in own.items():
            for n, matrix in enumerate(np.asarray(stacked)):
                tensors[f"{place.format(n)}.lora_{side}.weight"] = np.ascontiguousarray(matrix.T)
    return tensors


def from_tensors(tensors: Mapping[str, Any], adapter: Weights, architecture: Architecture) -> Weights:
    """Matrices of a file, in the form and precision of an adapter."""
    loaded: Weights = {}
    for name, own in adapter.items():
        place = layer_places(architecture)[name]
        loaded[name] = {}
        for side, stacked in own.items():
            rows = [np.asarray(tensors[f"{place.format(n)}.lora_{side}.weight"]).T for n in range(len(stacked))]
            loaded[name][side] = jnp.asarray(np.stack(rows), dtype=stacked.dtype)
    return loaded


def size(weights: Any) -> int:
    """How many numbers a pytree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(weights))
