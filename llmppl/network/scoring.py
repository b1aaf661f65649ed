"""Scoring texts: every distinct token prefix of a batch goes through the network once.

The (context, text) rows of all that is asked for together are merged into one trie of prefixes. Its
nodes run through the transformer packed, each seeing its own ancestors only (a 4-D mask), with its
depth as position. Rows that share a prompt, particles that share an observation, sites that share a
context, prefixes of one text and rows that are equal therefore cost nothing twice, no padding is
ever computed, and a batch gives the numbers of its rows one by one. A long trie runs in chunks; a
chunk is given the keys and values of the one path of the former chunks that it can see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmppl.network.transformer import KeysAndValues, Network
from llmppl.text import PAD
from llmppl.text.spelling import too_long
from llmppl.text.trie import Trie

if TYPE_CHECKING:
    from llmppl.network.text_law import TextLaw

MAX_NODES = {"cpu": 384, "cuda": 2048}
"""Tokens of one forward pass, by device: attention is quadratic in them, everything else linear."""

HEAD_ROWS = 512
"""States whose logits over the vocabulary exist at one time."""


Reader = Callable[[Tensor, Sequence[int], Sequence[int]], None]
"""Takes log-probabilities over the vocabulary ``(N, V)``, and the row and the column of the token that each is of."""


@dataclass(frozen=True)
class Request:
    """Texts of one law, each to be scored after its context.

    :param contexts: ``N`` token lists, none empty.
    :param texts: ``N`` token lists.
    :param width: number of columns ``T`` of the result.
    :param reader: is shown the law of every token, normalised, as it is made.
    """

    law: TextLaw
    contexts: Sequence[Sequence[int]]
    texts: Sequence[Sequence[int]]
    width: int
    reader: Reader | None = None


@dataclass(frozen=True)
class _Entry:
    """One log-probability wanted: that of ``token`` after ``node``."""

    node: int
    token: int
    row: int
    column: int


def score(network: Network, requests: Sequence[Request], max_nodes: int | None = None) -> list[Tensor]:
    """Log-probability of every token of every text given its context and the tokens before it.

    :param max_nodes: tokens of one forward pass; by default :data:`MAX_NODES`.
    :returns: for each request ``(N, T)`` in nats, zero behind the end; −inf for tokens that the law
        forbids.
    """
    size = max_nodes or MAX_NODES.get(network.device.type, MAX_NODES["cpu"])
    if not network.packs:
        return _score_rows(network, requests, size)
    # The last token of a text is predicted, never read.
    rows = [[*context, *text[:-1]] for r in requests for context, text in zip(r.contexts, r.texts, strict=True) if text]
    trie = Trie.of(rows)
    chunks = -(-len(trie) // size)
    size = -(-len(trie) // chunks) if chunks else size  # chunks of one length

    # What is wanted of each chunk, by request.
    wanted: list[dict[int, list[_Entry]]] = [{} for _ in range(chunks)]
    paths = iter(trie.paths)
    for number, r in enumerate(requests):
        for n, (context, text) in enumerate(zip(r.contexts, r.texts, strict=True)):
            path = next(paths)[len(context) - 1 :] if text else []
            for t, (node, token) in enumerate(zip(path, text, strict=True)):
                wanted[node // size].setdefault(number, []).append(_Entry(node, token, n, t))

    found: list[list[Tensor]] = [[] for _ in requests]
    places: list[list[tuple[int, int]]] = [[] for _ in requests]
    past: KeysAndValues | None = None
    for c, by_request in enumerate(wanted):
        start, stop = c * size, min((c + 1) * size, len(trie))
        keep = sorted({entry.node for entries in by_request.values() for entry in entries})
        onward = trie.ancestors(stop) if stop < len(trie) else []
        states, cache = network.states(
            trie.tokens[start:stop],
            trie.depths[start:stop],
            torch.from_numpy(trie.visible(start, stop)),
            [node - start for node in keep],
            past,
            caches=bool(onward),
        )
        past = _select(cache, trie.depths[start], start, onward, trie.depths)
        at = {node: n for n, node in enumerate(keep)}
        for number, entries in by_request.items():
            scores, ordered = _score_chunk(network, requests[number], states, at, entries, len(trie))
            found[number].append(scores)
            places[number].extend((entry.row, entry.column) for entry in ordered)
    return [_table(network, r, f, p) for r, f, p in zip(requests, found, places, strict=True)]


def _score_rows(network: Network, requests: Sequence[Request], size: int) -> list[Tensor]:
    """As :func:`score`, by plain forward passes over the distinct rows; a row's tokens are the nodes."""
    wanted: list[tuple[tuple[int, ...], int, list[_Entry]]] = []
    first, nodes = dict[tuple[int, ...], int](), 0
    for number, r in enumerate(requests):
        for n, (context, text) in enumerate(zip(r.contexts, r.texts, strict=True)):
            if not text:
                continue
            row = (*context, *text[:-1])
            if row not in first:
                first[row], nodes = nodes, nodes + len(row)
            start = first[row] + len(context) - 1
            wanted.append((row, number, [_Entry(start + t, token, n, t) for t, token in enumerate(text)]))
    found: list[list[Tensor]] = [[] for _ in requests]
    places: list[list[tuple[int, int]]] = [[] for _ in requests]
    for rows in _together(sorted(first, key=len), size):
        within = {row: n for n, row in enumerate(rows)}
        by_request: dict[int, list[_Entry]] = {}
        keep: dict[int, tuple[int, int]] = {}
        for row, number, entries in wanted:
            if row in within:
                by_request.setdefault(number, []).extend(entries)
                keep.update({entry.node: (within[row], entry.node - first[row]) for entry in entries})
        states = network.rows(rows, list(keep.values()))
        at = {node: n for n, node in enumerate(keep)}
        for number, entries in by_request.items():
            scores, ordered = _score_chunk(network, requests[number], states, at, entries, nodes)
            found[number].append(scores)
            places[number].extend((entry.row, entry.column) for entry in ordered)
    return [_table(network, r, f, p) for r, f, p in zip(requests, found, places, strict=True)]


def _together(rows: Sequence[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Rows, the shortest first, that are run together: at most so many tokens, the filling counted."""
    part: list[tuple[int, ...]] = []
    for row in rows:
        if part and len(row) * (len(part) + 1) > size:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _select(
    cache: KeysAndValues | None, past: int, start: int, path: list[int], depths: list[int]
) -> KeysAndValues | None:
    """The keys and values of one path, from those of a chunk and of what it was given."""
    if cache is None:
        return None
    where = [past + node - start if node >= start else depths[node] for node in path]
    index = torch.tensor(where, device=cache[0][0].device)
    return [(keys.index_select(-2, index), values.index_select(-2, index)) for keys, values in cache]


def _table(network: Network, r: Request, found: list[Tensor], places: list[tuple[int, int]]) -> Tensor:
    total = torch.zeros(len(r.texts), r.width, dtype=network.dtype, device=network.device)
    if not found:
        return total
    row, column = torch.tensor(places, device=total.device).T
    return total.index_put((row, column), torch.cat(found).to(total.dtype))


def _score_chunk(
    network: Network, r: Request, states: Tensor, at: dict[int, int], entries: list[_Entry], nodes: int
) -> tuple[Tensor, list[_Entry]]:
    """Log-probabilities of a chunk's entries, each distinct next-token law normalised once; and the
    entries in their order."""
    by_law: dict[tuple[int, int], list[_Entry]] = {}
    for entry in entries:
        # The next-token law depends on the node, and on whether the text may end here.
        step = min(entry.column, r.law.min_tokens)
        shared = not r.law.reads_prefix and r.reader is None
        key = (entry.node, step) if shared else (entry.row, entry.column)
        by_law.setdefault(key, []).append(entry)
    groups = list(by_law.values())
    scores = []
    # Logits of more than one block are made again in the backward pass, not kept for it.
    saves = torch.is_grad_enabled() and states.requires_grad and nodes > HEAD_ROWS
    for first in range(0, len(groups), HEAD_ROWS):
        block = groups[first : first + HEAD_ROWS]
        index = torch.tensor([at[group[0].node] for group in block], device=states.device)
        if saves:
            part = checkpoint(
                _normalised, network, r, states[index], block, use_reentrant=False, preserve_rng_state=False
            )
        else:
            part = _normalised(network, r, states[index], block)
        scores.append(part)
    return torch.cat(scores), [entry for group in groups for entry in group]


def _normalised(network: Network, r: Request, states: Tensor, groups: list[list[_Entry]]) -> Tensor:
    """Log-probabilities of the entries of each group under the next-token law that they share."""
    firsts = [group[0] for group in groups]
    steps = torch.tensor([entry.column for entry in firsts], device=states.device)
    prefixes = [r.texts[entry.row][: entry.column] for entry in firsts] if r.law.reads_prefix else None
    scaled = r.law.scaled_logits(network.logits(states), steps, prefixes)  # (groups, V)
    row = torch.tensor([n for n, group in enumerate(groups) for _ in group], device=states.device)
    token = torch.tensor([entry.token for group in groups for entry in group], device=states.device)
    total = scaled.logsumexp(-1)
    if r.reader is not None:
        r.reader(scaled - total[:, None], [entry.row for entry in firsts], [entry.column for entry in firsts])
    return scaled[row, token] - total[row]


def check_length(contexts: Tensor, max_tokens: int, model_length: int | None) -> None:
    """Refuse a prompt that does not fit the model together with its text.

    :raises ValueError: with the two lengths.
    """
    if model_length is None or not contexts.numel():
        return
    longest = int((contexts != PAD).sum(-1).max())
    if longest + max_tokens > model_length:
        raise too_long(longest, max_tokens, model_length)
