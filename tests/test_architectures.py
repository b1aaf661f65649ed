"""Causal architectures of transformers, tiny and random: scores, draws and gradients against plain forward passes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from plain_pass import adapter_gradients, alone, drawn_alone

from llmppl import LM
from llmppl.network.transformer import reading_of
from llmppl.testing import tiny_lm

SIZES: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
PACKED: dict[str, dict[str, Any]] = {
    "Apertus": {},
    "Arcee": {},
    "BioGpt": {},
    "BitNet": {},
    "CTRL": {"n_embd": 16, "dff": 16, "n_layer": 2, "n_head": 2},
    "CodeGen": {"hidden_size": 32, "num_attention_heads": 4, "rotary_dim": 4},
    "Cohere": {},
    "DeepseekV3": {},
    "Ernie4_5": {"head_dim": 8},
    "Falcon": {"alibi": False},
    "FlexOlmo": {"num_experts": 2, "num_experts_per_tok": 1},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "GPTBigCode": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "GPTJ": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
    "GPTNeoX": {},
    "Gemma": {"head_dim": 8},
    "Glm": {"head_dim": 8},
    "Glm4": {"head_dim": 8},
    "Granite": {},
    "GraniteMoe": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Helium": {"head_dim": 8},
    "HunYuanDenseV1": {"head_dim": 8},
    "JetMoe": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Llama": {},
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Nemotron": {},
    "OPT": {"word_embed_proj_dim": 16, "ffn_dim": 16},
    "Olmo": {},
    "Olmo2": {},
    "Olmoe": {"num_experts": 2, "num_experts_per_tok": 1},
    "Persimmon": {},
    "Phi": {},
    "Phi3": {},
    "Qwen2": {},
    "Qwen2Moe": {"num_experts": 2, "num_experts_per_tok": 1},
    "Qwen3Moe": {"num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
    "Qwen3": {"head_dim": 8},
    "SeedOss": {"head_dim": 8},
    "SmolLM3": {},
    "StableLm": {},
    "XGLM": {"d_model": 16, "ffn_dim": 16, "attention_heads": 2, "num_layers": 2},
}
MAMBA = {"mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
BY_ROWS: dict[str, dict[str, Any]] = {
    "Bamba": {**MAMBA, "attn_layer_indices": [1]},
    "Bloom": {"n_layer": 2, "n_head": 2},
    "FalconMamba": {"state_size": 8},
    "GPTNeo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    "GraniteMoeHybrid": {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 2,
                         "num_experts_per_tok": 1, "shared_intermediate_size": 16},
    "Jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2, "mamba_d_state": 8,
              "use_mamba_kernels": False, "mamba_dt_rank": 4, "num_experts_per_tok": 1},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Mamba": {"state_size": 8},
    "Mamba2": {"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "MiniMax": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2},
    "Qwen3Next": {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
                  "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8,
                  "num_experts": 2, "num_experts_per_tok": 1, "decoder_sparse_step": 1, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 16},
    "RecurrentGemma": {"block_types": ["recurrent", "attention"], "lru_width": 16, "num_hidden_layers": 2,
                       "attention_window_size": 64},
    "Rwkv": {"attention_hidden_size": 16, "context_length": 64},
}  # fmt: skip


EXPERTS = ("FlexOlmo", "GraniteMoe", "GraniteMoeHybrid", "Jamba", "MiniMax", "Mixtral", "Olmoe", "Qwen2Moe", "Qwen3Moe")
SINGLE = (*EXPERTS, "Qwen3Next", "XGLM")  # in single precision at most

# Three keep no cache that can be reordered, and Bamba's steps with a cache differ from its plain passes by 4e-3 nats.
NO_FORKS = ("Bamba", "MiniMax", "RecurrentGemma", "Rwkv")


def make(name: str) -> LM:
    own = PACKED.get(name) or BY_ROWS.get(name) or {}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(hf, f"{name}Config")(**{**SIZES, **own})
        model = hf.AutoModelForCausalLM.from_config(config).eval()
    # Weights of the usual size leave a tiny model all but uniform.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return LM(model, tiny_lm(vocabulary=12).codec._tokenizer)


@pytest.mark.parametrize("name", [*PACKED, *BY_ROWS])
@pytest.mark.filterwarnings("ignore")  # of transformers, on kernels that are not installed
def test_scores_and_draws_are_those_of_plain_passes(name: str) -> None:
    """Prompts of unequal lengths, prefixes of one text among the texts, rows drawn several times; 2e-5 nats."""
    lm = make(name)
    assert f", {'packed' if name in PACKED else 'row by row'}" in repr(lm)
    assert reading_of(lm.transformer).forks == (name in BY_ROWS and name not in NO_FORKS)
    contexts = [torch.randint(1, 12, (size,)) for size in (14, 9)]
    texts = torch.randint(1, 12, (3, 5))
    texts[1, :3] = texts[0, :3]
    texts[2, 2:] = -1
    for context in contexts:
        found = lm(context, max_tokens=5).token_log_prob(texts[:2])
        with torch.no_grad():
            wanted = torch.stack([alone(lm, context, text) for text in texts[:2]])
            short = lm(context, max_tokens=2).token_log_prob(texts[2:, :2])
            torch.testing.assert_close(short[0], alone(lm, context, texts[2, :2]), atol=2e-5, rtol=0)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    padded = torch.full((2, 14), -1)
    for n, context in enumerate(contexts):
        padded[n, : len(context)] = context
    # Rows end at different places, and those that have ended leave the others.
    drawn, recorded = lm(padded, max_tokens=6, stop=[1, 2, 3, 4]).sample_with_log_prob((4,))
    assert len(set((drawn >= 0).sum(-1).flatten().tolist())) > 1
    torch.testing.assert_close(recorded, drawn_alone(lm, contexts, drawn), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*PACKED, *BY_ROWS])
@pytest.mark.filterwarnings("ignore")
def test_adapters_have_their_gradient(name: str) -> None:
    lm = make(name)
    if name not in SINGLE:  # experts are multiplied in single precision at most
        lm.transformer.double()
    gradients = adapter_gradients(lm, torch.randint(1, 12, (7,)), torch.randint(1, 12, (2, 4)))
    size = float(gradients[1].abs().max())
    assert size > 1e-3
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-4 * size
