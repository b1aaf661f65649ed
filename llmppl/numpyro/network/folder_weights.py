"""Weights of a Hugging Face folder as the decoder has them: safetensors in, stacked arrays out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from llmppl.numpyro.network.architecture import Architecture
from llmppl.numpyro.network.decoder import Weights

LLAMA_LAYERS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
GPT2_LAYERS = {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}


def layer_places(architecture: Architecture) -> dict[str, str]:
    """Where each linear layer of the decoder stands in the Hugging Face model, with ``{}`` for the layer's number."""
    if architecture.family == "gpt2":
        return {name: f"transformer.h.{{}}.{place}" for name, place in GPT2_LAYERS.items()}
    return {name: f"model.layers.{{}}.{place}" for name, place in LLAMA_LAYERS.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a folder.

    :raises FileNotFoundError: no ``config.json``.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json. Pass a folder made by save_pretrained, or a hub name.")
    return dict(json.loads(path.read_text()))


def read_weights(folder: Path, architecture: Architecture, dtype: Any) -> Weights:
    """The weights of a folder.

    :raises FileNotFoundError: no safetensors.
    :raises ValueError: a tensor is missing, or of another size than the configuration says.
    """
    return stacked(_read(folder), architecture, dtype)


def stacked(tensors: Mapping[str, np.ndarray], architecture: Architecture, dtype: Any) -> Weights:
    """Tensors by their Hugging Face names as the decoder's weights."""
    gpt2 = architecture.family == "gpt2"
    trunk = "transformer." if gpt2 else "model."
    plain = {key.removeprefix(trunk): value for key, value in tensors.items()}

    def take(key: str) -> np.ndarray:
        if key not in plain:
            raise ValueError(
                f"the checkpoint has no tensor {key!r}, which a {architecture.family} model needs. Save the whole "
                "causal language model with save_pretrained, not its base model or an adapter."
            )
        return np.asarray(plain[key])

    def over_layers(place: str) -> Any:
        return jnp.asarray(np.stack([take(place.format(n)) for n in range(architecture.num_layers)]), dtype=dtype)

    layers: Weights = {}
    for name, place in layer_places(architecture).items():
        own = place.removeprefix(trunk)
        kernel = over_layers(own + ".weight")
        # Linear layers are kept (outputs, inputs), those of gpt2 the other way round.
        layers[name] = {"w": kernel.swapaxes(-1, -2) if gpt2 else kernel}
        if name in architecture.biases:
            layers[name]["b"] = over_layers(own + ".bias")
    _check_sizes(layers, architecture)
    if gpt2:
        norms = {"input_norm": "h.{}.ln_1", "post_norm": "h.{}.ln_2"}
    else:
        norms = {"input_norm": "layers.{}.input_layernorm", "post_norm": "layers.{}.post_attention_layernorm"}
        if architecture.family == "qwen3":
            norms |= {"q_norm": "layers.{}.self_attn.q_norm", "k_norm": "layers.{}.self_attn.k_norm"}
    for name, place in norms.items():
        layers[name] = {"w": over_layers(place + ".weight")} | ({"b": over_layers(place + ".bias")} if gpt2 else {})

    def array(key: str) -> Any:
        return jnp.asarray(take(key), dtype=dtype)

    weights: Weights = {"layers": layers}
    if gpt2:
        weights |= {"embed": array("wte.weight"), "positions": array("wpe.weight")}
        weights["norm"] = {"w": array("ln_f.weight"), "b": array("ln_f.bias")}
    else:
        weights |= {"embed": array("embed_tokens.weight"), "norm": {"w": array("norm.weight")}}
    if not architecture.tied:
        weights["head"] = array("lm_head.weight")
    return weights


def _check_sizes(layers: Weights, architecture: Architecture) -> None:
    """Whether tensors and configuration are of one model; a wrong number of heads would give wrong numbers silently."""
    width = architecture.head_dim
    queries, keys = architecture.heads * width, architecture.kv_heads * width
    due = {"qkv": 3 * queries, "q": queries, "k": keys, "v": keys}
    for name, outputs in due.items():
        if name in layers and layers[name]["w"].shape[-2] != outputs:
            raise ValueError(
                f"the tensors of {layer_places(architecture)[name]} have {layers[name]['w'].shape[-2]} outputs, and "
                f"config.json asks for {outputs} (its heads times head_dim). Put the config.json beside them that "
                "belongs to them."
            )


def _read(folder: Path) -> dict[str, np.ndarray]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    tensors: dict[str, np.ndarray] = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing. Save the model as safetensors with save_pretrained.")
        # numpy has no bfloat16; jax reads it.
        with safe_open(os.fspath(path), framework="flax") as file:
            tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return tensors
