"""How a program's joint changes, to first order, as the tokens of its latent texts change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.language_model import LM
from llmppl.network.scoring import MAX_NODES
from llmppl.network.text_law import TextLaw
from llmppl.programs.observations import Given
from llmppl.programs.provenance import NOWHERE, origins, plain, track
from llmppl.programs.structure import Program, Site, is_latent
from llmppl.text import PAD
from llmppl.text.trie import Trie

COLUMNS = 4096
"""Tokens of the vocabulary whose embeddings are multiplied at one time."""


@dataclass(frozen=True)
class Sensitivity:
    r"""The gradient of a joint with respect to the one-hot code of a latent text, averaged over draws.

    :param own: the text's own part, :math:`\log p(v \mid z_{<t})` of every token, ``(..., T, V)``, nats; zero
        where the law forbids the token.
    :param others: the part of everything that reads the token, linear in its embedding, same shape, nats up to
        a constant a position.
    :param reached: share of the draws whose text reaches the position, ``(..., T)``; the average is over them.
    """

    own: Tensor
    others: Tensor
    reached: Tensor


def sensitivity(
    lm: LM,
    program: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    texts: Mapping[str, Tensor],
    given: Mapping[str, Tensor] | None = None,
) -> dict[str, Sensitivity]:
    r"""Gradients of :math:`\log p(x, z)` with respect to the one-hot codes of the latent texts.

    A text enters the network as its one-hot code times the embeddings, and its own log-probability is the code
    times the law's log-softmax; both are differentiated at the drawn text. So the sum of both parts says, up to
    a constant, how the joint would change to first order were another token to stand at a position.

    Exact for what reads a text through ``lm(...)`` of this model. Factors, choices, other models and numbers
    that are computed from the tokens have no gradient, and do not count.

    :param texts: draws of the latent texts of ``lm(...)`` sites, ``(draws, ..., T)`` with all of the program's
        batch dimensions.
    :param given: values of its other latent sites.
    :returns: for each text, of the shape of one draw.
    """
    sums = _Sums.of(lm, texts)
    with torch.no_grad(), poutine.block(), Given({**(given or {}), **sums.tracked}):
        trace = poutine.trace(program).get_trace(*args, **kwargs)
    rows = [row for name, site in trace.nodes.items() if _counts(site, lm) for row in _rows(site, name in texts, sums)]
    size = MAX_NODES.get(lm.device.type, MAX_NODES["cpu"])
    for adapter in dict.fromkeys(row.adapter for row in rows):
        for group in _groups([row for row in rows if row.adapter == adapter], size):
            _accumulate(lm, group, sums)
    return sums.averages(lm)


class _Sums:
    """Gradients summed over draws, for every position of every row of one draw.

    The tokens of all texts are numbered through; ``place`` says which position of a draw each one is.
    """

    def __init__(self, texts: Mapping[str, Tensor], width: int, dtype: torch.dtype) -> None:
        self.texts, self.tracked = texts, dict[str, Tensor]()
        places, start, number = [], 0, 0
        for name, value in texts.items():
            tokens = torch.arange(number, number + value.numel(), device=value.device).reshape(value.shape)
            self.tracked[name] = track(value, tokens.masked_fill(value == PAD, NOWHERE))
            number += value.numel()
            place = torch.arange(start, start + value[0].numel(), device=value.device)
            places.append(place.expand(len(value), -1).reshape(-1))
            start += value[0].numel()
        self.place = torch.cat(places)
        self.embeddings = torch.zeros(start, width, dtype=dtype, device=self.place.device)
        self.own: Tensor | None = None

    @classmethod
    def of(cls, lm: LM, texts: Mapping[str, Tensor]) -> _Sums:
        weight = lm.transformer.get_input_embeddings().weight
        return cls(texts, weight.shape[1], lm.network.dtype)

    def add_own(self, tokens: Tensor, log_probs: Tensor) -> None:
        if self.own is None:
            self.own = log_probs.new_zeros(len(self.embeddings), log_probs.shape[-1])
        self.own.index_add_(0, self.place[tokens], log_probs)

    def averages(self, lm: LM) -> dict[str, Sensitivity]:
        found, start = {}, 0
        assert self.own is not None
        for name, value in self.texts.items():
            shape, size = value.shape[1:], value[0].numel()
            draws = (value != PAD).sum(0)
            count = draws.clamp(min=1).reshape(-1, 1)
            own = self.own[start : start + size] / count
            others = _times_embeddings(lm, self.embeddings[start : start + size] / count, own.shape[-1])
            wide = (*shape, own.shape[-1])
            reached = (draws / len(value)).to(own.dtype)
            found[name] = Sensitivity(own.reshape(wide), others.reshape(wide), reached)
            start += size
        return found


@dataclass(frozen=True)
class _Row:
    """A text to be scored after its context.

    :param keys: of the context and of all tokens but the last: token and number in one.
    :param before: tokens of the context.
    :param numbers: of the text's tokens, where it is latent.
    """

    adapter: str | None
    law: TextLaw
    keys: tuple[int, ...]
    before: int
    tokens: tuple[int, ...]
    numbers: tuple[int, ...]


def _counts(site: Site, lm: LM) -> bool:
    if site["type"] != "sample" or not isinstance(site["fn"], AutoregressiveText):
        return False
    return site["fn"].lm is lm.base and (site["is_observed"] or is_latent(site))


def _rows(site: Site, latent: bool, sums: _Sums) -> Iterator[_Row]:
    fn, value = site["fn"], site["value"]
    size = _embeddings(fn.lm).weight.shape[0]
    shape = torch.broadcast_shapes(value.shape[:-1], fn.batch_shape)

    def flat(tokens: Tensor) -> Tensor:
        return tokens.expand(shape + tokens.shape[-1:]).reshape(-1, tokens.shape[-1])

    columns = [flat(part) for part in (plain(fn.context), origins(fn.context), plain(value), origins(value))]
    seen = set()
    for context, context_numbers, tokens, numbers in zip(*(c.tolist() for c in columns), strict=True):
        count = sum(token != PAD for token in tokens)
        read = [(t, n) for t, n in zip(context, context_numbers, strict=True) if t != PAD]
        written = list(zip(tokens, numbers, strict=True))[:count]
        keys = tuple(token + size * (number + 1) for token, number in (*read, *written[:-1]))
        if not count or (not latent and max(keys) < size):
            continue  # nothing here is latent
        row = _Row(fn.adapter, fn.law, keys, len(read), tuple(tokens[:count]), tuple(numbers[:count]) if latent else ())
        if latent and row in seen:
            continue  # a latent text that a plate repeats has one probability
        seen.add(row)
        yield row


def _groups(rows: list[_Row], size: int) -> Iterator[list[_Row]]:
    """Rows that are read together: about ``size`` tokens, neighbours that begin alike."""
    group: list[_Row] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: row.keys):
        shared = 0
        for a, b in zip(row.keys, group[-1].keys if group else (), strict=False):
            if a != b:
                break
            shared += 1
        if group and tokens + len(row.keys) - shared > size:
            yield group
            group, tokens, shared = [], 0, 0
        group.append(row)
        tokens += len(row.keys) - shared
    if group:
        yield group


def _accumulate(lm: LM, rows: list[_Row], sums: _Sums) -> None:
    """One pass over the distinct prefixes of the rows, which have one adapter, and one back to the embeddings of
    latent tokens."""
    size = _embeddings(lm).weight.shape[0]
    trie = Trie.of([row.keys for row in rows])
    tokens, numbers = zip(*((key % size, key // size - 1) for key in trie.tokens), strict=True)
    paths = [path[row.before - 1 :] for row, path in zip(rows, trie.paths, strict=True)]
    keep = sorted({node for path in paths for node in path})
    at = {node: n for n, node in enumerate(keep)}
    with lm.using(rows[0].adapter), torch.enable_grad(), _embedded(lm) as leaves:
        visible = torch.from_numpy(trie.visible(0, len(trie)))
        states, _ = lm.network.states(list(tokens), trie.depths, visible, keep)
        total = states.new_zeros((), dtype=lm.network.dtype)
        laws = {id(row.law): row.law for row in rows}
        for key, law in laws.items():
            own = [(row, path) for row, path in zip(rows, paths, strict=True) if id(row.law) == key]
            index = torch.tensor([at[node] for _, path in own for node in path], device=lm.device)
            token = torch.tensor([token for row, _ in own for token in row.tokens], device=lm.device)
            step = torch.tensor([t for row, _ in own for t in range(len(row.tokens))], device=lm.device)
            prefixes = [row.tokens[:t] for row, _ in own for t in range(len(row.tokens))] if law.reads_prefix else None
            log_probs = law.scaled_logits(lm.network.logits(states[index]), step, prefixes).log_softmax(-1)
            total = total + log_probs.gather(-1, token[:, None]).sum()
            latent = [(n, number) for n, number in enumerate(n for row, _ in own for n in _numbers(row))]
            chosen = [(n, number) for n, number in latent if number != NOWHERE]
            if chosen:
                place, number = torch.tensor(chosen, device=lm.device).T
                known = log_probs.detach()[place]
                sums.add_own(number, known.masked_fill(known.isinf(), 0.0))
    (gradient,) = torch.autograd.grad(total, leaves[-1])  # others are of the network's probe
    moved = torch.tensor([(n, number) for n, number in enumerate(numbers) if number != NOWHERE], device=lm.device)
    if len(moved):
        node, number = moved.T
        sums.embeddings.index_add_(0, sums.place[number], gradient[0, node].to(sums.embeddings.dtype))


def _numbers(row: _Row) -> tuple[int, ...]:
    return row.numbers or (NOWHERE,) * len(row.tokens)


def _embeddings(lm: LM) -> Any:
    return lm.transformer.get_input_embeddings()


@contextmanager
def _embedded(lm: LM) -> Iterator[list[Tensor]]:
    """Collects what the embedding layer returns, each a leaf of the graph."""
    leaves: list[Tensor] = []

    def catch(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = _embeddings(lm).register_forward_hook(catch)
    try:
        yield leaves
    finally:
        handle.remove()


@torch.no_grad()
def _times_embeddings(lm: LM, gradient: Tensor, vocabulary: int) -> Tensor:
    """``(P, width)`` times the embedding of every token, ``(P, vocabulary)``."""
    ids = torch.arange(vocabulary, device=gradient.device)
    with lm.using(None):
        return torch.cat([gradient @ _embeddings(lm)(part).to(gradient.dtype).mT for part in ids.split(COLUMNS)], -1)
