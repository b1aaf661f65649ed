"""A language model's text, twisted towards a word that it shall have."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.distributions.conditioned_text import LanguageModel, Pending
from llmppl.network.drawing import NotFiniteError, draw
from llmppl.network.scoring import Request
from llmppl.network.text_law import TextLaw
from llmppl.network.text_tensors import check_text, unpad_rows
from llmppl.text import PAD
from llmppl.text.word_automaton import BETWEEN, HAS, OTHER, WordTokens

ENDS, DEAD = 4, 5
"""Beside the classes of :mod:`llmppl.text.word_automaton`: tokens that end a text that has the word, and those that
end one that has not. No text of the posterior has one of the latter, and the twist forbids them."""

NUM_CLASSES = 6
BOOSTED = 4
"""Classes with a learned boost: all but ``OTHER``, whose boost is zero, and ``DEAD``."""

NUM_FEATURES = 15
MOST_READ = 50_000
"""Texts with their words whose reading is kept, at most: about 2 kB each."""

Key = tuple[Any, tuple[int, ...], tuple[int, ...], str]
"""A law, a context, a text and a word."""

LEAST = -16.0
"""Stands for the log-probability of a class without tokens, nats."""


class WordModel(LanguageModel, Protocol):
    """A language model that knows its tokens as parts of words."""

    @property
    def word_tokens(self) -> WordTokens: ...


class WordTwist(nn.Module):
    r"""Learned boosts of the tokens that lead to a word, :math:`b_c(t, s, \text{masses})`, nats.

    A network of two small hidden layers. It sees where the text stands (its length, what is left of ``max_tokens``, the
    state of the automaton), how long the word is, and the log-probability that the language model itself gives to each
    class of tokens. It starts at zero: the language model's own law without texts that end too early.

    :param hidden: width of the hidden layers.
    """

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = hidden
        self.layers = nn.Sequential(
            nn.Linear(NUM_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, BOOSTED)
        )
        self.read: OrderedDict[Key, Record] = OrderedDict()
        """What the network has said of texts; of simulated sets that are read again nothing is asked twice."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "read": OrderedDict()}

    def forward(self, features: Tensor) -> Tensor:
        """Boosts ``(..., 6)`` of all classes, from features ``(..., 15)``."""
        boosts = self.layers(features.to(self.layers[0].weight.dtype))  # type: ignore[arg-type]
        rest = torch.zeros_like(boosts[..., :1])
        return torch.cat([rest, boosts, rest - torch.inf], -1)

    def version(self) -> int:
        """A number that grows whenever a parameter changes in place."""
        return sum(p._version for p in self.parameters())


class TwistedText(AutoregressiveText):
    r"""The law of :class:`AutoregressiveText`, token by token multiplied by a learned twist [1, 2, 3] and normalised.

    .. math:: q(z) = \prod_t \frac{p(z_t \mid z_{<t})\, e^{b(c(z_t))}}{\sum_v p(v \mid z_{<t})\, e^{b(c(v))}}

    where :math:`c(v)` is what token ``v`` does for the word that the text shall have: begin or continue it, write its
    last letter, complete it, end the text, or none of these; and :math:`b` a :class:`WordTwist`. The network is the
    language model itself, read once; the twist costs next to nothing. Under an adapter it is the adapted law that is
    twisted.

    It sums to one over the texts of the law but those that end without the word. A row whose word is empty is not
    twisted.

    :param words: the words, as token ids, ``batch_shape + (W,)``.
    :param twist: the boosts.

    Other parameters as of :class:`AutoregressiveText`.

    References

    [1] Zhao, Brekelmans, Makhzani, Grosse (2024), `Probabilistic inference in language models via twisted sequential
    Monte Carlo`.
    [2] Yang, Klein (2021), `FUDGE: controlled text generation with future discriminators`.
    [3] Zhang, Kung, Yoshida, Van den Broeck, Peng (2024), `Adaptable logical control for large language models`.
    """

    has_enumerate_support = True

    def __init__(
        self,
        lm: WordModel,
        context: Tensor,
        law: TextLaw,
        words: Tensor,
        twist: WordTwist,
        adapter: str | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.words, self.twist = words, twist
        shape = torch.broadcast_shapes(context.shape[:-1], words.shape[:-1])
        super().__init__(lm, context.expand(shape + context.shape[-1:]), law, adapter, validate_args)

    def with_context(self, context: Tensor, adapter: str | None) -> TwistedText:
        """The same law and words after another context, under another adapter."""
        lm: Any = self.lm
        return TwistedText(lm, context, self.law, self.words, self.twist, adapter, self._validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> TwistedText:
        shape, lm = torch.Size(batch_shape), self.lm
        known: Any = lm
        words = self.words.expand(shape + self.words.shape[-1:])
        context = self.context.expand(shape + self.context.shape[-1:])
        expanded = TwistedText(known, context, self.law, words, self.twist, self.adapter, self._validate_args)
        expanded._memo, expanded.site = self._memo, self.site
        return expanded

    @property
    def _wants_gradient(self) -> bool:
        twisted = torch.is_grad_enabled() and any(p.requires_grad for p in self.twist.parameters())
        return twisted or super()._wants_gradient

    def _version(self) -> int:
        return self.lm.version(self.adapter) + self.twist.version()

    @torch.no_grad()
    def sample_with_log_prob(
        self, sample_shape: Any = torch.Size(), temperature: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw texts, and the log-probabilities recorded while drawing, ``sample_shape + batch_shape``, in nats."""
        shape = torch.Size(sample_shape) + self.batch_shape
        context = self.context.expand(shape + self.context.shape[-1:])
        rows = unpad_rows(context.reshape(-1, context.shape[-1]))
        walk = _Walk(self, self._strings(shape))
        heat = None if temperature is None else temperature.to(context.device).expand(shape).reshape(-1)
        try:
            with self.lm.drawing(self.adapter, None) as transformer:
                tokens, token_log_probs = draw(transformer, self.law, rows, heat, walk)
        except NotFiniteError as error:
            raise ValueError(f"site {self.site!r}: {error}" if self.site else str(error)) from None
        tokens = tokens.reshape(shape + self.event_shape)
        token_log_probs = token_log_probs.reshape(tokens.shape)
        self.remember(tokens, token_log_probs)
        return tokens, token_log_probs.sum(-1)

    def pending(self, value: Tensor) -> Pending | None:
        value = check_text(value, "value", self.law.vocabulary)
        flat, context, shape = self._broadcast(value)
        if self._memo.holds(value, shape, self._version(), self._wants_gradient):
            return None
        if self._validate_args:
            self._validate_text(value)
        texts, contexts, words = unpad_rows(flat), unpad_rows(context), self._strings(shape)
        law = (self.law.max_tokens, self.law.min_tokens, self.law.temperature, id(self.law.grammar))
        keys = [(law, tuple(c), tuple(t), w) for c, t, w in zip(contexts, texts, words, strict=True)]
        # The network is frozen unless an adapter is on, and what it says of a text then stays.
        known = self.twist.read if self.adapter is None else {}
        missing = list(dict.fromkeys(key for key in keys if key not in known))
        gradient = torch.is_grad_enabled() and any(p.requires_grad for p in self.twist.parameters())

        def finish() -> None:
            with torch.set_grad_enabled(gradient):
                scores = _corrected(self.twist, [known[key] for key in keys], value.shape[-1])
            scores = scores.masked_fill(~self.support.check(flat)[:, None], -torch.inf)
            self.remember(value, scores.reshape(shape + value.shape[-1:]))

        if not missing:
            finish()
            return None
        # One text may be scored for several words: the network reads it once.
        distinct = list(dict.fromkeys(key[1:3] for key in missing))
        reading = _Reading(self, missing, {pair: n for n, pair in enumerate(distinct)})

        def take(scores: Tensor) -> None:
            known.update(zip(missing, reading.records(scores), strict=True))
            finish()
            while len(self.twist.read) > MOST_READ:
                self.twist.read.popitem(last=False)

        request = Request(
            self.law, [list(c) for c, _ in distinct], [list(t) for _, t in distinct], value.shape[-1], reading.take
        )
        return Pending(request, take)

    def remember(self, value: Tensor, scores: Tensor) -> None:
        super().remember(value, scores)
        self._memo.version = self._version()

    def _strings(self, shape: torch.Size) -> list[str]:
        """The word of each row of a batch."""
        words = self.words.expand(shape + self.words.shape[-1:]).reshape(-1, self.words.shape[-1])
        known: dict[tuple[int, ...], str] = {}
        found = []
        for ids in unpad_rows(words):
            if tuple(ids) not in known:
                known[tuple(ids)] = self.lm.decode(torch.tensor(ids)).strip().lower() if ids else ""
            found.append(known[tuple(ids)])
        return found

    def __repr__(self) -> str:
        return super().__repr__().replace("AutoregressiveText", "TwistedText", 1)


class _Classes:
    """The classes of tokens behind each place of each row, and the features that the twist reads."""

    def __init__(self, fn: TwistedText, words: list[str]) -> None:
        lm: Any = fn.lm
        self.fn, self.words = fn, words
        self.tokens: WordTokens = lm.word_tokens
        self.stop = fn.law.stop.cpu().numpy()
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
        longest = self.fn.law.max_tokens or 0
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


class _Walk(_Classes):
    """The twisted law of the next token while texts are drawn."""

    def __call__(self, log_probs: Tensor, rows: list[int], texts: Tensor) -> Tensor:
        places = []
        for row, tokens in zip(rows, texts.tolist(), strict=True):
            word = self.words[row]
            known = [token for token in tokens if token != PAD]
            places.append((word, self.tokens.states(word, BETWEEN, known)[-1] if word else HAS))
        masses = self.masses(log_probs, range(len(rows)), places)
        boosts = self.fn.twist(self.features(masses, places, [texts.shape[-1]] * len(rows)))
        boosts = torch.where(torch.tensor([bool(word) for word, _ in places])[:, None], boosts, 0.0)
        twisted = log_probs.clone()
        for n, place in enumerate(places):
            if place[0]:
                ids, kinds = (torch.from_numpy(part) for part in self.of(*place))
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


class _Reading(_Classes):
    """The masses of all classes at every token of given texts, taken down as the network gives the laws.

    :param keys: law, context, text and word of each row.
    :param number: of the distinct contexts and texts.
    """

    def __init__(self, fn: TwistedText, keys: Sequence[Key], number: Mapping[tuple[Any, Any], int]) -> None:
        super().__init__(fn, [key[3] for key in keys])
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


def _corrected(twist: WordTwist, records: Sequence[Record], width: int) -> Tensor:
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
