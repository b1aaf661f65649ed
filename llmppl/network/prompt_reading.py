"""Reading prompts into a key-value cache, what they begin with once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llmppl.network.windows import Windows

FEWEST = 64
"""Tokens that are not read twice, below which a pass of their own costs more."""


@torch.no_grad()
def read_prompts(
    transformer: torch.nn.Module, prompts: Sequence[Sequence[int]], cache: DynamicCache
) -> tuple[Tensor, Tensor]:
    """Fill an empty cache with prompts, a row each, and say what follows them.

    Every row's last token stands in the last column. Before shorter ones there is padding that nobody sees: in front,
    or behind the tokens that all rows begin with, where these are read once.

    :param prompts: ``D`` token lists, all different, none empty.
    :returns: logits of the next tokens ``(D, V)``, and which columns are tokens, ``(D, L)`` of 0 and 1.
    """
    device = next(transformer.parameters()).device
    longest = max(map(len, prompts))
    common = shared_beginning(transformer, prompts)
    rows = [list(prompt[:common]) + [0] * (longest - len(prompt)) + list(prompt[common:]) for prompt in prompts]
    filled = [[1] * common + [0] * (longest - len(prompt)) + [1] * (len(prompt) - common) for prompt in prompts]
    ids, seen = torch.tensor(rows, device=device), torch.tensor(filled, device=device)
    places = (seen.cumsum(-1) - 1).clamp(min=0)
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(transformer.forward).parameters:
        options["logits_to_keep"] = 1
    if common:
        first = {
            "input_ids": ids[:1, :common],
            "attention_mask": seen[:1, :common],
            "position_ids": places[:1, :common],
        }
        transformer(**first, **options)
        cache.batch_repeat_interleave(len(prompts))
    found = transformer(input_ids=ids[:, common:], attention_mask=seen, position_ids=places[:, common:], **options)
    return found.logits[:, -1], seen


def shared_beginning(transformer: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens of different prompts are read once for all: what they begin with, each but its last one.

    None where that saves little, or where layers see a window of columns, which the padding behind would narrow.
    """
    # What the first and the last in their order share, all share.
    ordered = sorted(map(tuple, prompts))
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(ordered[0], ordered[-1], strict=False))
    common = min(len(list(equal)), min(map(len, prompts)) - 1)
    few = common * (len(prompts) - 1) < FEWEST
    return 0 if few or Windows.of(transformer.config).smallest is not None else common
