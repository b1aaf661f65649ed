"""Test doubles: a language model small enough to enumerate, as :func:`llmppl.testing.tiny_lm` is for torch."""

from __future__ import annotations

import string
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llmppl.numpyro.language_model import LM
from llmppl.numpyro.network.architecture import Architecture
from llmppl.numpyro.network.folder_weights import stacked
from llmppl.text.declared import declared


@declared
def tiny_lm(vocabulary: int = 6, seed: int = 0, dtype: Any = jnp.float32) -> LM:
    """A Llama with random weights over a vocabulary of single characters: ``.``, ``a``, ``b``, ...

    Of the same kind as torch's ``tiny_lm``, with other random numbers; to have the same weights, save that one's
    ``transformer`` and ``tokenizer`` to a folder and load it here.

    :param vocabulary: number of tokens, 2 to 27; token 0 is the full stop.
    :param seed: of the weights.
    :param dtype: ``jnp.float64`` for comparisons to many digits, under ``jax_enable_x64``.
    """
    if not 2 <= vocabulary <= 27:
        raise ValueError(f"vocabulary must lie between 2 and 27, got {vocabulary}.")
    config = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    generator = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        # Wide enough that the laws of different contexts differ by whole nats.
        return generator.normal(scale=0.35, size=shape)

    tensors = {"model.embed_tokens.weight": drawn(vocabulary, 32), "model.norm.weight": np.ones(32)}
    tensors["lm_head.weight"] = drawn(vocabulary, 32)
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)}
    shapes |= {
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (64, 32),
        "mlp.up_proj": (64, 32),
        "mlp.down_proj": (32, 64),
    }
    for layer in range(2):
        for place, shape in shapes.items():
            tensors[f"model.layers.{layer}.{place}.weight"] = drawn(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(32)
    architecture = Architecture.of(config)
    return LM(stacked(tensors, architecture, dtype), architecture, _Characters(vocabulary), f"tiny-{vocabulary}")


class _Characters:
    """A tokenizer of single characters."""

    bos_token_id = None
    eos_token_id = 0

    def __init__(self, vocabulary: int) -> None:
        characters = ("." + string.ascii_lowercase)[:vocabulary]
        backend = Tokenizer(models.BPE({c: n for n, c in enumerate(characters)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        self.backend_tokenizer = backend

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()
