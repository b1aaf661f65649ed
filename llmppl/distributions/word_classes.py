"""What tokens do for a word that a text shall have, and how probable a language model finds each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llmppl.distributions.conditioned_text import LanguageModel
from llmppl.network.text_law import TextLaw
from llmppl.text import PAD
from llmppl.text.word_automaton import BETWEEN, HAS, OTHER, WordTokens

ENDS, DEAD = 4, 5
"""Beside the classes of :mod:`llmppl.text.word_automaton`: tokens that end a text that has the word, and those that
end one that has not. No text of the posterior has one of the latter, and the twist forbids them."""

NUM_CLASSES = 6
BOOSTED = 4
"""Classes with a learned boost: all but ``OTHER``, whose boost is zero, and ``DEAD``."""

NUM_FEATURES = 15

Key = tuple[Any, tuple[int, ...], tuple[int, ...], str]
"""A law, a context, a text and a word."""

LEAST = -16.0
"""Stands for the log-probability of a class without tokens, nats."""


class WordModel(LanguageModel, Protocol):
    """A language model that knows its tokens as parts of words."""

    @property
    def word_tokens(self) -> WordTokens: ...


class WordClasses:
    """The classes of tokens behind each place of each row, and the features that the twist reads."""

    def __init__(self, lm: WordModel, law: TextLaw, words: list[str]) -> None:
        if law.automaton is not None:
            raise ValueError(
                f"{law.described_stop()}: a twisted law ends with single tokens, and several write this. Stop at token "
                "ids, or at a string that tokens hold whole, e.g. stop='.'"
            )
        self.law, self.words = law, words
        self.tokens: WordTokens = lm.word_tokens
        self.stop = law.stop.cpu().numpy()
        self._stops = set(self.stop.tolist())
        self._known: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        self._lengths = {word: len(lm.encode(" " + word)) if word else 0 for word in set(words)}

    def of(self, word: str, state: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that are not ``OTHER``, and the class of each."""
        if (word, state) not in self._known:
            if state == HAS:
                found = self.stop, np.full(len(self.stop), ENDS)
            else:
                ids, kinds = self.tokens.classes(word, state)
                completing = set(ids[kinds == 3].tolist())
                dead = np.array([n for n in self.stop if n not in completing], dtype=np.int64)
                # A stop token that only begins or writes the word ends the text without it.
                alive = ~np.isin(ids, dead)
                found = np.concatenate([ids[alive], dead]), np.concatenate([kinds[alive], np.full(len(dead), DEAD)])
            self._known[word, state] = found
        return self._known[word, state]

    def masses(self, log_probs: Tensor, rows: Sequence[int], places: Sequence[tuple[str, int]]) -> Tensor:
        """Log-probability of every class, ``(n, 6)``.

        :param log_probs: ``(P, V)``.
        :param rows: which of them each place reads.
        :param places: word and state of each.
        """
        parts = [self.of(*place) for place in places]
        index = np.repeat(np.arange(len(parts)), [len(ids) for ids, _ in parts])
        ids = torch.from_numpy(np.concatenate([ids for ids, _ in parts])).to(log_probs.device)
        kinds = torch.from_numpy(np.concatenate([kinds for _, kinds in parts])).to(log_probs.device)
        place = torch.from_numpy(index).to(log_probs.device)
        row = torch.tensor(rows, device=log_probs.device)[place]
        mass = torch.zeros(len(parts), NUM_CLASSES, dtype=torch.float64, device=log_probs.device)
        mass.view(-1).index_add_(0, place * NUM_CLASSES + kinds, log_probs[row, ids].double().exp())
        mass[:, OTHER] = (1 - mass.sum(-1)).clamp(min=0)
        return mass.log()

    def features(self, masses: Tensor, places: Sequence[tuple[str, int]], steps: Sequence[int]) -> Tensor:
        """What the twist reads, ``(n, 15)``."""
        longest = self.law.max_tokens or 0
        own = []
        for (word, state), step in zip(places, steps, strict=True):
            size, left = len(word) or 1, longest - step
            written = state / size if state > 0 else 0.0
            own.append(
                [
                    step / 20,
                    left / 20,
                    float(left <= 2),
                    float(left <= 5),
                    float(state == BETWEEN),
                    float(0 < state < size),
                    float(state == size),
                    float(state == HAS),
                    written,
                    self._lengths[word] / 3,
                ]
            )
        table = torch.tensor(own, dtype=masses.dtype, device=masses.device)
        return torch.cat([table, masses[:, 1:].clamp(min=LEAST) / 5], -1)


class WordWalk(WordClasses):
    """The twisted law of the next token while texts are drawn."""

    def __init__(self, lm: WordModel, law: TextLaw, words: list[str], twist: Callable[[Tensor], Tensor]) -> None:
        super().__init__(lm, law, words)
        self.twist = twist

    def __call__(self, log_probs: Tensor, rows: list[int], texts: Tensor) -> Tensor:
        places, steps = [], []
        for row, tokens in zip(rows, texts.tolist(), strict=True):
            word = self.words[row]
            known = [token for token in tokens if token != PAD]
            places.append((word, self.tokens.states(word, BETWEEN, known)[-1] if word else HAS))
            steps.append(len(known))
        masses = self.masses(log_probs, range(len(rows)), places)
        boosts = self.twist(self.features(masses, places, steps))
        told = torch.tensor([bool(word) for word, _ in places], device=boosts.device)
        boosts = torch.where(told[:, None], boosts, 0.0)
        twisted = log_probs.clone()
        for n, place in enumerate(places):
            if place[0]:
                ids, kinds = (torch.from_numpy(part).to(twisted.device) for part in self.of(*place))
                twisted[n, ids] += boosts[n, kinds].to(twisted.dtype)
        return twisted.log_softmax(-1)


@dataclass(frozen=True)
class Record:
    """What the network says of one text and one word: all that the twist needs.

    :param base: log-probability of each token, ``(T,)``, nats.
    :param masses: log-probability of every class at each token, ``(T, 6)``; without rows where there is no word.
    :param features: ``(T, 15)``, likewise.
    :param kinds: the class of each token, ``(T,)``, likewise.
    """

    base: Tensor
    masses: Tensor
    features: Tensor
    kinds: Tensor


class WordReading(WordClasses):
    """The masses of all classes at every token of given texts, taken down as the network gives the laws.

    :param keys: law, context, text and word of each row.
    :param number: of the distinct contexts and texts.
    """

    def __init__(self, lm: WordModel, law: TextLaw, keys: Sequence[Key], number: Mapping[tuple[Any, Any], int]) -> None:
        super().__init__(lm, law, [key[3] for key in keys])
        self.texts = [key[2] for key in keys]
        self._of = [number[key[1:3]] for key in keys]
        self._rows: dict[int, list[int]] = {}
        for n, of in enumerate(self._of):
            self._rows.setdefault(of, []).append(n)
        self.places = [
            [(word, state) for state in self.tokens.states(word, BETWEEN, text)[:-1]] if word else []
            for word, text in zip(self.words, self.texts, strict=True)
        ]
        self._masses: dict[tuple[int, int], Tensor] = {}

    def take(self, log_probs: Tensor, rows: Sequence[int], columns: Sequence[int]) -> None:
        at = [
            (n, column, place)
            for place, (of, column) in enumerate(zip(rows, columns, strict=True))
            for n in self._rows[of]
            if self.words[n]
        ]
        if at:
            places = [self.places[n][column] for n, column, _ in at]
            masses = self.masses(log_probs.detach(), [place for _, _, place in at], places)
            self._masses.update({(n, column): row for (n, column, _), row in zip(at, masses, strict=True)})

    def records(self, scores: Tensor) -> list[Record]:
        """One for each row, from the log-probabilities ``(distinct, width)`` of the tokens."""
        return [self._record(n, scores[of].detach()) for n, of in enumerate(self._of)]

    def _record(self, n: int, base: Tensor) -> Record:
        text, places = self.texts[n], self.places[n]
        if not places:
            nothing = base.new_empty(0, NUM_CLASSES)
            return Record(base[: len(text)], nothing, base.new_empty(0, NUM_FEATURES), torch.empty(0, dtype=torch.long))
        masses = torch.stack([self._masses[n, t] for t in range(len(text))])
        features = self.features(masses, places, range(len(text)))
        kinds = []
        for token, place in zip(text, places, strict=True):
            ids, classes = self.of(*place)
            found = classes[ids == token]
            kinds.append(int(found[0]) if len(found) else OTHER)
        own = torch.tensor(kinds, device=base.device)
        return Record(base[: len(text)], masses.to(base.dtype), features.to(base.dtype), own)


def corrected(twist: Callable[[Tensor], Tensor], records: Sequence[Record], width: int) -> Tensor:
    """Log-probability of each token under the twisted law, ``(N, width)``, nats, zero behind the end."""
    base = torch.zeros(len(records), width, dtype=records[0].base.dtype, device=records[0].base.device)
    for n, record in enumerate(records):
        base[n, : len(record.base)] = record.base
    index = [(n, t) for n, record in enumerate(records) for t in range(len(record.kinds))]
    if not index:
        return base
    masses, features, kinds = (
        torch.cat([getattr(record, name) for record in records]) for name in ("masses", "features", "kinds")
    )
    boosts = twist(features)
    own = boosts.gather(-1, kinds[:, None])[:, 0]
    # A class of no mass adds nothing, whatever its boost; written without infinities, whose gradient is NaN.
    alive = (masses > -torch.inf) & (boosts > -torch.inf)
    terms = torch.where(alive, masses.clamp(min=-700) + boosts.clamp(min=-700), -torch.inf)
    row, column = torch.tensor(index, device=base.device).T
    return base.index_put((row, column), (own - terms.logsumexp(-1)).to(base.dtype), accumulate=True)
