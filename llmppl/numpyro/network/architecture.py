"""What a decoder is, read from a Hugging Face configuration: sizes, norms, positions. Anything unknown is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")

# What a configuration that leaves them out means, as the classes of transformers have it.
_USUAL: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "max_position_embeddings": 2048},
    "mistral": {
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "gpt2": {"vocab_size": 50257, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024},
}
_USUAL_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "max_window_layers": 28}


@dataclass(frozen=True)
class Architecture:
    """Everything about a decoder but its weights; hashable, so that it is static under ``jax.jit``.

    :param family: one of :data:`FAMILIES`.
    :param eps: of every norm, from the configuration.
    :param inv_freq: the rotary frequencies, one for each pair of a head's dimensions; empty for learned positions.
    :param rotary_scaling: factor of the rotary sines and cosines (YaRN's attention factor), 1 elsewhere.
    :param max_length: most tokens that can be read at once.
    :param biases: the linear layers that have them, by the decoder's names.
    :param fingerprint: what an adapter must fit.
    """

    family: str
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    eps: float
    activation: str
    inv_freq: tuple[float, ...]
    rotary_scaling: float
    tied: bool
    max_length: int | None
    biases: tuple[str, ...] = ()
    fingerprint: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Architecture:
        """Read a ``config.json``.

        :raises ValueError: an architecture, a position encoding or an attention that is not built here; names it.
        """
        if config.get("quantization_config") is not None:
            raise ValueError(
                "the checkpoint is quantised, and the native JAX decoder reads plain weights. Load the checkpoint that "
                "it was made from."
            )
        family = config.get("model_type", "")
        if family not in FAMILIES:
            raise ValueError(
                f"the architecture {family!r} ({', '.join(config.get('architectures') or ['unknown'])}) has no native "
                f"JAX decoder; those that have are {', '.join(FAMILIES)}. Use llmppl.LM with Pyro, or "
                "llmppl.numpyro.TorchLikelihood for a frozen likelihood."
            )
        config = {**({} if family == "gpt2" else _USUAL_LLAMA), **_USUAL[family], **config}
        _check_activation(config)
        fingerprint = tuple(
            (key, config.get(key)) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
        )
        return _gpt2(config, fingerprint) if family == "gpt2" else _llama(config, family, fingerprint)


def _llama(config: Mapping[str, Any], family: str, fingerprint: tuple[tuple[str, Any], ...]) -> Architecture:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    max_length = config.get("max_position_embeddings")
    if _slides(config, family) and (max_length is None or config["sliding_window"] < max_length):
        raise ValueError(
            f"the model attends in a sliding window of {config['sliding_window']} tokens, which the native JAX decoder "
            "does not. Where no text is longer than the window, set sliding_window to null in config.json and "
            "max_position_embeddings to the window; or use llmppl.LM with Pyro."
        )
    inv_freq, scaling = rotary(config, head_dim)
    return Architecture(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocabulary=config["vocab_size"],
        eps=float(config.get("rms_norm_eps", 1e-6)),
        activation=config.get("hidden_act", "silu"),
        inv_freq=inv_freq,
        rotary_scaling=scaling,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_length=max_length,
        biases=_biases(config, family),
        fingerprint=fingerprint,
    )


def _gpt2(config: Mapping[str, Any], fingerprint: tuple[tuple[str, Any], ...]) -> Architecture:
    for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if config.get(key, usual) != usual:
            raise ValueError(f"{key}={config[key]} is not built in the native JAX decoder. Use llmppl.LM.")
    hidden, heads = config["n_embd"], config["n_head"]
    return Architecture(
        family="gpt2",
        num_layers=config["n_layer"],
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=config["vocab_size"],
        eps=float(config.get("layer_norm_epsilon", 1e-5)),
        activation=config.get("activation_function", "gelu_new"),
        inv_freq=(),
        rotary_scaling=1.0,
        tied=bool(config.get("tie_word_embeddings", True)),
        max_length=config["n_positions"],
        biases=("qkv", "o", "up", "down"),
        fingerprint=tuple({**dict(fingerprint), "hidden_size": hidden, "num_hidden_layers": config["n_layer"]}.items()),
    )


def _check_activation(config: Mapping[str, Any]) -> None:
    name = config.get("hidden_act") or config.get("activation_function")
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(
            f"the activation {name!r} is not built in the native JAX decoder; {', '.join(ACTIVATIONS)} are. "
            "Use llmppl.LM with Pyro, or llmppl.numpyro.TorchLikelihood for a frozen likelihood."
        )


def _slides(config: Mapping[str, Any], family: str) -> bool:
    """Whether some layer attends in a window."""
    if not config.get("sliding_window"):
        return False
    if family == "mistral":
        return True
    if not config.get("use_sliding_window"):
        return False
    kinds = config.get("layer_types")
    return "sliding_attention" in kinds if kinds else config["max_window_layers"] < config["num_hidden_layers"]


def _biases(config: Mapping[str, Any], family: str) -> tuple[str, ...]:
    if family == "qwen2":
        return "q", "k", "v"
    attention = ("q", "k", "v", "o") if family in ("llama", "qwen3") and config.get("attention_bias") else ()
    return (*attention, *(("gate", "up", "down") if family == "llama" and config.get("mlp_bias") else ()))


def rotary(config: Mapping[str, Any], head_dim: int) -> tuple[tuple[float, ...], float]:
    """Rotary frequencies and the factor of sines and cosines, in single precision as ``transformers`` has them.

    :raises ValueError: a kind that depends on the text's length (dynamic, longrope), or an unknown one.
    """
    settings = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = settings.get("rope_type", settings.get("type", "default"))
    for partial in (config.get("partial_rotary_factor"), settings.get("partial_rotary_factor")):
        if partial not in (None, 1):
            raise ValueError(
                f"partial_rotary_factor={partial}: the native JAX decoder turns whole heads only. Use llmppl.LM with "
                "Pyro, or llmppl.numpyro.TorchLikelihood for a frozen likelihood."
            )
    base = float(settings.get("rope_theta", config.get("rope_theta", 10000.0)))
    exponents = np.arange(0, head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.power(np.float32(base), exponents)).astype(np.float32)
    scaling = 1.0
    if kind == "linear":
        frequencies = frequencies / np.float32(settings["factor"])
    elif kind == "llama3":
        frequencies = _llama3(frequencies, settings)
    elif kind == "yarn":
        frequencies, scaling = _yarn(frequencies, settings, base, head_dim, config)
    elif kind != "default":
        raise ValueError(
            f"rope_type={kind!r} is not built in the native JAX decoder; default, linear, llama3 and yarn are. "
            "Use llmppl.LM with Pyro, or llmppl.numpyro.TorchLikelihood for a frozen likelihood."
        )
    return tuple(float(f) for f in frequencies), scaling


def _llama3(frequencies: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    factor, low, high = settings["factor"], settings["low_freq_factor"], settings["high_freq_factor"]
    old = settings["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    scaled = np.where(wavelength > old / low, frequencies / factor, frequencies)
    smooth = (old / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelength < old / high) & ~(wavelength > old / low)
    return np.where(medium, smoothed, scaled).astype(np.float32)


def _yarn(
    frequencies: np.ndarray, settings: Mapping[str, Any], base: float, dim: int, config: Mapping[str, Any]
) -> tuple[np.ndarray, float]:
    """Peng et al. (2023), `YaRN: efficient context window extension of large language models`."""
    old = settings.get("original_max_position_embeddings") or config["max_position_embeddings"]
    factor = settings.get("factor") or config["max_position_embeddings"] / old

    def magnitude(scale: float, mscale: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    attention = settings.get("attention_factor")
    if attention is None:
        mscale, all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
        attention = magnitude(factor, mscale) / magnitude(factor, all_dim) if mscale and all_dim else magnitude(factor)

    def correction(rotations: float) -> float:
        return (dim * math.log(old / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = correction(settings.get("beta_fast") or 32), correction(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / ((high - low) or 0.001), 0, 1)
    kept = 1 - ramp
    return (frequencies / factor * (1 - kept) + frequencies * kept).astype(np.float32), float(attention)
