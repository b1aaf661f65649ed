"""Scoring texts: every distinct token prefix of a batch goes through the network once.

The (context, text) rows of a batch are merged into a forest of prefixes. One forward pass runs over
its nodes, each attending to its own ancestors only (a 4-D mask), with its depth as position. Rows
that share a prompt, particles that share an observation and rows that are equal therefore cost
nothing twice, no padding is ever computed, and a batch gives the numbers of its rows one by one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmppl.text import PAD

if TYPE_CHECKING:
    from llmppl.stopping import TextLaw

MAX_NODES = 1024
"""Nodes of one forward pass: its memory is linear in them, its attention mask quadratic."""


@dataclass
class Forest:
    """A trie of token rows, packed for one forward pass; parents stand before their children."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    children: dict[tuple[int, int], int] = field(default_factory=dict)

    def missing(self, row: Sequence[int]) -> int:
        """How many nodes ``row`` would add."""
        node, found = -1, 0
        for token in row:
            child = self.children.get((node, token))
            if child is None:
                break
            node, found = child, found + 1
        return len(row) - found

    def insert(self, row: Sequence[int]) -> list[int]:
        """Add a row; return the node of each of its tokens."""
        node, path = -1, []
        for depth, token in enumerate(row):
            child = self.children.get((node, token))
            if child is None:
                child = len(self.tokens)
                self.children[node, token] = child
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(depth)
            path.append(child)
            node = child
        return path

    def attention_mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Additive mask of shape ``(1, 1, M, M)``: a node sees itself and its ancestors."""
        visible = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                visible[node] = visible[parent]
            visible[node, node] = True
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
        return mask[None, None].to(device)

    def logits(self, transformer: torch.nn.Module, nodes: list[int]) -> Tensor:
        """The network's logits after each of ``nodes``, of shape ``(len(nodes), V)``."""
        parameter = next(transformer.parameters())
        device = parameter.device
        keep = torch.tensor(nodes, device=device)
        arguments = {
            "input_ids": torch.tensor([self.tokens], device=device),
            "position_ids": torch.tensor([self.depths], device=device),
            "attention_mask": self.attention_mask(parameter.dtype, device),
            "use_cache": False,
        }
        if "logits_to_keep" in inspect.signature(transformer.forward).parameters:
            return transformer(**arguments, logits_to_keep=keep).logits[0]
        return transformer(**arguments).logits[0, keep]


def forests(rows: Sequence[Sequence[int]], max_nodes: int) -> Iterator[tuple[Forest, dict[int, list[int]]]]:
    """Pack rows into forests of at most ``max_nodes`` (one row alone may exceed it).

    :returns: each forest with the node paths of its rows, by row number.
    """
    forest, paths = Forest(), dict[int, list[int]]()
    # In lexicographic order rows that share a prefix are neighbours, so that they share a forest.
    for n in sorted(range(len(rows)), key=lambda n: list(rows[n])):
        if paths and len(forest.tokens) + forest.missing(rows[n]) > max_nodes:
            yield forest, paths
            forest, paths = Forest(), {}
        paths[n] = forest.insert(rows[n])
    if paths:
        yield forest, paths


def score(
    transformer: torch.nn.Module,
    law: TextLaw,
    contexts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    width: int,
    max_nodes: int = MAX_NODES,
) -> Tensor:
    """Log-probability of every token of every text given its context and the tokens before it.

    :param contexts: ``N`` token lists, none empty.
    :param texts: ``N`` token lists.
    :param width: number of columns ``T`` of the result.
    :returns: ``(N, T)`` in nats, zero behind the end; −inf for tokens that the law forbids.
    """
    # The last token of a text is predicted, never read.
    rows = [[*context, *text[:-1]] for context, text in zip(contexts, texts, strict=True)]
    results, places = [], list[tuple[int, int]]()
    for forest, paths in forests(rows, max_nodes):
        # One entry a (row, token): the node before it, its number in the text, the token.
        entries = [(paths[n][len(contexts[n]) - 1 + t], t, token, n) for n in paths for t, token in enumerate(texts[n])]
        if not entries:
            continue
        scores = _score_entries(transformer, law, forest, entries, texts)
        results.append(scores)
        places.extend((n, t) for _, t, _, n in entries)
    parameter = next(transformer.parameters())
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    total = torch.zeros(len(texts), width, dtype=dtype, device=parameter.device)
    if not results:
        return total
    row, column = torch.tensor(places, device=total.device).T
    return total.index_put((row, column), torch.cat(results))


def _score_entries(
    transformer: torch.nn.Module,
    law: TextLaw,
    forest: Forest,
    entries: list[tuple[int, int, int, int]],
    texts: Sequence[Sequence[int]],
) -> Tensor:
    """``(len(entries),)`` log-probabilities, each distinct next-token law normalised once."""
    nodes = sorted({node for node, _, _, _ in entries})
    position = {node: n for n, node in enumerate(nodes)}
    if law.grammar is None:
        # The next-token law depends on the node, and on whether the text may end here.
        keys = [(node, min(t, law.min_tokens)) for node, t, _, _ in entries]
    else:
        keys = [(n, t) for _, t, _, n in entries]
    first: dict[tuple[int, int], int] = {}
    for number, key in enumerate(keys):
        first.setdefault(key, number)
    rows = {key: n for n, key in enumerate(first)}
    chosen = [entries[number] for number in first.values()]

    logits = forest.logits(transformer, nodes)
    device = logits.device
    index = torch.tensor([position[node] for node, _, _, _ in chosen], device=device)
    steps = torch.tensor([t for _, t, _, _ in chosen], device=device)
    prefixes = None if law.grammar is None else [texts[n][:t] for _, t, _, n in chosen]
    scaled = law.scaled_logits(logits[index], steps, prefixes)  # (distinct laws, V)
    row = torch.tensor([rows[key] for key in keys], device=device)
    token = torch.tensor([token for _, _, token, _ in entries], device=device)
    return scaled[row, token] - torch.logsumexp(scaled, -1)[row]


def check_length(contexts: Tensor, max_tokens: int, model_length: int | None) -> None:
    """Refuse a prompt that does not fit the model together with its text.

    :raises ValueError: with the two lengths.
    """
    if model_length is None or not contexts.numel():
        return
    longest = int((contexts != PAD).sum(-1).max())
    if longest + max_tokens > model_length:
        raise ValueError(
            f"the prompt of {longest} tokens and a text of up to {max_tokens} tokens do not fit the "
            f"model's context of {model_length} tokens. Shorten the prompt or lower max_tokens."
        )
