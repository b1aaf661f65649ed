"""A twist by what a text does in a world: numbers that a function makes of every text that may come next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmppl.distributions.conditioned_text import LanguageModel
from llmppl.distributions.twisted_text import Twist
from llmppl.distributions.word_classes import Key
from llmppl.network.text_law import TextLaw
from llmppl.text import PAD

Features = Callable[[str, str], Sequence[float]]
"""From what a row is told, and a text so far, to a few numbers of one length."""

Start = tuple[Sequence[float], Sequence[float]]
"""What features count at first: of texts that go on, and of texts that end."""

Found = tuple[Tensor, Tensor, Tensor]
"""The tokens that may come next, their log-probabilities by the language model, and what the twist sees of them."""

LARGE = 3.0
"""What the hidden layer sees numbers as, at most."""

MOST_TOKENS = 256
"""Tokens that may come next, at most: each asks the function once."""

MOST_KEPT = 200_000
"""Values of the function that are kept, at most."""


class StateTwist(Twist):
    r"""Learned boosts of the tokens that may come next, :math:`b(f(\text{text so far} + v))`, nats.

    ``f`` says where a text has come to: what a half-written plan has reached, what a formula leaves unexplained. A
    network of one hidden layer beside a linear map sees these numbers, apart for a text that goes on and for one that
    token ``v`` ends, the share of ``max_tokens`` that is used, and the log-probability that the language model gives to
    ``v``. It starts at zero, the language model's own law, or at coefficients that are given.

    :param features: ``f(told, text)``, numbers of about unit size. The text is without the token that ends a grammar.
    :param hidden: width of the hidden layer.
    :param start: coefficients to start from, nats: of texts that go on, and of those that end, a number a feature each.
    :raises ValueError: other numbers of coefficients.
    """

    goal = "a state"
    most_read = 5_000

    def __init__(self, features: Features, hidden: int = 32, start: Start | None = None) -> None:
        super().__init__()
        self.features, self.hidden = features, hidden
        self._known: OrderedDict[tuple[str, str], list[float]] = OrderedDict()
        self.count = len(features("", ""))
        self.start = None if start is None else tuple(tuple(map(float, part)) for part in start)
        if self.start is not None and [len(part) for part in self.start] != [self.count] * 2:
            raise ValueError(
                f"start={start!r} must be two sequences of {self.count} numbers, as many as features: of texts that go "
                "on, and of texts that end."
            )
        width = 2 * self.count + 4
        self.linear = nn.Linear(width, 1, bias=False)
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1, bias=False))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.linear, *self.layers):
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        for last in (self.linear, self.layers[-1]):
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
        if self.start is not None:
            with torch.no_grad():
                self.linear.weight[0, : 2 * self.count] = torch.tensor([*self.start[0], *self.start[1]])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known": OrderedDict()}

    def forward(self, seen: Tensor) -> Tensor:
        """Boosts ``(...)`` of tokens, from what :meth:`seen` gives."""
        seen = seen.to(self.linear.weight.dtype)
        # Large numbers, such as nats of a likelihood, count in proportion, and do not saturate the hidden layer.
        return (self.linear(seen) + self.layers(LARGE * torch.tanh(seen / LARGE)))[..., 0]

    def seen(self, told: str, before: str, tokens: Sequence[str], base: Tensor, end: str, used: float) -> Tensor:
        """What the network sees of each token that may come next, ``(C, 2F + 4)``.

        :param before: the text so far.
        :param base: log-probabilities of the tokens by the language model, ``(C,)``, nats.
        :param end: how the token is written that ends a grammar's texts.
        :param used: the share of ``max_tokens`` that the text so far has.
        """
        rows = []
        for token in tokens:
            ends = bool(end) and token == end
            numbers = self._ask(told, before if ends else before + token)
            silent = [0.0] * self.count
            rows.append([*(silent if ends else numbers), *(numbers if ends else silent), float(ends), 1.0 - ends, used])
        own = base.detach().clamp(min=-20.0)[:, None] / 10
        return torch.cat([torch.tensor(rows, dtype=base.dtype, device=base.device), own], -1)

    def _ask(self, told: str, text: str) -> list[float]:
        key = (told, text)
        if key not in self._known:
            numbers = [float(number) for number in self.features(told, text)]
            if len(numbers) != self.count:
                raise ValueError(
                    f"features gave {len(numbers)} numbers for {text!r} and {self.count} before. Return as many for "
                    "every text."
                )
            self._known[key] = numbers
            while len(self._known) > MOST_KEPT:
                self._known.popitem(last=False)
        return self._known[key]

    def walk(self, lm: LanguageModel, law: TextLaw, told: list[str]) -> StateWalk:
        return StateWalk(lm, law, told, self)

    def reading(
        self, lm: LanguageModel, law: TextLaw, keys: list[Key], number: Mapping[tuple[Any, Any], int]
    ) -> StateReading:
        return StateReading(lm, law, keys, number, self)

    def corrected(self, records: Sequence[StateRecord], width: int) -> Tensor:
        some = records[0].base
        scores = torch.zeros(len(records), width, dtype=some.dtype, device=some.device)
        places = [(n, t) for n, record in enumerate(records) for t in range(len(record.chosen))]
        if not places:
            return scores
        sizes = [base.shape[0] for record in records for base in record.bases]
        base = torch.cat([base for record in records for base in record.bases])
        terms = base + self(torch.cat([seen for record in records for seen in record.seen])).to(base.dtype)
        # One row for each place, as wide as the most tokens that may come anywhere.
        row = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(some.device)
        column = torch.cat([torch.arange(size) for size in sizes]).to(some.device)
        table = base.new_full((len(sizes), max(sizes)), -torch.inf).index_put((row, column), terms)
        chosen = torch.tensor([c for record in records for c in record.chosen], device=some.device)
        own = table.gather(-1, chosen.clamp(min=0)[:, None])[:, 0]
        own = torch.where(chosen >= 0, own - table.logsumexp(-1), -torch.inf)
        n, t = torch.tensor(places, device=some.device).T
        return scores.index_put((n, t), own)


class StateWalk:
    """The twisted law of the next token while texts are drawn."""

    def __init__(self, lm: LanguageModel, law: TextLaw, told: list[str], twist: StateTwist) -> None:
        self.spell, self.told, self.twist = _Candidates(lm, law), told, twist
        self._found: dict[tuple[int, int], Found] = {}

    def __call__(self, log_probs: Tensor, rows: list[int], texts: Tensor) -> Tensor:
        twisted = log_probs.clone()
        for n, (row, text) in enumerate(zip(rows, texts.tolist(), strict=True)):
            known = [t for t in text if t != PAD]
            found = self._found[row, len(known)] = self.spell(self.twist, self.told[row], known, log_probs[n])
            ids, base, seen = found
            twisted[n, ids] = base + self.twist(seen).to(base.dtype)
        return twisted.log_softmax(-1)

    def records(self, texts: Sequence[Sequence[int]]) -> list[StateRecord]:
        """Of the texts that were drawn, one for each row."""
        return [_record([self._found[n, t] for t in range(len(text))], text) for n, text in enumerate(texts)]


@dataclass(frozen=True)
class StateRecord:
    """What the network says of one text, and what the twist sees of it.

    :param base: a tensor of the scores' type and device.
    :param bases: log-probabilities of the tokens that may come at each place, ``(C,)`` each.
    :param seen: what the twist sees of them, ``(C, 2F + 4)`` each.
    :param chosen: which of them comes, −1 for none.
    """

    base: Tensor
    bases: list[Tensor]
    seen: list[Tensor]
    chosen: list[int]


class StateReading:
    """The tokens that may come at every place of given texts, taken down as the network gives the laws."""

    def __init__(
        self,
        lm: LanguageModel,
        law: TextLaw,
        keys: Sequence[Key],
        number: Mapping[tuple[Any, Any], int],
        twist: StateTwist,
    ) -> None:
        self.spell, self.keys, self.twist = _Candidates(lm, law), keys, twist
        self._rows: dict[int, list[int]] = {}
        for n, key in enumerate(keys):
            self._rows.setdefault(number[key[1:3]], []).append(n)
        self._found: dict[tuple[int, int], Found] = {}

    def take(self, log_probs: Tensor, rows: Sequence[int], columns: Sequence[int]) -> None:
        for place, (of, column) in enumerate(zip(rows, columns, strict=True)):
            for n in self._rows[of]:
                text = list(self.keys[n][2][:column])
                self._found[n, column] = self.spell(self.twist, self.keys[n][3], text, log_probs[place].detach())

    def records(self, scores: Tensor) -> list[StateRecord]:
        """One for each row."""
        return [_record([self._found[n, t] for t in range(len(key[2]))], key[2]) for n, key in enumerate(self.keys)]


def _record(found: list[Found], text: Sequence[int]) -> StateRecord:
    chosen = []
    for token, (ids, _, _) in zip(text, found, strict=True):
        at = (ids == token).nonzero()
        chosen.append(int(at[0, 0]) if len(at) else -1)
    bases, seen = [base for _, base, _ in found], [rows for _, _, rows in found]
    return StateRecord(bases[0].new_empty(0), bases, seen, chosen)


class _Candidates:
    """The tokens that may come next, and what a twist sees of them."""

    def __init__(self, lm: Any, law: TextLaw) -> None:
        self.lm, self.end, self.most = lm, lm.spelling.end, law.max_tokens or 1

    def __call__(self, twist: StateTwist, told: str, text: list[int], log_probs: Tensor) -> Found:
        ids = (log_probs > -torch.inf).nonzero()[:, 0]
        if len(ids) > MOST_TOKENS:
            raise ValueError(
                f"{len(ids):,} tokens may come next, and the features are asked for each. Give the site a grammar= or "
                f"allowed= of at most {MOST_TOKENS}."
            )
        before = self.lm.codec.decode(text)
        # Together with the text before: a character may be spelled by several tokens.
        tokens = [
            self.end if token == self.lm.tokenizer.eos_token_id else self.lm.codec.decode([*text, token])[len(before) :]
            for token in ids.tolist()
        ]
        base = log_probs[ids]
        return ids, base, twist.seen(told, before, tokens, base, self.end, len(text) / self.most)
