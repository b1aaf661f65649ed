"""A language model's text, twisted towards a condition, such as a word that it shall have."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.distributions.conditioned_text import LanguageModel, Pending
from llmppl.distributions.word_classes import (
    BOOSTED,
    NUM_FEATURES,
    Key,
    Record,
    WordReading,
    WordWalk,
    corrected,
)
from llmppl.network.drawing import NotFiniteError, draw
from llmppl.network.scoring import Request
from llmppl.network.text_law import TextLaw
from llmppl.network.text_tensors import check_text, unpad_rows


class Twist(nn.Module):
    """What multiplies the law of each next token, given what a row is told. It has parameters, and keeps what the
    network has said of texts: of simulated sets that are read again nothing is asked twice."""

    goal = "a condition"
    """What the text is twisted towards."""

    most_read = 50_000
    """Texts whose reading is kept, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.read: OrderedDict[Key, Any] = OrderedDict()

    def walk(self, lm: Any, law: TextLaw, told: list[str]) -> Any:
        """While texts are drawn: from the law of the next token, the numbers of the rows and the texts so far to the
        twisted law. Where it has ``records``, these are of the texts that were drawn, which then need not be read."""
        raise NotImplementedError

    def reading(self, lm: Any, law: TextLaw, keys: list[Key], number: Mapping[tuple[Any, Any], int]) -> Any:
        """While texts are scored: takes down what the network says (``take``), a record for each row (``records``)."""
        raise NotImplementedError

    def corrected(self, records: Sequence[Any], width: int) -> Tensor:
        """Log-probability of each token under the twisted law, ``(N, width)``, nats, zero behind the end."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Start anew: the language model's own law."""
        raise NotImplementedError

    def forget(self) -> None:
        """What was read first, where that is too much."""
        while len(self.read) > self.most_read:
            self.read.popitem(last=False)

    def version(self) -> int:
        """A number that grows whenever a parameter changes in place."""
        return sum(p._version for p in self.parameters())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "read": OrderedDict()}


class WordTwist(Twist):
    r"""Learned boosts of the tokens that lead to a word, :math:`b_c(t, s, \text{masses})`, nats.

    A network of two small hidden layers. It sees where the text stands (its length, what is left of ``max_tokens``, the
    state of the automaton), how long the word is, and the log-probability that the language model itself gives to each
    class of tokens. It starts at zero: the language model's own law without texts that end too early.

    :param hidden: width of the hidden layers.
    """

    goal = "a word"

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

    def walk(self, lm: Any, law: TextLaw, told: list[str]) -> WordWalk:
        return WordWalk(lm, law, _words(told), self)

    def reading(self, lm: Any, law: TextLaw, keys: list[Key], number: Mapping[tuple[Any, Any], int]) -> WordReading:
        return WordReading(lm, law, [(*key[:3], *_words([key[3]])) for key in keys], number)

    def corrected(self, records: Sequence[Record], width: int) -> Tensor:
        return corrected(self, records, width)


def _words(told: list[str]) -> list[str]:
    return [text.strip().lower() for text in told]


class TwistedText(AutoregressiveText):
    r"""The law of :class:`AutoregressiveText`, token by token multiplied by a learned twist [1, 2, 3] and normalised.

    .. math:: q(z) = \prod_t \frac{p(z_t \mid z_{<t})\, e^{b(c(z_t))}}{\sum_v p(v \mid z_{<t})\, e^{b(c(v))}}

    where :math:`c(v)` is what token ``v`` does for what the row is told, and :math:`b` the twist. Of a
    :class:`WordTwist` the row is told a word that the text shall have, and a token begins or continues it, writes its
    last letter, completes it, ends the text, or none of these; of a :class:`StateTwist` it is a vector of numbers. The
    network is the language model itself, read once; the twist costs next to nothing. Under an adapter it is the adapted
    law that is twisted.

    It sums to one over the texts of the law; with a word, but those that end without it. A row whose word is empty is
    not twisted.

    :param told: what the rows are told, such as words, as token ids, ``batch_shape + (W,)``.
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
        lm: LanguageModel,
        context: Tensor,
        law: TextLaw,
        told: Tensor,
        twist: Twist,
        adapter: str | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if lm.arrays.train(context):
            raise ValueError(
                "a twist reads a network that stays as it is, and an encoder of this context trains. Freeze it, "
                "encoder.requires_grad_(False), or take an AutoregressiveGuide."
            )
        self.told, self.twist = told, twist
        self._walk: Any = None
        shape = torch.broadcast_shapes(context.shape[:-1], told.shape[:-1])
        super().__init__(lm, context.expand(shape + context.shape[-1:]), law, adapter, validate_args)

    def with_context(self, context: Tensor, adapter: str | None) -> TwistedText:
        """The same law, told the same, after another context, under another adapter."""
        return TwistedText(self.lm, context, self.law, self.told, self.twist, adapter, self._validate_args)

    def rows(self, index: Tensor | slice) -> TwistedText:
        told = self.told.expand(self.batch_shape + self.told.shape[-1:])[index]
        context, adapter = self.context[index], self.adapter
        return self._at_site(TwistedText(self.lm, context, self.law, told, self.twist, adapter, self._validate_args))

    def expand(self, batch_shape: Any, _instance: object = None) -> TwistedText:
        shape = torch.Size(batch_shape)
        told = self.told.expand(shape + self.told.shape[-1:])
        context = self.context.expand(shape + self.context.shape[-1:])
        expanded = TwistedText(self.lm, context, self.law, told, self.twist, self.adapter, self._validate_args)
        expanded._memo, expanded.site = self._memo, self.site
        return expanded

    @property
    def _wants_gradient(self) -> bool:
        twisted = torch.is_grad_enabled() and any(p.requires_grad for p in self.twist.parameters())
        return twisted or super()._wants_gradient

    def _version(self) -> int:
        return super()._version() + self.twist.version()

    @torch.no_grad()
    def sample_with_log_prob(
        self, sample_shape: Any = torch.Size(), temperature: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw texts, and the log-probabilities recorded while drawing, ``sample_shape + batch_shape``, in nats."""
        shape = torch.Size(sample_shape) + self.batch_shape
        context = self.context.expand(shape + self.context.shape[-1:])
        rows = unpad_rows(context.reshape(-1, context.shape[-1]))
        told = self._strings(shape)
        walk = self.twist.walk(self.lm, self.law, told)
        heat = None if temperature is None else temperature.to(context.device).expand(shape).reshape(-1)
        try:
            with self.lm.drawing(self.adapter, None) as transformer:
                own = torch.zeros(len(rows), self.event_shape[0], dtype=self._dtype, device=context.device)
                tokens, token_log_probs = draw(transformer, self.law, rows, heat, walk, own)
        except NotFiniteError as error:
            raise ValueError(f"site {self.site!r}: {error}" if self.site else str(error)) from None
        self.recall(rows, tokens, own)
        if self.adapter is None and hasattr(walk, "records"):
            texts = unpad_rows(tokens)
            self.twist.read.update(zip(self._keys(rows, texts, told), walk.records(texts), strict=True))
            self.twist.forget()
        tokens = tokens.reshape(shape + self.event_shape)
        token_log_probs = token_log_probs.reshape(tokens.shape)
        self.remember(tokens, token_log_probs)
        return tokens, token_log_probs.sum(-1)

    def next_log_probs(self, logits: Tensor, begun: Tensor, rows: Tensor | None = None) -> Tensor:
        log_probs = super().next_log_probs(logits, begun, rows)
        if self._walk is None:
            self._walk = self.twist.walk(self.lm, self.law, self._strings(torch.Size(self.batch_shape)))
        numbers = range(len(begun)) if rows is None else rows.tolist()
        with torch.no_grad():
            return self._walk(log_probs, list(numbers), begun)

    def not_terminable(self) -> str | None:
        return f"is twisted towards {self.twist.goal}, which a text that is cut off may not have reached"

    def pending(self, value: Tensor) -> Pending | None:
        value = check_text(value, "value", self.law.vocabulary)
        flat, context, shape = self._broadcast(value)
        if self._memo.holds(value, shape, self._version(), self._wants_gradient):
            return None
        if self._validate_args:
            self._validate_text(value)
        texts, contexts, told = unpad_rows(flat), unpad_rows(context), self._strings(shape)
        keys = self._keys(contexts, texts, told)
        # The network is frozen unless an adapter is on, and what it says of a text then stays.
        known = self.twist.read if self.adapter is None else {}
        missing = list(dict.fromkeys(key for key in keys if key not in known))
        gradient = torch.is_grad_enabled() and any(p.requires_grad for p in self.twist.parameters())

        def finish() -> None:
            with torch.set_grad_enabled(gradient):
                scores = self.twist.corrected([known[key] for key in keys], value.shape[-1])
            scores = scores.masked_fill(~self.support.check(flat)[:, None], -torch.inf)
            self.remember(value, scores.reshape(shape + value.shape[-1:]))

        if not missing:
            finish()
            return None
        # One text may be scored for several rows that are told another thing: the network reads it once.
        distinct = list(dict.fromkeys(key[1:3] for key in missing))
        reading = self.twist.reading(self.lm, self.law, missing, {pair: n for n, pair in enumerate(distinct)})

        def take(scores: Tensor) -> None:
            known.update(zip(missing, reading.records(scores), strict=True))
            finish()
            self.twist.forget()

        request = Request(
            self.law, [list(c) for c, _ in distinct], [list(t) for _, t in distinct], value.shape[-1], reading.take
        )
        return Pending(request, take)

    def remember(self, value: Tensor, scores: Tensor) -> None:
        super().remember(value, scores)
        self._memo.version = self._version()

    def _keys(self, contexts: Any, texts: Any, told: list[str]) -> list[Key]:
        own = self.law
        allowed = None if own.allowed is None else own.allowed.cpu().numpy().tobytes()
        ends = (tuple(own.stop.tolist()), own.automaton, own.grammar)
        law = (own.max_tokens, own.min_tokens, own.temperature, allowed, *ends)
        return [(law, tuple(c), tuple(t), w) for c, t, w in zip(contexts, texts, told, strict=True)]

    def _strings(self, shape: torch.Size) -> list[str]:
        """What each row of a batch is told."""
        told = self.told.expand(shape + self.told.shape[-1:]).reshape(-1, self.told.shape[-1])
        known: dict[tuple[int, ...], str] = {}
        found = []
        for ids in unpad_rows(told):
            if tuple(ids) not in known:
                known[tuple(ids)] = self.lm.decode(torch.tensor(ids)) if ids else ""
            found.append(known[tuple(ids)])
        return found

    def __repr__(self) -> str:
        return super().__repr__().replace("AutoregressiveText", "TwistedText", 1)
