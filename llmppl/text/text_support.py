"""Which texts there are under stop tokens, lengths, a vocabulary and a grammar: checks, size, enumeration.

A text is tokens up to a stop token, which belongs to it, or ``max_tokens``. Of the vocabulary only counts and ids
matter here: *free* tokens may stand anywhere before the end, *closing* ones end a text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from llmppl.text.padding import PAD

LARGEST = 1_000_000
"""Most texts that are enumerated."""


class Reaching(Protocol):
    """A grammar: which texts it permits."""

    def reachable(self, texts: Sequence[Sequence[int]]) -> np.ndarray: ...


def check_lengths(max_tokens: Any, min_tokens: Any, ends: bool, hint: str = "") -> None:
    """Refuse lengths that no text has.

    :param ends: whether something can end a text early: stop tokens or a grammar.
    :param hint: behind the sentence about a number that is none.
    :raises TypeError, ValueError: naming the argument and the mend.
    """
    for name, count in (("max_tokens", max_tokens), ("min_tokens", min_tokens)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
            raise TypeError(f"{name} must be a whole number of tokens, got {count!r}.{hint}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}. Leave it out for the unbounded stream.")
    if min_tokens < 0:
        raise ValueError(f"min_tokens must not be negative, got {min_tokens}.")
    if max_tokens is not None and max_tokens < min_tokens:
        raise ValueError(
            f"max_tokens={max_tokens} is less than min_tokens={min_tokens}. Raise max_tokens or lower min_tokens."
        )
    if max_tokens is None and (ends or min_tokens):
        raise ValueError(
            "stop, min_tokens and grammar need max_tokens: without it the distribution is the "
            "unbounded stream, which never ends. Pass max_tokens, or leave the others out."
        )


def check_temperature(temperature: Any, valid: bool) -> None:
    """Refuse a temperature that is not positive and finite.

    :raises ValueError: with the value.
    """
    if not valid:
        raise ValueError(
            f"temperature must be positive and finite, got {temperature}. "
            "The most probable text is a matter of decoding, not of a distribution."
        )


def check_tokens(free: int, closing: int, stops: bool, min_tokens: int) -> None:
    """Refuse a vocabulary of which no text can be made.

    :param free, closing: how many tokens there are of either kind, ``allowed=`` counted.
    :param stops: whether the law has stop tokens at all.
    :raises ValueError: naming the argument and the mend.
    """
    if not free + closing:
        raise ValueError("allowed= permits no token at all. Allow at least one.")
    if stops and not closing:
        raise ValueError(
            "allowed= excludes every stop token, so no text could end. "
            "Allow at least one stop token, or leave stop out."
        )
    if min_tokens > 1 and stops and not free:
        raise ValueError(
            f"min_tokens={min_tokens} cannot be reached: every allowed token is a stop "
            "token. Allow others, or lower min_tokens."
        )


def support_size(free: int, closing: int, min_tokens: int, max_tokens: int | None) -> float:
    """Number of texts (an upper bound under a grammar); infinite for the stream."""
    if max_tokens is None:
        return math.inf
    ended = sum(float(free) ** (n - 1) * closing for n in range(max(min_tokens, 1), max_tokens + 1))
    return ended + float(free) ** max_tokens


def enumerate_rows(
    free: np.ndarray,
    closing: np.ndarray,
    min_tokens: int,
    max_tokens: int | None,
    grammar: Reaching | None,
    limit: int = LARGEST,
) -> np.ndarray:
    """Every text of a small support, ``(n, max_tokens)``.

    :param free, closing: ids, ``(F,)`` and ``(C,)``.
    :raises ValueError: unbounded, or more than ``limit`` texts.
    """
    size = support_size(len(free), len(closing), min_tokens, max_tokens)
    if max_tokens is None or size > limit:
        raise ValueError(
            f"the support holds {size:.3g} texts; at most {limit:,} can be enumerated. "
            "Lower max_tokens, restrict the vocabulary with allowed=, or use importance sampling."
        )
    open_texts = np.empty((1, 0), dtype=np.int64)
    finished = []
    for n in range(1, max_tokens + 1):
        if n >= max(min_tokens, 1):
            finished.append(_extend(open_texts, closing, max_tokens))
        open_texts = _extend(open_texts, free, n)
    texts = np.concatenate([*finished, open_texts])
    if grammar is None:
        return texts
    return texts[grammar.reachable([[int(token) for token in row if token != PAD] for row in texts])]


def shortest_row(free: np.ndarray, closing: np.ndarray, min_tokens: int, max_tokens: int | None) -> list[int]:
    """The tokens of one of the shortest texts."""
    count = max(min_tokens, 1) if len(closing) else max_tokens or 1
    before = [int(token) for token in free[:1]] or [int(token) for token in closing[:1]]
    row = before * count
    return [*row[:-1], int(closing[0])] if len(closing) else row


def _extend(texts: np.ndarray, tokens: np.ndarray, width: int) -> np.ndarray:
    """Every text followed by every token, padded to ``width``."""
    rows = np.concatenate([np.repeat(texts, len(tokens), 0), np.tile(tokens, len(texts))[:, None]], -1)
    return np.pad(rows, [(0, 0), (0, width - rows.shape[-1])], constant_values=PAD)


def why_outside(
    count: int,
    min_tokens: int,
    max_tokens: int | None,
    holds_excluded: bool,
    stops_early: bool,
) -> str:
    """Why a text is outside the support.

    :param count: its tokens.
    :param holds_excluded: whether ``allowed=`` excludes one of them.
    :param stops_early: whether a stop token stands before its end.
    """
    if count == 0:
        return "it is empty; a text has at least one token"
    if max_tokens is not None and count > max_tokens:
        return f"it has {count} tokens, more than max_tokens={max_tokens}"
    if count < min_tokens:
        return f"it has {count} tokens, fewer than min_tokens={min_tokens}"
    if holds_excluded:
        return "it holds tokens that allowed= excludes"
    if stops_early:
        return "a stop token stands before its end"
    return f"it neither ends with a stop token nor has max_tokens={max_tokens} tokens"
