"""The text that a causal language model writes after a context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmppl.distributions.conditioned_text import LanguageModel, Memo, Pending, score_together
from llmppl.distributions.process_text import ProcessText
from llmppl.network.drawing import NotFiniteError, draw
from llmppl.network.scoring import Request, check_length
from llmppl.network.text_law import TextLaw
from llmppl.network.text_tensors import check_text, lengths, pad_scores, unpad_rows
from llmppl.text.text_support import nan_mend

if TYPE_CHECKING:
    from llmppl.network.vllm_engine import VLLM

MOST_RECALLED = 4096
"""Draws of the frozen model whose log-probabilities are kept, at most."""


class AutoregressiveText(ProcessText):
    r"""The law of a language model's continuation of a context, as a process over tokens.

    .. math:: p(z) = \prod_t p(z_t \mid \text{context}, z_{<t})

    until a stop token (included) or ``max_tokens``; it sums to one over its support. Made by
    calling an :class:`~llmppl.LM`. With ``law.max_tokens=None`` it is the unbounded stream:
    :meth:`log_prob` is the probability that the stream begins with the value.

    :param lm: the language model.
    :param context: text tensor of shape ``batch_shape + (L,)``; padding in it is skipped.
    :param law: stop tokens, lengths, temperature, vocabulary, grammar.
    :param adapter: the adapter to switch on while sampling and scoring; ``None`` is the model itself.
    :param sampling_dtype: draw with a copy of the model in this precision. A drawn value's recorded
        log-probability is then that of the copy, the law it was drawn from; any other value is scored
        by the model itself.
    """

    def __init__(
        self,
        lm: LanguageModel,
        context: Tensor,
        law: TextLaw,
        adapter: str | None = None,
        validate_args: bool | None = None,
        sampling_dtype: torch.dtype | None = None,
    ) -> None:
        self.lm, self.context, self.law, self.adapter = lm, context, law, adapter
        self.sampling_dtype = sampling_dtype
        self._memo = Memo()
        if law.max_tokens is not None:
            check_length(context, law.max_tokens, lm.max_length)
        # The stream has no length of its own; a trace never asks for more than the number of dims.
        event_shape = torch.Size([law.max_tokens or 0])
        super().__init__(context.shape[:-1], event_shape, validate_args=validate_args)

    def with_context(self, context: Tensor, adapter: str | None) -> AutoregressiveText:
        """The same law after another context, under another adapter."""
        return AutoregressiveText(self.lm, context, self.law, adapter, self._validate_args, self.sampling_dtype)

    def rows(self, index: Tensor | slice) -> AutoregressiveText:
        """The laws of some rows of the batch, by an index of its first dimensions or a mask."""
        return self._at_site(self.with_context(self.context[index], self.adapter))

    def _at_site(self, other: Any) -> Any:
        other.site = self.site
        return other

    def expand(self, batch_shape: Any, _instance: object = None) -> AutoregressiveText:
        batch_shape = torch.Size(batch_shape)
        expanded = self.with_context(self.context.expand(batch_shape + self.context.shape[-1:]), self.adapter)
        # Shared: what one of them has scored, the other need not.
        expanded._memo, expanded.site = self._memo, self.site
        return expanded

    def sample_with_log_prob(
        self, sample_shape: Any = torch.Size(), temperature: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw texts, and the log-probabilities recorded while drawing, of shape
        ``sample_shape + batch_shape``, in nats."""
        if self.law.max_tokens is None:
            raise ValueError(
                "the unbounded stream cannot be sampled: nothing ends it. Pass max_tokens to lm(...), "
                "and stop if a text may end earlier."
            )
        shape = torch.Size(sample_shape) + self.batch_shape
        context = self.context.expand(shape + self.context.shape[-1:])
        rows = unpad_rows(context.reshape(-1, context.shape[-1]))
        if self.sampling_dtype is not None and self.lm.arrays.stand_in(context):
            raise ValueError(
                f"sampling_dtype={self.sampling_dtype}: a copy of the model reads no arrays. Leave it out where a "
                "context has an Embedded piece."
            )
        heat = None if temperature is None else temperature.to(context.device).expand(shape).reshape(-1)
        if self.lm.engine is not None:
            if self.sampling_dtype is None and self.lm.engine.draws(self.law, rows, self.adapter, heat):
                return self._drawn_by(self.lm.engine, rows, heat, shape)
            self.lm.engine.left += len(rows)
        try:
            with self.lm.drawing(self.adapter, self.sampling_dtype) as transformer:
                tokens, token_log_probs = draw(transformer, self.law, rows, heat)
        except NotFiniteError as error:
            raise ValueError(f"site {self.site!r}: {error}" if self.site else str(error)) from None
        if self.sampling_dtype is None:
            self.recall(rows, tokens, token_log_probs)
        tokens = tokens.reshape(shape + self.event_shape)
        token_log_probs = token_log_probs.reshape(tokens.shape)
        self.remember(tokens, token_log_probs)
        return tokens, token_log_probs.sum(-1)

    @torch.no_grad()
    def _drawn_by(
        self, engine: VLLM, rows: list[list[int]], heat: Tensor | None, shape: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """Texts that an engine draws, with the log-probabilities of the model itself."""
        tokens, theirs = engine.draw(self.law, rows, self.adapter, heat)
        tokens = tokens.reshape(shape + self.event_shape)
        log_probs = self.token_log_prob(tokens).sum(-1)
        if heat is None:
            engine.drift.add(log_probs.reshape(-1) - theirs)
        return tokens, log_probs

    def next_log_probs(self, logits: Tensor, begun: Tensor, rows: Tensor | None = None) -> Tensor:
        """The law of the next token of texts that have begun, ``(P, V)``, nats.

        :param logits: ``(P, V)``, the network's after the contexts and what has begun.
        :param begun: ``(P, t)``, what is written so far; padding in it is skipped.
        :param rows: which row of the flattened batch each is, ``(P,)``; by default one after another.
        :raises ValueError: NaN, with the site.
        """
        prefixes = unpad_rows(begun) if self.law.reads_prefix else None
        log_probs = self.law.scaled_logits(logits, lengths(begun), prefixes).log_softmax(-1)
        if bool(log_probs.isnan().any()):
            raise NotFiniteError(f"site {self.site!r}: the network's log-probabilities are NaN. {nan_mend(self.law)}")
        return log_probs

    def not_terminable(self) -> str | None:
        """Why prefixes of a text are no texts once they are ended; ``None`` where they are."""
        if not self.law.stops:
            return "has no stop token, so it cannot end at every prefix"
        if self.law.grammar is not None:
            return "has a grammar, so its prefixes may be no texts"
        return None

    def token_log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each token, in nats, zero behind the end.

        :returns: shape ``broadcast(value.shape[:-1], batch_shape) + (T,)``.
        """
        value = check_text(value, "value", self.law.vocabulary)
        score_together([(self, self.pending(value))])
        return self._memo.take(self._wants_gradient)

    def pending(self, value: Tensor) -> Pending | None:
        value = check_text(value, "value", self.law.vocabulary)
        flat, context, shape = self._broadcast(value)
        if self._memo.holds(value, shape, self._version(), self._wants_gradient):
            return None
        if self._validate_args:
            self._validate_text(value)
        if self.law.max_tokens is None:
            check_length(context, value.shape[-1], self.lm.max_length)
        # Equal rows are many where particles are: each is scored once.
        distinct, row = torch.unique(torch.cat([context, flat], -1), dim=0, return_inverse=True)
        context, flat = distinct.split([context.shape[-1], flat.shape[-1]], -1)
        contexts, texts = unpad_rows(context), unpad_rows(flat)
        recalled = self._recalled(contexts, texts)
        if recalled is not None:
            scores = pad_scores(recalled, value.shape[-1])
            self.remember(value, scores[row].reshape(shape + value.shape[-1:]))
            return None

        def finish(scores: Tensor) -> None:
            scores = scores.masked_fill(~self.support.check(flat)[:, None], -torch.inf)
            self.remember(value, scores[row].reshape(shape + value.shape[-1:]))

        return Pending(Request(self.law, contexts, texts, value.shape[-1]), finish)

    def recall(self, contexts: list[list[int]], texts: Tensor, scores: Tensor) -> None:
        """Keep what the model itself said of texts while they were drawn: the prior need not score a draw again, be it
        its own or that of a guide that twists it."""
        law = self._law_key()
        if law is not None:
            for context, text, own in zip(contexts, unpad_rows(texts), scores, strict=True):
                self.lm.drawn[law, tuple(context), tuple(text)] = own[: len(text)]
            while len(self.lm.drawn) > MOST_RECALLED:
                self.lm.drawn.popitem(last=False)

    def _recalled(self, contexts: list[list[int]], texts: list[list[int]]) -> list[Tensor] | None:
        law = self._law_key()
        if law is None or not self.lm.drawn:
            return None
        found = []
        for context, text in zip(contexts, texts, strict=True):
            known = self.lm.drawn.get((law, tuple(context), tuple(text)))
            if known is None:
                return None
            found.append(known)
        return found

    def _law_key(self) -> tuple[Any, ...] | None:
        """The law by value, of the frozen model; ``None`` where draws are not kept."""
        law = self.law
        if self.lm.arrays.stand_in(self.context):  # their encoders may be trained
            return None
        if self.adapter is not None or law.allowed is not None or law.grammar is not None or law.max_tokens is None:
            return None
        ends = tuple(law.stop.tolist()), law.automaton
        return self.lm.weights_version(), law.max_tokens, law.min_tokens, law.temperature, ends

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.lm.dtype, torch.float32)

    def remember(self, value: Tensor, scores: Tensor) -> None:
        self._memo.value, self._memo.scores = value.clone(), scores
        self._memo.version = self._version()

    def __repr__(self) -> str:
        parts = self._described()
        parts += [f"adapter={self.adapter!r}"] if self.adapter is not None else []
        parts += [f"sampling_dtype={self.sampling_dtype}"] if self.sampling_dtype is not None else []
        return f"AutoregressiveText({', '.join(parts)})"
