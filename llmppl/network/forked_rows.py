"""Rows that a network reads one by one, a token at a time, with a cache of its own kind."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CACHES = ("past_key_values", "cache_params", "state")
"""What architectures call their cache, as an argument and in what they return."""


class ForkedRows:
    """The caches of rows whose network cannot be packed: recurrent states, or keys whose places are counted.

    Each distinct context is read once, and its cache forked. Rows of one length share a cache, for nothing may stand
    before their first token.

    :param contexts: token lists, ``N`` in all.
    """

    @torch.no_grad()
    def __init__(self, transformer: torch.nn.Module, contexts: Sequence[tuple[int, ...]]) -> None:
        self.transformer = transformer
        known = inspect.signature(transformer.forward).parameters
        self._name = next(name for name in CACHES if name in known)
        self.device = next(transformer.parameters()).device
        lengths = list(dict.fromkeys(map(len, contexts)))
        self._group = torch.tensor([lengths.index(len(c)) for c in contexts], device=self.device)
        self._slot = torch.zeros_like(self._group)
        self._caches: list[Any] = []
        parts = []
        for n, length in enumerate(lengths):
            own = [context for context in contexts if len(context) == length]
            distinct = list(dict.fromkeys(own))
            index = torch.tensor([distinct.index(context) for context in own], device=self.device)
            logits, cache = self._read(torch.tensor(distinct, device=self.device), None)
            cache.reorder_cache(index)
            self._caches.append(cache)
            self._slot[self._group == n] = torch.arange(len(own), device=self.device)
            parts.append(logits[index])
        self.logits = self._gathered(parts)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, ``(M,)``; a row may be named several times."""
        group, slot = self._group[rows], self._slot[rows]
        self._group, self._slot = group, torch.zeros_like(slot)
        for n, cache in enumerate(self._caches):
            own = group == n
            if bool(own.any()):
                cache.reorder_cache(slot[own])
            self._slot[own] = torch.arange(int(own.sum()), device=self.device)
        self.logits = self.logits[rows]

    @torch.no_grad()
    def advance(self, tokens: Tensor) -> None:
        """Read one token a row, ``(N,)``."""
        parts = []
        for n, cache in enumerate(self._caches):
            own = self._group == n
            if not bool(own.any()):
                parts.append(self.logits[:0])
                continue
            logits, self._caches[n] = self._read(tokens[own][:, None], cache)
            parts.append(logits)
        self.logits = self._gathered(parts)

    def _gathered(self, parts: list[Tensor]) -> Tensor:
        found = parts[0].new_empty(len(self._group), parts[0].shape[-1])
        for n, part in enumerate(parts):
            found[self._group == n] = part
        return found

    def _read(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        given = {} if cache is None else {self._name: cache}
        found = self.transformer(input_ids=ids, use_cache=True, **given)
        return found.logits[:, -1], found[self._name]


@torch.no_grad()
def forks(transformer: torch.nn.Module, tolerance: float) -> bool:
    """Whether rows read with a forked cache have the logits of plain passes, found out by trying: behind two prompts of
    one length, one of them forked, and rows that change places."""
    last = transformer.get_input_embeddings().weight.shape[0] - 1  # type: ignore[operator]
    rows = [[min(first + n, last) for n in range(9)] for first in (1, 1, 2)]
    ends = [[min(3 * row + n + 2, last) for n in range(4)] for row in range(3)]
    order = torch.tensor([2, 0, 0, 1])
    try:
        found = ForkedRows(transformer, [tuple(row) for row in rows])
        for step in range(4):
            rows = [[*row, end[step]] for row, end in zip(rows, ends, strict=False)]
            device = found.device
            found.advance(torch.tensor([row[-1] for row in rows], device=device))
            if step == 1:
                found.select(order.to(device))
                rows, ends = [rows[n] for n in order.tolist()], [*ends, ends[0]]
            plain = transformer(input_ids=torch.tensor(rows, device=device), use_cache=False).logits[:, -1]
            if not torch.allclose(found.logits, plain, rtol=0, atol=tolerance):
                return False
    except Exception:  # whatever a cache that cannot be forked raises: these rows are read from their beginning
        return False
    return True
