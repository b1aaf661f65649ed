"""What may come next: the law of one token given what stands before it.

A text is drawn token by token until a stop token (which belongs to the text) or ``max_tokens``.
Temperature, vocabulary and grammar are part of this law: sampling and scoring both go through
:meth:`TextLaw.scaled_logits`, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import constraints

from llmppl.text import PAD, is_right_padded, lengths, unpad_rows

if TYPE_CHECKING:
    from llmppl.grammar import BoundGrammar


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
        for name in ("max_tokens", "min_tokens"):
            count = getattr(self, name)
            if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
                raise TypeError(f"{name} must be a whole number of tokens, got {count!r}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(
                f"max_tokens must be at least 1, got {self.max_tokens}. Leave it out for the unbounded stream."
            )
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must not be negative, got {self.min_tokens}.")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} is less than min_tokens={self.min_tokens}. "
                "Raise max_tokens or lower min_tokens."
            )
        if not self.temperature > 0 or self.temperature == float("inf"):
            raise ValueError(
                f"temperature must be positive and finite, got {self.temperature}. "
                "The most probable text is a matter of decoding, not of a distribution."
            )
        if self.max_tokens is None and (len(self.stop) or self.min_tokens or self.grammar is not None):
            raise ValueError(
                "stop, min_tokens and grammar need max_tokens: without it the distribution is the "
                "unbounded stream, which never ends. Pass max_tokens, or leave the others out."
            )
        if self.allowed is not None:
            if not bool(self.allowed.any()):
                raise ValueError("allowed= permits no token at all. Allow at least one.")
            if len(self.stop) and not bool(self.allowed[self.stop].any()):
                raise ValueError(
                    "allowed= excludes every stop token, so no text could end. "
                    "Allow at least one stop token, or leave stop out."
                )
        if self.max_tokens is not None and self.min_tokens > 1 and len(self.stop):
            open_tokens = torch.ones(self.vocabulary, dtype=torch.bool, device=self.stop.device)
            if self.allowed is not None:
                open_tokens = self.allowed.clone()
            open_tokens[self.stop] = False
            if not bool(open_tokens.any()):
                raise ValueError(
                    f"min_tokens={self.min_tokens} cannot be reached: every allowed token is a stop "
                    "token. Allow others, or lower min_tokens."
                )

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
    def free_tokens(self) -> int:
        """How many tokens may follow one another in a text without ending it."""
        allowed = self.vocabulary if self.allowed is None else int(self.allowed.sum())
        stops = self.stop if self.allowed is None else self.stop[self.allowed[self.stop]]
        return allowed - len(stops)

    def support_size(self) -> float:
        """Number of texts of the support (an upper bound under a grammar); infinite for the stream."""
        if self.max_tokens is None:
            return float("inf")
        allowed = self.vocabulary if self.allowed is None else int(self.allowed.sum())
        stops, free = allowed - self.free_tokens, self.free_tokens
        ended = sum(float(free) ** (n - 1) * stops for n in range(max(self.min_tokens, 1), self.max_tokens + 1))
        return ended + float(free) ** self.max_tokens


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


def enumerate_texts(law: TextLaw, limit: int = 1_000_000) -> Tensor:
    """Every text of a small support, of shape ``(n, max_tokens)``.

    :raises ValueError: unbounded, or more than ``limit`` texts.
    """
    size = law.support_size()
    if law.max_tokens is None or size > limit:
        raise ValueError(
            f"the support holds {size:.3g} texts; at most {limit:,} can be enumerated. "
            "Lower max_tokens, restrict the vocabulary with allowed=, or use importance sampling."
        )
    device = law.stop.device
    tokens = torch.arange(law.vocabulary, device=device)
    if law.allowed is not None:
        tokens = tokens[law.allowed]
    stops = tokens[law.is_stop(tokens)]
    free = tokens[~law.is_stop(tokens)]
    open_texts = torch.empty(1, 0, dtype=torch.long, device=device)
    finished = []
    for n in range(1, law.max_tokens + 1):
        if n >= max(law.min_tokens, 1):
            finished.append(_extend(open_texts, stops, law.max_tokens))
        open_texts = _extend(open_texts, free, n)
    texts = torch.cat([*finished, open_texts])
    if law.grammar is not None:
        texts = texts[torch.from_numpy(law.grammar.reachable(unpad_rows(texts))).to(device)]
    return texts


def _extend(texts: Tensor, tokens: Tensor, width: int) -> Tensor:
    """Every text followed by every token, padded to ``width``."""
    rows = torch.cat([texts.repeat_interleave(len(tokens), 0), tokens.repeat(len(texts))[:, None]], -1)
    return torch.nn.functional.pad(rows, (0, width - rows.shape[-1]), value=PAD)
