"""Whether a text that is being written has a word already, is writing it, or can still come to it.

A finite automaton over characters, read through the tokens of a vocabulary: which tokens, after what stands so far,
begin the word, go on with it, complete it. The states are

- :data:`BETWEEN`: the last character is no letter; the word may begin;
- :data:`INSIDE`: within another word;
- ``1`` to ``len(word)``: so many letters of the word stand since the last that was none;
- :data:`HAS`: the word occurs as a word, whatever follows.
"""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from llmppl.text.words import LETTERS

BETWEEN, INSIDE, HAS = 0, -1, -2

CLASSES = ("other", "begins", "written", "completes")
"""Of the tokens that may come next: those that lead away from the word, into it, to its last letter, and past it."""
OTHER, BEGINS, WRITTEN, COMPLETES = range(4)

_ONLY_LETTERS = re.compile(rf"[{LETTERS}]+")
_LEAD, _TAIL = re.compile(rf"^[{LETTERS}]*"), re.compile(rf"[{LETTERS}]*\Z")

# The lower case of other characters can hold letters, which a reader of the text does not see: "İ" has an "i", the
# Kelvin sign is a "k".
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


class WordTokens:
    """The tokens of a vocabulary by the letters that they begin and end with.

    :param texts: of each token.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [text.translate(_LOWER) for text in texts]
        self._letters: dict[str, list[int]] = defaultdict(list)  # tokens of letters only
        self._lead: dict[str, list[int]] = defaultdict(list)  # of the others, the letters at their beginning
        self._tail: dict[str, list[int]] = defaultdict(list)  # and at their end
        for n, text in enumerate(self.texts):
            if _ONLY_LETTERS.fullmatch(text):
                self._letters[text].append(n)
            elif text:
                self._lead[_LEAD.search(text).group()].append(n)  # type: ignore[union-attr]
                self._tail[_TAIL.search(text).group()].append(n)  # type: ignore[union-attr]
        self.classes = lru_cache(maxsize=65536)(self._classes)
        self._moves = lru_cache(maxsize=65536)(self._all_moves)

    def step(self, word: str, state: int, token: int) -> int:
        """The state after one more token."""
        if state == HAS:
            return HAS
        moves = self._moves(word, state)
        if token in moves:
            return moves[token]
        text = self.texts[token]
        if not text:
            return state
        return INSIDE if _ONLY_LETTERS.fullmatch(text[-1]) else BETWEEN

    def states(self, word: str, state: int, tokens: Sequence[int]) -> list[int]:
        """The state before each token, and after the last one."""
        found = [state]
        for token in tokens:
            found.append(self.step(word, found[-1], token))
        return found

    def _all_moves(self, word: str, state: int) -> dict[int, int]:
        """The tokens that lead into the word or past it, with the states that they lead to."""
        size, moves = len(word), dict[int, int]()
        for end in range(1, size + 1):
            for token in self._tail.get(word[:end], ()):
                moves[token] = end
        for token in self._inner(word):
            moves[token] = HAS
        stands = 0 if state == BETWEEN else state
        if stands >= 0:
            for end in range(stands + 1, size + 1):
                for token in self._letters.get(word[stands:end], ()):
                    moves[token] = end
            for token in self._lead.get(word[stands:], ()):
                if stands or word[stands:]:
                    moves[token] = HAS
        return moves

    def _inner(self, word: str) -> list[int]:
        """Tokens that hold the whole word, with something that is no letter on either side."""
        return self._holding().get(word, [])

    def _holding(self) -> dict[str, list[int]]:
        if not hasattr(self, "_held"):
            held: dict[str, list[int]] = defaultdict(list)
            inner = re.compile(rf"(?<=[^{LETTERS}])[{LETTERS}]+(?=[^{LETTERS}])")
            for n, text in enumerate(self.texts):
                for found in inner.findall(text):
                    held[found].append(n)
            self._held = held
        return self._held

    def _classes(self, word: str, state: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that are not ``OTHER`` after a state, and the class of each."""
        if state == HAS:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        moves = self._moves(word, state)
        kinds = [COMPLETES if to == HAS else WRITTEN if to == len(word) else BEGINS for to in moves.values()]
        return np.array(list(moves), dtype=np.int64), np.array(kinds, dtype=np.int64)
