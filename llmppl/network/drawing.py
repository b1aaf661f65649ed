"""Drawing texts token by token, with the log-probabilities recorded on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llmppl.network.forked_rows import ForkedRows
from llmppl.network.prompt_reading import read_prompts
from llmppl.network.shared_prompts import SharedPrompts, pays
from llmppl.network.text_tensors import unpad_rows
from llmppl.network.transformer import Network, reading_of
from llmppl.text import PAD
from llmppl.text.text_support import nan_mend

if TYPE_CHECKING:
    from llmppl.network.text_law import TextLaw

CACHE_BYTES = 512 * 2**20
"""Memory of the key-value cache and logits of the rows that are drawn together."""


Twist = Callable[[Tensor, list[int], Tensor], Tensor]
"""From log-probabilities over the vocabulary ``(P, V)``, the numbers of their rows and the texts so far ``(P, t)``,
other log-probabilities."""


class NotFiniteError(ValueError):
    """The network gave no probabilities."""


@torch.no_grad()
def draw(
    transformer: torch.nn.Module,
    law: TextLaw,
    contexts: Sequence[Sequence[int]],
    temperature: Tensor | None = None,
    twist: Twist | None = None,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One text for each context.

    Each distinct context is read once; its key-value cache is shared by the rows that have it.
    Rows that have ended leave the batch.

    :param contexts: ``N`` token lists, none empty.
    :param temperature: ``(N,)``, an extra temperature to draw at (a behaviour policy). The recorded
        log-probabilities are those of ``law`` all the same.
    :param twist: another law of the next token, made from ``law``'s; the recorded log-probabilities are its.
    :param own: ``(N, max_tokens)``, takes the log-probabilities under ``law`` itself.
    :returns: texts ``(N, max_tokens)`` and the log-probability of each token ``(N, max_tokens)``, nats.
    """
    order = sorted(range(len(contexts)), key=lambda n: list(contexts[n]))
    parts = []
    for block in blocks(transformer, [contexts[n] for n in order], law.max_tokens or 0):
        rows = order[block]
        heat = None if temperature is None else temperature[rows]
        parts.append(_draw_block(transformer, law, [contexts[n] for n in rows], heat, twist, rows, own))
    back = torch.tensor(order).argsort().to(parts[0][0].device)
    tokens = torch.cat([tokens for tokens, _ in parts])
    log_probs = torch.cat([log_probs for _, log_probs in parts])
    return tokens[back], log_probs[back]


def blocks(transformer: torch.nn.Module, contexts: Sequence[Sequence[int]], tokens: int) -> Iterator[slice]:
    """Rows that are written together: as many as :data:`CACHE_BYTES` hold.

    :param contexts: of each row, equal ones side by side.
    :param tokens: that each row may get.
    """
    size = rows_at_once(transformer, max(map(len, contexts), default=0) + tokens)
    ends: list[int] = []  # of each row, where another prompt begins
    for _, rows in groupby(map(tuple, contexts)):
        count = len(list(rows))
        ends += [len(ends) + count] * count
    start = 0
    while start < len(contexts):
        stop = min(start + size, len(contexts))
        if ends[start] > stop:  # one prompt, kept once
            prompt = tuple(contexts[start])
            count = min(ends[start] - start, shared_rows_at_once(transformer, len(prompt), tokens))
            if start + count > stop and pays([prompt] * count, tokens):
                stop = start + count
        yield slice(start, stop)
        start = stop


def shared_rows_at_once(transformer: torch.nn.Module, prompt: int, tokens: int) -> int:
    """How many rows behind one prompt :data:`CACHE_BYTES` hold where the prompt is kept once; one at least."""
    key, logits = _bytes(transformer)
    return max((CACHE_BYTES - key * prompt) // (key * tokens + logits), 1)


def rows_at_once(transformer: torch.nn.Module, tokens: int) -> int:
    """How many rows of so many tokens :data:`CACHE_BYTES` hold."""
    key, logits = _bytes(transformer)
    return max(CACHE_BYTES // (key * tokens + logits), 1)


def _bytes(transformer: torch.nn.Module) -> tuple[int, int]:
    """Of the keys and values of a token, and of some copies of a row's logits."""
    config: Any = transformer.config
    config = config.get_text_config()
    own = getattr(config, "num_attention_heads", None) or 1
    heads = getattr(config, "num_key_value_heads", None) or own
    width = getattr(config, "head_dim", None) or config.hidden_size // own
    size = next(transformer.parameters()).element_size()
    return int(2 * config.num_hidden_layers * heads * width * size), 3 * 4 * config.vocab_size


def _draw_block(
    transformer: torch.nn.Module,
    law: TextLaw,
    contexts: Sequence[Sequence[int]],
    temperature: Tensor | None,
    twist: Twist | None,
    numbers: Sequence[int],
    own: Tensor | None,
) -> tuple[Tensor, Tensor]:
    parameter = next(transformer.parameters())
    device, dtype = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
    assert law.max_tokens is not None
    values = torch.full((len(contexts), law.max_tokens), PAD, dtype=torch.long, device=device)
    recorded = torch.zeros(values.shape, dtype=dtype, device=device)

    stream = Stream(transformer, contexts, law.max_tokens)
    active = torch.arange(len(contexts), device=device)  # rows of the stream -> rows of the result
    open_row = torch.ones(len(contexts), dtype=torch.bool, device=device)
    for step in range(law.max_tokens):
        begun = values[active, :step]
        prefixes = unpad_rows(begun) if law.reads_prefix else None
        steps = torch.full((len(active),), step, device=device)
        log_probs = law.scaled_logits(stream.logits, steps, prefixes).log_softmax(-1)
        if bool(log_probs.isnan().any()):
            row = int(active[log_probs.isnan().any(-1)][0])
            raise NotFiniteError(f"the network's log-probabilities are NaN at row {row}, token {step}. {nan_mend(law)}")
        untwisted = log_probs
        if twist is not None:
            log_probs = twist(log_probs, [numbers[n] for n in active.tolist()], values[active, :step])
        weights = log_probs if temperature is None else log_probs / temperature[active, None]
        token = choose(weights)
        alive = open_row[active]
        values[active[alive], step] = token[alive]
        recorded[active[alive], step] = log_probs.gather(-1, token[:, None])[alive, 0]
        if own is not None:
            rows = torch.tensor(numbers, device=device)[active[alive]]
            own[rows, step] = untwisted.gather(-1, token[:, None])[alive, 0]
        open_row[active] &= ~law.ends(begun, token)
        alive = open_row[active]
        if step + 1 == law.max_tokens or not bool(alive.any()):
            break
        if law.grammar is not None or int(alive.sum()) <= 0.8 * len(alive):
            # Copying the cache costs about as much as a few wasted rows, hence the threshold.
            kept = alive.nonzero()[:, 0]
            stream.select(kept)
            active, token = active[kept], token[kept]
        stream.advance(token)
    if law.grammar is not None and bool(open_row.any()):
        law.grammar.warn_of_cut(unpad_rows(values[open_row]), law.max_tokens)
    return values, recorded


class Stream:
    """Rows of tokens that a transformer reads one after another, with their keys and values.

    Each distinct context is read once, and kept once where that is less work. Rows can be dropped and doubled on the
    way.

    :param contexts: ``N`` token lists, none empty.
    :param tokens: that a row may get.
    """

    logits: Tensor
    """Of the next token of each row, ``(N, V)``."""

    def __init__(self, transformer: torch.nn.Module, contexts: Sequence[Sequence[int]], tokens: int) -> None:
        self.transformer = transformer
        self._held: SharedPrompts | ForkedRows | None = None
        self._rows: list[list[int]] | None = None
        """The tokens so far of a network that is read row by row, whose cache cannot be forked."""
        rows, reading = [tuple(context) for context in contexts], reading_of(transformer)
        if not reading.packs and not reading.forks:
            self._rows = [list(context) for context in contexts]
            self._read_rows()
            return
        if not reading.packs or pays(rows, tokens):
            self._held = SharedPrompts(transformer, rows) if reading.packs else ForkedRows(transformer, rows)
            self.logits = self._held.logits
            return
        device = next(transformer.parameters()).device
        distinct = list(dict.fromkeys(tuple(context) for context in contexts))
        number = {context: n for n, context in enumerate(distinct)}
        source = torch.tensor([number[tuple(context)] for context in contexts], device=device)
        self._cache = DynamicCache(config=transformer.config)
        self.logits, self._seen = read_prompts(transformer, distinct, self._cache)
        self.select(source)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, ``(M,)``; a row may be named several times."""
        if self._rows is not None:
            self._rows = [self._rows[n] for n in rows.tolist()]
            self.logits = self.logits[rows]
            return
        if self._held is not None:
            self._held.select(rows)
            self.logits = self._held.logits
            return
        self._cache.batch_select_indices(rows)
        self.logits, self._seen = self.logits[rows], self._seen[rows]

    def advance(self, tokens: Tensor) -> None:
        """Read one token a row, ``(N,)``."""
        if self._rows is not None:
            self._rows = [[*row, token] for row, token in zip(self._rows, tokens.tolist(), strict=True)]
            self._read_rows()
            return
        if self._held is not None:
            self._held.advance(tokens)
            self.logits = self._held.logits
            return
        self._seen = torch.cat([self._seen, self._seen.new_ones(len(self._seen), 1)], -1)
        self._read(tokens[:, None], self._seen.sum(-1, keepdim=True) - 1)

    @torch.no_grad()
    def _read_rows(self) -> None:
        """Read every distinct row from its beginning."""
        assert self._rows is not None
        distinct = list(dict.fromkeys(map(tuple, self._rows)))
        number = {row: n for n, row in enumerate(distinct)}
        last = Network(self.transformer).rows(distinct, [(n, len(row) - 1) for n, row in enumerate(distinct)])
        self.logits = last[torch.tensor([number[tuple(row)] for row in self._rows], device=last.device)]

    @torch.no_grad()
    def _read(self, ids: Tensor, positions: Tensor) -> None:
        self.logits = self.transformer(
            input_ids=ids,
            attention_mask=self._seen,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]


def choose(log_weights: Tensor) -> Tensor:
    """One token a row of ``(N, V)`` by inversion: one random number a row, where ``torch.multinomial``
    draws one a token. Tokens of weight zero are never chosen."""
    steps = log_weights.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = steps[:, -1:]
    height = torch.rand(total.shape, dtype=torch.float64, device=total.device) * total
    below = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(steps, torch.minimum(height, below), right=True)[:, 0]
