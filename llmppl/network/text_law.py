"""What may come next: the law of one token given what stands before it.

A text is drawn token by token until a stop token (which belongs to the text) or ``max_tokens``.
Temperature, vocabulary and grammar are part of this law: sampling and scoring both go through
:meth:`TextLaw.scaled_logits`, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from llmppl.network.text_tensors import is_right_padded, lengths, pad_rows
from llmppl.text import PAD
from llmppl.text.grammar import BoundGrammar
from llmppl.text.stop_automaton import END, StopAutomaton
from llmppl.text.text_support import (
    LARGEST,
    check_lengths,
    check_temperature,
    check_tokens,
    enumerate_rows,
    moves_of,
    support_size,
)


@dataclass(frozen=True, eq=False)
class TextLaw:
    """The law of a text as a process over tokens.

    :param vocabulary: number of tokens ``V``.
    :param max_tokens: most tokens of a text, the stop token included; ``None`` is the unbounded stream.
    :param min_tokens: fewest tokens of a text, the stop token included.
    :param stop: ids of the stop tokens, of shape ``(S,)``, which end a text whatever stands before them.
    :param allowed: tokens that may occur at all, a boolean mask of shape ``(V,)``, or ``None``.
    :param temperature: divides the logits.
    :param grammar: what continuations a grammar permits, or ``None``.
    :param automaton: which tokens end a text after what stands before, where stop strings are written by several
        tokens; those of ``stop`` among them.
    """

    vocabulary: int
    max_tokens: int | None
    min_tokens: int
    stop: Tensor
    allowed: Tensor | None = None
    temperature: float = 1.0
    grammar: BoundGrammar | None = None
    automaton: StopAutomaton | None = None

    def __post_init__(self) -> None:
        check_lengths(self.max_tokens, self.min_tokens, self.stops or self.grammar is not None)
        check_temperature(self.temperature, 0 < self.temperature < float("inf"))
        if self.allowed is not None or (self.min_tokens > 1 and self.stops):
            check_tokens(*self.alphabet(), self.stops, self.min_tokens)

    @property
    def stops(self) -> bool:
        """Whether something ends a text early."""
        return bool(len(self.stop)) or self.automaton is not None

    @property
    def reads_prefix(self) -> bool:
        """Whether what may come next depends on the tokens before, and not on their number alone."""
        return self.grammar is not None or (self.automaton is not None and self.min_tokens > 1)

    def described_stop(self) -> str:
        """What ends a text, for a ``repr``."""
        if self.automaton is not None:
            return f"stop={', '.join(map(repr, self.automaton.strings))}"
        return f"{len(self.stop)} stop tokens"

    def stop_forbidden(self, step: Tensor) -> Tensor:
        """Whether a text may not end yet at token number ``step`` (from 0)."""
        return step < self.min_tokens - 1

    def ended(self, texts: Tensor) -> Tensor:
        """Which tokens of texts ``(..., T)`` stand at the end of the text or behind it; padding does not."""
        if self.automaton is None:
            return (torch.isin(texts, self.stop).cumsum(-1) > 0) & (texts != PAD)
        states = self._states(texts)[..., 1:]
        return (states == self.automaton.size) & (texts != PAD)

    def ends(self, begun: Tensor, token: Tensor) -> Tensor:
        """Whether tokens ``(P,)`` end the texts that have begun with ``(P, t)``."""
        if self.automaton is None:
            return torch.isin(token, self.stop)
        return self._table()[self._states(begun)[..., -1], token] == self.automaton.size

    def closing(self, begun: Tensor) -> Tensor:
        """Which tokens end texts that have begun with ``(P, t)``: ``(P, V)``, or ``(1, V)`` where it is the same."""
        if self.automaton is None:
            found = torch.zeros(1, self.vocabulary, dtype=torch.bool, device=self.stop.device)
            found[:, self.stop] = True
            return found
        return self._table()[self._states(begun)[..., -1]] == self.automaton.size

    @property
    def closer(self) -> Tensor:
        """The first stop token that may occur, a scalar."""
        return self.stop[0 if self.allowed is None else int(self.allowed[self.stop].int().argmax())]

    def closers(self, begun: Tensor) -> Tensor:
        """A token for each text that has begun with ``(..., t)`` that ends it, ``PAD`` where none does."""
        if self.automaton is None:
            return self.closer.expand(begun.shape[:-1])
        known = torch.from_numpy(self.automaton.closers).to(begun)
        return torch.nn.functional.pad(known, (0, 1), value=PAD)[self._states(begun)[..., -1]]

    def _table(self) -> Tensor:
        """The moves of the automaton, with a last state for texts that have ended."""
        assert self.automaton is not None
        known, device = _tables.setdefault(self.automaton, {}), self.stop.device
        if device not in known:
            moves, size = torch.from_numpy(self.automaton.moves.astype("int64")), self.automaton.size
            moves = torch.nn.functional.pad(moves.masked_fill(moves == END, size), (0, 0, 0, 1), value=size)
            known[device] = moves.to(device)
        return known[device]

    def _states(self, texts: Tensor) -> Tensor:
        """The automaton's states before each token of ``(..., T)`` and after the last, ``(..., T + 1)``."""
        table = self._table()
        found = [torch.zeros(texts.shape[:-1], dtype=torch.long, device=texts.device)]
        for token in texts.unbind(-1):
            inside = (token >= 0) & (token < self.vocabulary)
            found.append(torch.where(inside, table[found[-1], token.clamp(0, self.vocabulary - 1)], found[-1]))
        return torch.stack(found, -1)

    def scaled_logits(self, logits: Tensor, step: Tensor, prefixes: Sequence[Sequence[int]] | None) -> Tensor:
        """The network's logits made those of this law: tempered, −inf where nothing may stand.

        :param logits: ``(P, V)`` from the network.
        :param step: ``(P,)``, how many tokens of the text stand before.
        :param prefixes: ``P`` token lists, the text so far; read where :attr:`reads_prefix`.
        """
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperature != 1:
            scaled = scaled / self.temperature
        if scaled.shape[-1] > self.vocabulary:
            # Embedding matrices are often padded beyond the tokenizer; those ids are no text.
            scaled = scaled[:, : self.vocabulary]
        if self.allowed is not None:
            scaled = scaled.masked_fill(~self.allowed, -torch.inf)
        if self.stops and self.min_tokens > 1:
            early = self.stop_forbidden(step)
            if bool(early.any()):
                begun = pad_rows(prefixes or [], device=logits.device) if self.reads_prefix else step[:, None]
                scaled = scaled.masked_fill(early[:, None] & self.closing(begun), -torch.inf)
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
        return support_size(*self.alphabet(), self.min_tokens, self.max_tokens)

    def alphabet(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the tokens that may occur, ``(A,)``, and the state after each token of the vocabulary, ``(S, V)``."""
        tokens = np.arange(self.vocabulary)
        if self.allowed is not None:
            tokens = tokens[self.allowed.cpu().numpy()]
        return tokens, moves_of(self.vocabulary, self.stop.tolist(), self.automaton)


_tables: WeakKeyDictionary[StopAutomaton, dict[torch.device, Tensor]] = WeakKeyDictionary()


class Text(constraints.Constraint):
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
        stops = f", {law.described_stop()}" if law.stops else ""
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
        stops = law.ended(value)
        ended = (stops & last).any(-1)
        valid = valid & ~(stops & ~last).any(-1) & (length <= law.max_tokens)
        return valid & (length >= law.min_tokens) & (ended | (length == law.max_tokens))


def enumerate_texts(law: TextLaw, limit: int = LARGEST) -> Tensor:
    """Every text of a small support, of shape ``(n, max_tokens)``.

    :raises ValueError: unbounded, or more than ``limit`` texts.
    """
    texts = enumerate_rows(*law.alphabet(), law.min_tokens, law.max_tokens, law.grammar, limit)
    return torch.from_numpy(texts).to(law.stop.device)
