"""A language model's text, twisted towards a word that it shall have."""

from __future__ import annotations

from collections.abc import Sequence
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
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

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
        # One text may be scored for several words: the network reads it once.
        distinct, row = torch.unique(torch.cat([context, flat], -1), dim=0, return_inverse=True)
        contexts, texts = distinct.split([context.shape[-1], flat.shape[-1]], -1)
        reading = _Reading(self, self._strings(shape), row.tolist(), unpad_rows(texts), value.shape[-1])
        gradient = torch.is_grad_enabled() and any(p.requires_grad for p in self.twist.parameters())

        def finish(scores: Tensor) -> None:
            scores = scores.masked_fill(~self.support.check(texts)[:, None], -torch.inf)[row]
            with torch.set_grad_enabled(gradient):
                scores = scores + reading.correction()
            self.remember(value, scores.reshape(shape + value.shape[-1:]))

        return Pending(
            Request(self.law, unpad_rows(contexts), unpad_rows(texts), value.shape[-1], reading.read), finish
        )

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


class _Reading(_Classes):
    """The masses of all classes at every token of given texts, taken down as the network gives the laws.

    :param row: which of the distinct texts each row has.
    """

    def __init__(self, fn: TwistedText, words: list[str], row: list[int], texts: list[list[int]], width: int) -> None:
        super().__init__(fn, words)
        self.shape = (len(row), width)
        self._rows: dict[int, list[int]] = {}
        for n, of in enumerate(row):
            self._rows.setdefault(of, []).append(n)
        self.states = [self.tokens.states(w, BETWEEN, texts[of]) if w else [] for w, of in zip(words, row, strict=True)]
        self.texts = [texts[of] for of in row]
        self._at: list[tuple[int, int]] = []
        self._masses: list[Tensor] = []

    def read(self, log_probs: Tensor, rows: Sequence[int], columns: Sequence[int]) -> None:
        at, which = [], []
        for place, (of, column) in enumerate(zip(rows, columns, strict=True)):
            for n in self._rows[of]:
                if self.words[n]:
                    at.append((n, column))
                    which.append(place)
        if at:
            places = [(self.words[n], self.states[n][column]) for n, column in at]
            self._masses.append(self.masses(log_probs.detach(), which, places))
            self._at += at

    def correction(self) -> Tensor:
        """log q − log p of each token, ``(rows, width)``, nats."""
        twist = self.fn.twist
        weight = next(twist.parameters())
        table = torch.zeros(self.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        if not self._at:
            return table
        masses = torch.cat(self._masses)
        places = [(self.words[n], self.states[n][column]) for n, column in self._at]
        boosts = twist(self.features(masses, places, [column for _, column in self._at]))
        kinds = []
        for (n, column), place in zip(self._at, places, strict=True):
            ids, classes = self.of(*place)
            found = classes[ids == self.texts[n][column]]
            kinds.append(int(found[0]) if len(found) else OTHER)
        own = boosts.gather(-1, torch.tensor(kinds, device=boosts.device)[:, None])[:, 0]
        # A class of no mass adds nothing, whatever its boost; written without infinities, whose gradient is NaN.
        present = masses > -torch.inf
        alive = present & (boosts > -torch.inf)
        terms = torch.where(alive, masses.clamp(min=-700) + boosts.clamp(min=-700), -torch.inf)
        values = own - terms.logsumexp(-1).to(own.dtype)
        index = torch.tensor(self._at, device=table.device).T
        return table.index_put((index[0], index[1]), values.to(table.dtype))
