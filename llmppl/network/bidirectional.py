"""Whether a causal transformer can be made to look at both sides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmppl.network.transformer import Network, attend


def mean_embedding(transformer: Any, vocabulary: int) -> Tensor:
    """Of all tokens, ``(1, width)``: it says nothing of any, as a mask does."""
    return transformer.get_input_embeddings().weight[:vocabulary].mean(0, keepdim=True)


@torch.no_grad()
def probe_bidirectional(transformer: Any) -> None:
    """Refuse an architecture whose tokens do not see what stands behind them under a zero 4-D mask.

    :raises ValueError: naming the architecture.
    """
    device = next(transformer.parameters()).device
    places = torch.arange(3, device=device)[None]
    visible = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=device)
    last = transformer.get_input_embeddings().weight.shape[0] - 1
    reason: Exception | None = None
    try:
        ends = (min(2, last), last if last > 2 else 0)
        rows = torch.tensor([[0, min(1, last), end] for end in ends], device=device)
        found, _ = attend(transformer.base_model, rows, places.expand(2, -1), visible.expand(2, -1, -1, -1), [], False)
        first, second = found.last_hidden_state[:, 0]
        sees = not torch.allclose(first, second) and Network(transformer).splits
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        sees, reason = False, error
    if not sees:
        raise ValueError(
            f"the attention of {type(transformer).__name__} cannot be made bidirectional: it does not follow a zero "
            "4-D mask, or its logits are not those of its last state. Use a model of the llama, qwen2, qwen3, mistral "
            "or gpt2 family loaded with attn_implementation='sdpa' or 'eager', or MaskedLM.from_scratch(lm)."
        ) from reason
