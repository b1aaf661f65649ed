"""Which texts there are under stop tokens, lengths, a vocabulary and a grammar: checks, size, enumeration.

A text is tokens up to a stop token, which belongs to it, or ``max_tokens``. Of the vocabulary only counts and ids
matter here, and the state after each token: that of the automaton of stop strings, of which there is one where every
stop is a token by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from llmppl.text.padding import PAD
from llmppl.text.stop_automaton import END, StopAutomaton

LARGEST = 1_000_000
"""Most texts that are enumerated."""

GRAMMAR_ROWS = 128
"""Prefixes whose permitted tokens are looked at together."""


class Permitting(Protocol):
    """A grammar: which tokens may follow each prefix, ``(P, V)``."""

    def permitted(self, prefixes: Sequence[Sequence[int]]) -> np.ndarray: ...


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


class Limits(Protocol):
    """What a law of texts says of its tokens, of either backend."""

    @property
    def min_tokens(self) -> int: ...

    @property
    def allowed(self) -> Any: ...

    @property
    def grammar(self) -> Any: ...


def nan_mend(law: Limits) -> str:
    """What to check where the law of a next token is NaN: the network, or what is left for the text there."""
    return f"Check the model's weights and dtype: float16 overflows.{dead_end(law)}"


def dead_end(law: Limits | None) -> str:
    """A sentence, the space before it included, where a law may leave a text no token; nothing where it cannot.

    A grammar alone, and lengths, stops and a vocabulary without one, are refused where they permit no token; together
    they are not, for which texts come to such an end is known only once they are written.
    """
    if law is None or law.grammar is None:
        return ""
    others = {"min_tokens= (no stop before)": law.min_tokens > 1, "allowed=": law.allowed is not None}
    named = [name for name, has in others.items() if has]
    return f" Or grammar= and {' and '.join(named)} left no token to follow there: loosen one of them." if named else ""


def moves_of(vocabulary: int, stop: Sequence[int], automaton: StopAutomaton | None) -> np.ndarray:
    """The state after each token, ``(S, V)``, :data:`END` where it ends a text: one state without an automaton."""
    if automaton is not None:
        return automaton.moves
    moves = np.zeros((1, vocabulary), dtype=np.int16)
    moves[0, stop] = END
    return moves


def transitions(tokens: np.ndarray, moves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens lead from state to state, ``(S, S)``, and how many end a text, ``(S,)``.

    :param tokens: ids that may occur at all, ``(A,)``.
    :param moves: ``(S, V)``.
    """
    size = len(moves)
    after = moves[:, tokens]
    counts = np.stack([np.bincount(row[row != END], minlength=size) for row in after]).astype(float)
    return counts, (after == END).sum(1).astype(float)


def check_tokens(tokens: np.ndarray, moves: np.ndarray, stops: bool, min_tokens: int) -> None:
    """Refuse a vocabulary of which no text can be made.

    :param tokens: ids that ``allowed=`` permits, ``(A,)``.
    :param moves: ``(S, V)``.
    :param stops: whether the law has an end at all.
    :raises ValueError: naming the argument and the mend.
    """
    if not len(tokens):
        raise ValueError("allowed= permits no token at all. Allow at least one.")
    counts, closing = transitions(tokens, moves)
    state, reached = np.arange(len(moves)) == 0, np.arange(len(moves)) == 0
    for step in range(max(len(moves), min_tokens) - 1):
        state = state @ counts > 0
        if stops and step + 1 < min_tokens - 1 and bool((state & (counts.sum(1) == 0)).any()):
            raise ValueError(
                f"min_tokens={min_tokens} cannot be kept: after some {step + 1} tokens every allowed one completes a "
                "stop, and the text would be too short. Allow others, or lower min_tokens."
            )
        reached = reached | state
        if step + 1 == min_tokens - 1 and stops and not state.any():
            raise ValueError(
                f"min_tokens={min_tokens} cannot be reached: every allowed token is a stop "
                "token. Allow others, or lower min_tokens."
            )
    if stops and not closing[reached].any():
        raise ValueError(
            "allowed= excludes every stop token, so no text could end. "
            "Allow at least one stop token, or leave stop out."
        )


def support_size(tokens: np.ndarray, moves: np.ndarray, min_tokens: int, max_tokens: int | None) -> float:
    """Number of texts (an upper bound under a grammar); infinite for the stream.

    :param tokens: ids that may occur at all, ``(A,)``.
    :param moves: ``(S, V)``.
    """
    if max_tokens is None:
        return math.inf
    counts, closing = transitions(tokens, moves)
    begun, size = np.zeros(len(moves)), 0.0
    begun[0] = 1.0
    for n in range(1, max_tokens + 1):
        if n >= max(min_tokens, 1):
            size += float(begun @ closing)
        begun = begun @ counts
        if begun.sum() > 1e200:
            return math.inf
    return size + float(begun.sum())


def enumerate_rows(
    tokens: np.ndarray,
    moves: np.ndarray,
    min_tokens: int,
    max_tokens: int | None,
    grammar: Permitting | None,
    limit: int = LARGEST,
) -> np.ndarray:
    """Every text of a small support, ``(n, max_tokens)``.

    :param tokens: ids that may occur at all, ``(A,)``.
    :param moves: ``(S, V)``.
    :raises ValueError: unbounded, or more than ``limit`` texts.
    """
    size = math.inf if max_tokens is None else support_size(tokens, moves, min_tokens, max_tokens)
    if max_tokens is None or (size > limit and grammar is None):
        raise _too_many(f"{size:.3g}", limit)
    begun, state = np.empty((1, 0), dtype=np.int64), np.zeros(1, dtype=np.int64)
    finished: list[np.ndarray] = []
    for n in range(1, max_tokens + 1):
        row, token = _continuations(begun, tokens, grammar, limit)
        longer = np.concatenate([begun[row], token[:, None]], -1)
        state = moves[state[row], token]
        if n >= max(min_tokens, 1):
            ended = longer[state == END]
            finished.append(np.pad(ended, [(0, 0), (0, max_tokens - n)], constant_values=PAD))
        begun, state = longer[state != END], state[state != END]
        if sum(map(len, finished)) + len(begun) > limit:
            raise _too_many(f"more than {limit:,}", limit)
    return np.concatenate([*finished, begun])


def _continuations(
    begun: np.ndarray, tokens: np.ndarray, grammar: Permitting | None, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows go on with which tokens, row by row: two arrays of one length."""
    if grammar is None:
        return np.repeat(np.arange(len(begun)), len(tokens)), np.tile(tokens, len(begun))
    rows, found, count = [], [], 0
    for start in range(0, len(begun), GRAMMAR_ROWS):
        part = begun[start : start + GRAMMAR_ROWS].tolist()
        row, at = np.nonzero(grammar.permitted(part)[:, tokens])
        rows.append(row + start)
        found.append(tokens[at])
        count += len(row)
        if count > limit:
            raise _too_many(f"more than {limit:,}", limit)
    empty = np.empty(0, dtype=np.int64)
    return np.concatenate([empty, *rows]), np.concatenate([empty, *found])


def _too_many(size: str, limit: int) -> ValueError:
    return ValueError(
        f"the support holds {size} texts; at most {limit:,} can be enumerated. "
        "Lower max_tokens, restrict the vocabulary with allowed=, or use importance sampling."
    )


def shortest_row(tokens: np.ndarray, moves: np.ndarray, min_tokens: int, max_tokens: int | None) -> list[int]:
    """The tokens of one of the shortest texts.

    :param tokens: ids that may occur at all, ``(A,)``.
    :param moves: ``(S, V)``.
    """
    after = moves[:, tokens]
    begun: dict[int, list[int]] = {0: []}  # a text that is in each state
    for n in range(1, (max_tokens or 1) + 1):
        if n >= max(min_tokens, 1):
            for state, row in begun.items():
                if (after[state] == END).any():
                    return [*row, int(tokens[(after[state] == END).argmax()])]
        longer: dict[int, list[int]] = {}
        for state, row in begun.items():
            found, first = np.unique(after[state], return_index=True)
            for to, at in zip(found.tolist(), first.tolist(), strict=True):
                if to != END:
                    longer.setdefault(to, [*row, int(tokens[at])])
        begun = longer
    return next(iter(begun.values()))


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
