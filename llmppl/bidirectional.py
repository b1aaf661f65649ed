"""A causal transformer run under any attention, and found out where it follows none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llmppl.network import Network

if TYPE_CHECKING:
    from llmppl.language_model import LM


def mean_embedding(lm: LM) -> Tensor:
    """Of all tokens, ``(1, width)``: it says nothing of any, as a mask does."""
    return lm.transformer.get_input_embeddings().weight[: lm.vocabulary].mean(0, keepdim=True)


def run_trunk(
    transformer: Any,
    tokens: Tensor,
    places: Tensor,
    visible: Tensor,
    past: list[tuple[Tensor, Tensor]],
    caches: bool,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Last hidden states of ``(N, M)`` tokens under any attention, and the keys and values of all so far.

    :param places: positions, ``(N, M)``.
    :param visible: which keys each token sees, boolean ``(N, 1, M, P + M)``: those of ``past`` first.
    """
    dtype = next(transformer.parameters()).dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    mask = mask.masked_fill_(~visible, torch.finfo(dtype).min)
    # Without a configuration every layer keeps all it is given, which the mask counts on.
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)
    found = transformer.base_model(
        input_ids=tokens,
        position_ids=places,
        attention_mask=mask,
        past_key_values=cache if past or caches else None,
        use_cache=bool(past) or caches,
    )
    kept = [(layer.keys, layer.values) for layer in cache.layers] if caches else []
    return found.last_hidden_state, kept


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
        first, second = (
            run_trunk(transformer, torch.tensor([[0, min(1, last), token]], device=device), places, visible, [], False)[
                0
            ]
            for token in (min(2, last), last if last > 2 else 0)
        )
        sees = not torch.allclose(first[0, 0], second[0, 0]) and Network(transformer).splits
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        sees, reason = False, error
    if not sees:
        raise ValueError(
            f"the attention of {type(transformer).__name__} cannot be made bidirectional: it does not follow a zero "
            "4-D mask, or its logits are not those of its last state. Use a model of the llama, qwen2, qwen3, mistral "
            "or gpt2 family loaded with attn_implementation='sdpa' or 'eager', or MaskedLM.from_scratch(lm)."
        ) from reason
