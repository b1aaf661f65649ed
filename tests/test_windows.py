"""Sliding windows and chunked attention, packed: against a plain forward pass of each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from plain_pass import adapter_gradients, alone, drawn_alone

from llmppl import LM
from llmppl.network import scoring
from llmppl.testing import tiny_lm

WINDOW = 5
SIZES: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
    "sliding_window": WINDOW,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 2}),
    "starcoder2": ("Starcoder2", {}),
    "phi3": ("Phi3", {}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, **MIXED}),
    "qwen3": ("Qwen3", {"use_sliding_window": True, **MIXED}),
    "gemma2": ("Gemma2", MIXED),
    "gemma3": ("Gemma3Text", MIXED),
    "gpt-oss": ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, **MIXED}),
    "olmo3": ("Olmo3", MIXED),
    "cohere2": ("Cohere2", MIXED),
    "exaone4": ("Exaone4", MIXED),
    "llama4": ("Llama4Text", {
        "attention_chunk_size": WINDOW, "num_local_experts": 2, "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 16, "layer_types": ["chunked_attention", "full_attention"],
    }),
}  # fmt: skip

SINGLE = {"mixtral", "gpt-oss"}
"""Their experts are multiplied in single precision at most."""


def make(name: str) -> LM:
    family, own = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**{**SIZES, **own}, attn_implementation="eager")
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model = model if name in SINGLE else model.double()
    # Weights of the usual size leave a tiny model all but uniform.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return LM(model, tiny_lm(vocabulary=12).codec._tokenizer)


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_far_beyond_the_window_have_their_probabilities(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 32 tokens and a window of 5; packed in one chunk, and in chunks of 20 tokens. That the window matters
    is asserted: without it the same text has another probability."""
    lm, within = make(name), 1e-4 if name in SINGLE else 1e-6
    assert lm.max_length == 128
    contexts = torch.randint(1, 12, (2, 32))
    contexts[1, :16] = contexts[0, :16]  # a shared beginning
    texts = torch.randint(1, 12, (2, 3, 9))
    texts[:, 1, :4] = texts[:, 0, :4]
    with torch.no_grad():
        wanted = torch.stack(
            [torch.stack([alone(lm, c, text) for text in row]) for c, row in zip(contexts, texts, strict=True)]
        )
    law = lm(contexts[:, None], max_tokens=9)
    torch.testing.assert_close(law.token_log_prob(texts), wanted, atol=within, rtol=0, check_dtype=False)
    monkeypatch.setitem(scoring.MAX_NODES, "cpu", 20)
    torch.testing.assert_close(
        lm(contexts[:, None], max_tokens=9).token_log_prob(texts), wanted, atol=within, rtol=0, check_dtype=False
    )
    # Drawing keeps its own keys and values, and records the same.
    drawn, recorded = lm(contexts, max_tokens=9).sample_with_log_prob((2,))
    torch.testing.assert_close(recorded, drawn_alone(lm, contexts, drawn), atol=within, rtol=0, check_dtype=False)
    whole = make(name)
    whole.network.windows = type(whole.network.windows)(dict.fromkeys(whole.network.windows.limits, ("full", 0)))
    assert float((whole(contexts[:, None], max_tokens=9).token_log_prob(texts) - wanted).abs().max()) > 1e-3


def test_an_adapter_has_the_gradient_of_a_plain_pass_under_a_window() -> None:
    lm = make("gemma3")
    gradients = adapter_gradients(lm, torch.randint(1, 12, (20,)), torch.randint(1, 12, (1, 6)))
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=1e-6)
    assert float(gradients[0].abs().max()) > 1e-3


def test_rotary_embeddings_that_change_with_length_bound_it() -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
               "original_max_position_embeddings": 32, "factor": 4.0, "rope_theta": 1e4}  # fmt: skip
    config = hf.Phi3Config(**{**SIZES, "sliding_window": None}, rope_scaling=scaling,
                           original_max_position_embeddings=32)  # fmt: skip
    lm = LM(hf.AutoModelForCausalLM.from_config(config), tiny_lm(vocabulary=12).codec._tokenizer)
    assert lm.max_length == 32
    with pytest.raises(ValueError, match="context of 32 tokens"):
        lm(torch.ones(30, dtype=torch.long), max_tokens=9).sample()
