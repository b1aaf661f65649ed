r"""Rewriting a part of a text, with the exact density of the rewriting.

A move chooses a place :math:`t` of the :math:`n` of a text, each with probability :math:`1/n`, and draws the
tokens of the block :math:`t, \dots, t+b-1` anew, one after another, from the law of a proposal after the tokens that
stand before. Two cases make it reversible at that place:

- tokens stand behind the block: they stay, and the new tokens may not be stop tokens; the length stays, too;
- the block reaches the end: the text ends anew within the block, its last token being a stop token unless it
  stands at ``max_tokens``.

The law of each token is renormalised over what is permitted. The texts that reach each other at :math:`t` are in the
same case, so that the way back has the density of the same renormalised laws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.network.drawing import Stream, choose, rows_at_once
from llmppl.network.text_law import Text, TextLaw
from llmppl.network.text_tensors import lengths, unpad_rows
from llmppl.text import PAD


def propose(fn: AutoregressiveText, texts: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """A rewriting of each text at a place of its own, and what the ways there and back are worth.

    :param fn: the proposal, of batch shape ``(N,)``.
    :param texts: ``(N, T)``.
    :param block: ``b``, tokens; ``T`` rewrites the text to its end.
    :returns: new texts ``(N, T)``, and log q(text | new) − log q(new | text), the choice of the place
        included, ``(N,)`` in nats; −inf where the proposal found no text.
    """
    count = lengths(texts)
    start = (torch.rand(len(texts), dtype=torch.float64, device=texts.device) * count).long()
    drawn = torch.full_like(texts, PAD)
    # There: drawn. Back: the same place of the same text, made to write the old tokens again.
    twice = fn.rows(torch.arange(len(texts), device=texts.device).repeat(2))
    new, log_q = rewrite(twice, texts.repeat(2, 1), start.repeat(2), block, torch.cat([drawn, texts]))
    there, back = log_q.chunk(2)
    new = new[: len(texts)]
    return new, log_ratio(count, lengths(new), there, back)


def log_ratio(length: Tensor, new_length: Tensor, there: Tensor, back: Tensor) -> Tensor:
    """log of (1/n') q(back) over (1/n) q(there); −inf where there is no way."""
    found = there.isfinite()
    ratio = back - there.masked_fill(~found, 0.0) + length.double().log() - new_length.double().log()
    return ratio.masked_fill(~found, -torch.inf)


@torch.no_grad()
def rewrite(fn: AutoregressiveText, texts: Tensor, start: Tensor, block: int, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The block of ``b`` tokens from given places on, drawn anew, and the log-density of that.

    :param fn: the proposal, of batch shape ``(N,)``. Its own adapter is on, in the model's own precision.
    :param start: ``(N,)``, a place of each text.
    :param targets: ``(N, T)``: what the texts must become; texts without tokens are drawn.
    :returns: texts ``(N, T)``; and the log-probability of drawing them, given the place, ``(N,)`` in nats: −inf for
        a target that the move cannot reach, or where nothing permitted was left (the text is then unchanged).
    """
    assert fn.law.max_tokens is not None
    results = []
    with fn.lm.using(fn.adapter):
        size = rows_at_once(fn.lm.transformer, fn.context.shape[-1] + fn.law.max_tokens)
        for n in range(0, len(texts), size):
            part = slice(n, n + size)
            results.append(_rewrite(fn.rows(part), texts[part], start[part], block, targets[part]))
    return torch.cat([new for new, _ in results]), torch.cat([log_q for _, log_q in results])


def _rewrite(
    fn: AutoregressiveText, texts: Tensor, start: Tensor, block: int, targets: Tensor
) -> tuple[Tensor, Tensor]:
    law, context, width = fn.law, fn.context, texts.shape[-1]
    inner = start + block < lengths(texts)
    last = (start + block).clamp(max=width) - 1
    places = torch.arange(width, device=texts.device)
    before, stays = places < start[:, None], (places < start[:, None]) | (places > last[:, None])
    forced = (targets != PAD).any(-1)
    new = texts.masked_fill(~stays, PAD)
    log_q = torch.zeros(len(texts), dtype=torch.float64, device=texts.device)
    log_q[forced & ((targets != texts) & stays).any(-1)] = -torch.inf

    rows = log_q.isfinite().nonzero()[:, 0]
    if len(rows):
        begun = torch.cat([context, texts.masked_fill(~before, PAD)], -1)[rows]
        stream = Stream(fn.lm.transformer, unpad_rows(begun), min(block, width))
    place = start[rows]
    while len(rows):
        begun = new[rows].masked_fill(places >= place[:, None], PAD)
        log_law = fn.next_log_probs(stream.logits, begun, rows)
        scaled = _permitted(log_law, law.closing(begun), place, inner[rows], last[rows], width)
        possible = ~torch.isneginf(scaled).all(-1)
        log_probs = scaled.masked_fill(~possible[:, None], 0.0).log_softmax(-1)
        token = torch.where(forced[rows], targets[rows, place], choose(log_probs))
        possible &= token != PAD
        step = log_probs.gather(-1, token.clamp(min=0)[:, None])[:, 0].double().masked_fill(~possible, -torch.inf)
        log_q[rows] += step
        new[rows, place] = token
        kept = (step.isfinite() & (place < last[rows]) & ~law.ends(begun, token.clamp(min=0))).nonzero()[:, 0]
        if not len(kept):
            break
        stream.select(kept)
        stream.advance(token[kept])
        rows, place = rows[kept], place[kept] + 1
    # A stop string may be written across the block's ends, and what stands behind a block may end no text any more.
    log_q[~fn.support.check(new)] = -torch.inf
    new[torch.isneginf(log_q)] = texts[torch.isneginf(log_q)]
    return new, log_q


def _permitted(log_law: Tensor, stops: Tensor, place: Tensor, inner: Tensor, last: Tensor, width: int) -> Tensor:
    """The law of the next token, −inf where it would leave the move, ``(N, V)``.

    :param stops: which tokens would end the text, ``(N, V)`` or ``(1, V)``.
    """
    must_end = ~inner & (place == last) & (last < width - 1)
    return log_law.masked_fill((inner[:, None] & stops) | (must_end[:, None] & ~stops), -torch.inf)


def alternatives(law: TextLaw, texts: Tensor, start: Tensor) -> Tensor:
    """Which tokens may stand at a place of each text with everything else as it is, ``(N, V)``. A grammar is left to
    the text's probability."""
    length = lengths(texts)
    tokens = torch.arange(law.vocabulary, device=texts.device)
    allowed = torch.ones_like(tokens, dtype=torch.bool) if law.allowed is None else law.allowed
    stops = law.closing(texts.masked_fill(torch.arange(texts.shape[-1], device=texts.device) >= start[:, None], PAD))
    at_end, full = (start == length - 1)[:, None], torch.eq(length, law.max_tokens or 0)[:, None]
    possible = allowed & torch.where(at_end, stops | full, ~stops)
    if law.automaton is None:
        return possible
    here = torch.arange(texts.shape[-1], device=texts.device) == start[:, None, None]
    return possible & Text(law).check(torch.where(here, tokens[:, None], texts[:, None]))
