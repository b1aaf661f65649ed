"""What may come next: the law of one token given what stands before it.

A text is drawn token by token until a stop token (which belongs to the text) or ``max_tokens``.
Temperature, vocabulary and grammar are part of this law: sampling and scoring both go through
:meth:`TextLaw.scaled_logits`, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from llmppl.network.text_tensors import is_right_padded, lengths
from llmppl.text import PAD
from llmppl.text.grammar import BoundGrammar
from llmppl.text.text_support import (
    LARGEST,
    check_lengths,
    check_temperature,
    check_tokens,
    enumerate_rows,
    support_size,
)


@dataclass(frozen=True, eq=False)
class TextLaw:
    """The law of a text as a process over tokens.

    :param vocabulary: number of tokens ``V``.
    :param max_tokens: most tokens of a text, the stop token included; ``None`` is the unbounded stream.
    :param min_tokens: fewest tokens of a text, the stop token included.
    :param stop: ids of the stop tokens, of shape ``(S,)``; empty: nothing ends the text early.
    :param allowed: tokens that may occur at all, a boolean mask of shape ``(V,)``, or ``None``.
    :param temperature: divides the logits.
    :param grammar: what continuations a grammar permits, or ``None``.
    """

    vocabulary: int
    max_tokens: int | None
    min_tokens: int
    stop: Tensor
    allowed: Tensor | None = None
    temperature: float = 1.0
    grammar: BoundGrammar | None = None

    def __post_init__(self) -> None:
        ends = bool(len(self.stop)) or self.grammar is not None
        check_lengths(self.max_tokens, self.min_tokens, ends)
        check_temperature(self.temperature, 0 < self.temperature < float("inf"))
        if self.allowed is not None or (self.min_tokens > 1 and len(self.stop)):
            free = self.free_tokens
            check_tokens(free, self._allowed_tokens - free, bool(len(self.stop)), self.min_tokens)

    def stop_forbidden(self, step: Tensor) -> Tensor:
        """Whether a text may not end yet at token number ``step`` (from 0)."""
        return step < self.min_tokens - 1

    def is_stop(self, tokens: Tensor) -> Tensor:
        return torch.isin(tokens, self.stop)

    def scaled_logits(self, logits: Tensor, step: Tensor, prefixes: Sequence[Sequence[int]] | None) -> Tensor:
        """The network's logits made those of this law: tempered, −inf where nothing may stand.

        :param logits: ``(P, V)`` from the network.
        :param step: ``(P,)``, how many tokens of the text stand before.
        :param prefixes: ``P`` token lists, the text so far; only a grammar reads them.
        """
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperature != 1:
            scaled = scaled / self.temperature
        if scaled.shape[-1] > self.vocabulary:
            # Embedding matrices are often padded beyond the tokenizer; those ids are no text.
            scaled = scaled[:, : self.vocabulary]
        if self.allowed is not None:
            scaled = scaled.masked_fill(~self.allowed, -torch.inf)
        if len(self.stop) and self.min_tokens > 1:
            early = self.stop_forbidden(step)
            if bool(early.any()):
                closing = torch.zeros(self.vocabulary, dtype=torch.bool, device=logits.device)
                closing[self.stop] = True
                scaled = scaled.masked_fill(early[:, None] & closing, -torch.inf)
        if self.grammar is not None:
            assert prefixes is not None
            permitted = torch.from_numpy(self.grammar.permitted(prefixes)).to(logits.device)
            scaled = scaled.masked_fill(~permitted, -torch.inf)
        return scaled

    @property
    def _allowed_tokens(self) -> int:
        return self.vocabulary if self.allowed is None else int(self.allowed.sum())

    @property
    def free_tokens(self) -> int:
        """How many tokens may follow one another in a text without ending it."""
        stops = self.stop if self.allowed is None else self.stop[self.allowed[self.stop]]
        return self._allowed_tokens - len(stops)

    def support_size(self) -> float:
        """Number of texts of the support (an upper bound under a grammar); infinite for the stream."""
        free = self.free_tokens
        return support_size(free, self._allowed_tokens - free, self.min_tokens, self.max_tokens)

    def kinds(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the tokens that may stand before the end of a text, and of those that end one."""
        tokens = torch.arange(self.vocabulary, device=self.stop.device)
        if self.allowed is not None:
            tokens = tokens[self.allowed]
        stops = self.is_stop(tokens)
        return tokens[~stops].cpu().numpy(), tokens[stops].cpu().numpy()


class _Text(constraints.Constraint):
    """Texts of a :class:`TextLaw`: tokens, then padding; ended by a stop token or by length."""

    is_discrete = True
    event_dim = 1

    def __init__(self, law: TextLaw) -> None:
        self.law = law
        super().__init__()

    def __repr__(self) -> str:
        law = self.law
        if law.max_tokens is None:
            return f"Text(vocabulary={law.vocabulary})"
        stops = f", {len(law.stop)} stop tokens" if len(law.stop) else ""
        return f"Text(vocabulary={law.vocabulary}, min_tokens={law.min_tokens}, max_tokens={law.max_tokens}{stops})"

    def check(self, value: Tensor) -> Tensor:
        law, pad = self.law, value == PAD
        length = lengths(value)
        valid = (((value >= 0) & (value < law.vocabulary)) | pad).all(-1)
        valid = valid & is_right_padded(value) & (length > 0)
        if law.allowed is not None:
            valid = valid & (law.allowed[value.clamp(0, law.vocabulary - 1)] | pad).all(-1)
        if law.max_tokens is None:
            return valid
        last = torch.arange(value.shape[-1], device=value.device) == length[..., None] - 1
        stops = law.is_stop(value)
        ended = (stops & last).any(-1)
        valid = valid & ~(stops & ~last).any(-1) & (length <= law.max_tokens)
        return valid & (length >= law.min_tokens) & (ended | (length == law.max_tokens))


def enumerate_texts(law: TextLaw, limit: int = LARGEST) -> Tensor:
    """Every text of a small support, of shape ``(n, max_tokens)``.

    :raises ValueError: unbounded, or more than ``limit`` texts.
    """
    if law.support_size() > limit:
        free, closing = np.empty(law.free_tokens), np.empty(law._allowed_tokens - law.free_tokens)  # only counted
    else:
        free, closing = law.kinds()
    texts = enumerate_rows(free, closing, law.min_tokens, law.max_tokens, law.grammar, limit)
    return torch.from_numpy(texts).to(law.stop.device)
