"""Where a text ends that shall end with given strings: a finite automaton over the tokens of a vocabulary.

A stop string may be written as one token, within one, or over several; tokens of byte-level vocabularies may hold half
a character. So the automaton reads bytes (Aho and Corasick (1975), `Efficient string matching: an aid to bibliographic
search`), a token at a time: its states are the beginnings of stop strings that the text may end with so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmppl.text.padding import PAD

END = -1
"""The state of a text that has ended."""

MOST_STATES = 256
"""A state takes two bytes for each token of the vocabulary."""


class StopAutomaton:
    """Which tokens end a text, after what stands so far.

    :param moves: the state after each token, ``(S, V)``; :data:`END` where the token ends the text. Texts begin in
        state 0.
    :param strings: that end a text, for a ``repr``.
    """

    def __init__(self, moves: np.ndarray, strings: Sequence[str] = ()) -> None:
        self.moves, self.strings = moves, tuple(strings)
        closing = moves == END
        self.everywhere: list[int] = np.flatnonzero(closing.all(0)).tolist()
        """Tokens that end a text whatever stands before them."""
        first = closing.argmax(1)
        own = np.where(closing.any(1), first, PAD)
        self.closers = np.full(len(moves), self.everywhere[0]) if self.everywhere else own
        """A token that ends a text in each state, ``(S,)``; ``PAD`` where none does."""

    @property
    def size(self) -> int:
        """Number of states; one where every stop is a token by itself."""
        return len(self.moves)

    def with_tokens(self, ids: Sequence[int]) -> StopAutomaton:
        """The same, where these tokens end a text, too."""
        moves = self.moves.copy()
        moves[:, list(ids)] = END
        return StopAutomaton(moves, self.strings)

    def walk(self, tokens: Sequence[int]) -> int:
        """The state after some tokens."""
        state = 0
        for token in tokens:
            if state != END and token != PAD:
                state = int(self.moves[state, token])
        return state

    def ended(self, texts: np.ndarray) -> np.ndarray:
        """Which tokens of texts ``(..., T)`` stand at the end or behind it; padding does not."""
        table = np.concatenate([self.moves, np.full_like(self.moves[:1], END)])
        state, found = np.zeros(texts.shape[:-1], dtype=np.int64), np.zeros(texts.shape, dtype=bool)
        for place in range(texts.shape[-1]):
            token = texts[..., place]
            known = (token >= 0) & (token < table.shape[1])
            state = np.where(known, table[state, np.where(known, token, 0)], state)
            found[..., place] = (state == END) & known
        return found

    def __repr__(self) -> str:
        return f"StopAutomaton({', '.join(map(repr, self.strings))}; {self.size} states)"


def build(strings: Sequence[str], tokens: Sequence[bytes]) -> StopAutomaton:
    """The automaton of several stop strings.

    :param tokens: the bytes of each token.
    :raises ValueError: an empty string, strings of too many characters, or a string that no text of these tokens holds.
    """
    patterns = [string.encode() for string in strings]
    if not all(patterns):
        raise ValueError("stop= holds an empty string. Pass what a text shall end with, or leave it out.")
    goto, ends = _trie(patterns)
    if len(goto) > MOST_STATES:
        raise ValueError(
            f"stop= holds {len(goto)} beginnings of stop strings, and at most {MOST_STATES} are kept. End texts with "
            "shorter strings."
        )
    steps = _steps(goto, ends)
    moves = np.repeat(np.arange(len(steps), dtype=np.int16)[:, None], len(tokens), 1)
    longest = max(map(len, tokens), default=0)
    padded = np.zeros((len(tokens), longest), dtype=np.uint8)
    for n, token in enumerate(tokens):
        padded[n, : len(token)] = list(token)
    sizes = np.array([len(token) for token in tokens])
    table = np.concatenate([steps, np.full((1, 256), END, dtype=steps.dtype)])  # what has ended stays so
    for place in range(longest):
        still = np.flatnonzero(sizes > place)
        moves[:, still] = table[moves[:, still], padded[still, place]]
    _check_reached(moves, strings, patterns, tokens)
    return _without_unreached(moves, strings)


def _trie(patterns: Sequence[bytes]) -> tuple[list[dict[int, int]], set[int]]:
    """The beginnings of patterns as nodes, with their children; and the nodes that are whole patterns."""
    goto: list[dict[int, int]] = [{}]
    ends = set()
    for pattern in patterns:
        node = 0
        for sign in pattern:
            if sign not in goto[node]:
                goto[node][sign] = len(goto)
                goto.append({})
            node = goto[node][sign]
        ends.add(node)
    return goto, ends


def _steps(goto: list[dict[int, int]], ends: set[int]) -> np.ndarray:
    """The node after each byte, ``(nodes, 256)``: the longest beginning of a pattern that what stands ends with."""
    steps = np.zeros((len(goto), 256), dtype=np.int16)
    fallback, waiting = [0] * len(goto), [0]
    ended = set(ends)
    for node in waiting:  # grows: breadth first
        below = steps[fallback[node]] if node else np.zeros(256, dtype=np.int16)
        steps[node] = below
        for sign, child in goto[node].items():
            fallback[child] = int(below[sign]) if node else 0
            if fallback[child] in ended or fallback[child] == END:
                ended.add(child)
            steps[node, sign] = child
            waiting.append(child)
    # Only now: a node that ends is needed above, to find what its children fall back to.
    steps[np.isin(steps, list(ended))] = END
    return steps


def _check_reached(
    moves: np.ndarray, strings: Sequence[str], patterns: Sequence[bytes], tokens: Sequence[bytes]
) -> None:
    if len(strings) > 1:
        for string in strings:
            build([string], tokens)
        return
    reached, waiting = {0}, [0]
    for state in waiting:
        for after in np.unique(moves[state]).tolist():
            if after not in reached:
                reached.add(after)
                waiting.append(after)
                if after == END:
                    return
    raise ValueError(
        f"stop={strings[0]!r} matches no text of this tokenizer. Pass stop token ids, or a string that some tokens "
        "write, e.g. stop='.'"
    )


def _without_unreached(moves: np.ndarray, strings: Sequence[str]) -> StopAutomaton:
    """States that no text comes to are left out: where stop strings are tokens, one remains."""
    reached = [0]
    for state in reached:
        reached += [after for after in np.unique(moves[state]).tolist() if after != END and after not in reached]
    number = np.full(len(moves) + 1, END, dtype=np.int16)
    number[reached] = np.arange(len(reached))
    return StopAutomaton(number[moves[reached]], strings)
