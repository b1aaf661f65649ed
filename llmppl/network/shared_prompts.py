"""Rows that are written behind shared prompts: each prompt's keys and values are there once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llmppl.network.prompt_reading import read_prompts
from llmppl.network.windows import Windows

COPYING = 6
"""What copying a key and its value costs, in attended pairs of tokens: measured with SmolLM2 on one core."""

FEWEST = 500
"""Tokens of all rows' prompts below which there is nothing to gain."""

SPARSE = 0.6
"""Where fewer of a prompt's further keys are still seen, the others are dropped."""


def pays(contexts: Sequence[tuple[int, ...]], tokens: int) -> bool:
    """Whether rows are written with less work as queries side by side behind one copy of their prompt than each with a
    copy of its own.

    :param contexts: of each row.
    :param tokens: that each row may get.
    """
    counts = Counter(contexts)
    rows, prompts, most, longest = len(contexts), len(counts), max(counts.values()), max(map(len, counts))
    if rows * longest < FEWEST:
        return False
    alone = longest + tokens / 2
    together = longest + most * tokens / 2
    return prompts * (COPYING + most) * together < 0.9 * rows * (COPYING + 1) * alone


class SharedPrompts:
    """The cache of rows that are read a token at a time, as queries side by side behind their prompts.

    A prompt is a row of the network's batch, and what is written behind it its queries, which see the prompt and their
    own tokens. Rows that are dropped or doubled change what is seen, and no key is copied.

    :param contexts: token lists, ``N`` in all, of which few are distinct.
    """

    @torch.no_grad()
    def __init__(self, transformer: torch.nn.Module, contexts: Sequence[tuple[int, ...]]) -> None:
        self.transformer = transformer
        config: Any = transformer.config
        self.windows = Windows.of(config)
        self.device = next(transformer.parameters()).device
        distinct = list(dict.fromkeys(contexts))
        number = {context: n for n, context in enumerate(distinct)}
        self.group = torch.tensor([number[context] for context in contexts], device=self.device)
        self.place = torch.tensor([len(context) for context in contexts], device=self.device)
        # Without a configuration every layer keeps all keys, which the mask counts on.
        self._cache = DynamicCache()
        logits, seen = read_prompts(transformer, distinct, self._cache)
        self.longest = seen.shape[-1]
        self._keys_at = (seen.cumsum(-1) - 1).clamp(min=0)  # (prompts, keys), the place of each key in its row
        self._visible = seen.bool()[self.group]  # (N, keys)
        self.logits = logits[self.group]

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, ``(M,)``; a row may be named several times."""
        self.logits = self.logits[rows]
        self._visible, self.group, self.place = self._visible[rows], self.group[rows], self.place[rows]

    @torch.no_grad()
    def advance(self, tokens: Tensor) -> None:
        """Read one token a row, ``(N,)``."""
        self._drop_unseen()
        prompts = len(self._keys_at)
        count = torch.bincount(self.group, minlength=prompts)
        width = int(count.max())
        # The rows of each prompt stand side by side, in their order.
        order = self.group.argsort(stable=True)
        slot = torch.empty_like(self.group)
        slot[order] = torch.arange(len(order), device=self.device) - (count.cumsum(0) - count)[self.group[order]]
        at = self.group, slot

        def spread(values: Tensor) -> Tensor:
            table = values.new_zeros((prompts, width, *values.shape[1:]))
            table[at] = values
            return table

        places = spread(self.place)
        own = torch.eye(width, dtype=torch.bool, device=self.device)
        visible = torch.cat([spread(self._visible), own.expand(prompts, -1, -1)], -1)
        keys_at = torch.cat([self._keys_at, places], -1)
        dtype = next(self.transformer.parameters()).dtype
        found = self.transformer(
            input_ids=spread(tokens),
            attention_mask=self.windows.masks(visible[:, None], places, keys_at, dtype),
            position_ids=places,
            past_key_values=self._cache,
            use_cache=True,
        )
        self.logits = found.logits[at]
        self._visible, self._keys_at, self.place = visible[at], keys_at, self.place + 1

    def _drop_unseen(self) -> None:
        """Forget keys of rows that are gone, where they are many."""
        prompts, keys = self._keys_at.shape
        seen = torch.zeros(prompts, keys, dtype=torch.long, device=self.device)
        seen.index_add_(0, self.group, self._visible.long())
        kept = (seen > 0) | (torch.arange(keys, device=self.device) < self.longest)
        most = int(kept.sum(-1).max())
        if most - self.longest >= SPARSE * (keys - self.longest):
            return
        # The kept ones first, in their order; what fills a shorter list is seen by nobody.
        index = (~kept).long().argsort(dim=-1, stable=True)[:, :most]
        self._keys_at = self._keys_at.gather(-1, index)
        self._visible = self._visible.gather(-1, index[self.group])
        each = torch.arange(prompts, device=self.device)[:, None]
        for layer in self._cache.layers:
            layer.keys, layer.values = (
                x.transpose(1, 2)[each, index].transpose(1, 2) for x in (layer.keys, layer.values)
            )
