"""Text whose tokens are drawn independently of one another: one table of logits, no network between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmppl.distributions.conditioned_text import LanguageModel, Pending
from llmppl.distributions.process_text import ProcessText
from llmppl.network.text_law import TextLaw
from llmppl.network.text_tensors import check_text
from llmppl.text import PAD

CELLS = 2**24
"""Entries of the cumulated tables that exist at one time while drawing."""


class FactorisedText(ProcessText):
    r"""Independent tokens under the law of a text.

    .. math:: q(z) = \prod_t \operatorname{softmax}(\text{law}(\lambda_t))[z_t]

    until a stop token (included) or ``max_tokens``: a token decides only whether the next one exists. The
    law's stop tokens, lengths, vocabulary and temperature act on the logits as they do on a language
    model's, so that the support is the prior's and the mass is one. A grammar ties tokens together and is
    refused. Particles and plates broadcast: rows that share logits share them in memory.

    :param lm: the language model whose texts these are.
    :param context: text tensor of shape ``batch_shape + (L,)`` that the logits belong to; padding in it is skipped.
    :param law: stop tokens, lengths, temperature, vocabulary.
    :param logits: :math:`\lambda`, whose batch dimensions broadcast with the context's, ``(..., max_tokens, V)``;
        or a function that maps distinct contexts ``(N, L)`` to ``(N, max_tokens, V)``, called when first needed.
    :param version: of such a function, a number that changes when its parameters do.
    :raises ValueError: the unbounded stream, a grammar, or logits of another shape.
    """

    def __init__(
        self,
        lm: LanguageModel,
        context: Tensor,
        law: TextLaw,
        logits: Tensor | Callable[[Tensor], Tensor],
        version: Callable[[], int] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if law.max_tokens is None:
            raise ValueError("the unbounded stream has no number of tokens to give logits. Pass max_tokens to lm(...).")
        if law.grammar is not None:
            raise ValueError(
                f"{law.grammar!r} makes a token depend on those before it, and these are independent. Use an "
                "AutoregressiveGuide, or express the grammar as a factor of the program."
            )
        if law.reads_prefix:
            raise ValueError(
                f"min_tokens={law.min_tokens} with {law.described_stop()}, which several tokens write, makes a token "
                "depend on those before it, and these are independent. Leave min_tokens out, or stop at token ids."
            )
        self.lm, self.law, self.adapter = lm, law, None
        if isinstance(logits, Tensor):
            if logits.dim() < 2 or logits.shape[-2] != law.max_tokens or logits.shape[-1] < law.vocabulary:
                raise ValueError(
                    f"logits has shape {tuple(logits.shape)}; it must be (..., max_tokens={law.max_tokens}, "
                    f"vocabulary={law.vocabulary})."
                )
            shape = torch.broadcast_shapes(context.shape[:-1], logits.shape[:-2])
            context = context.expand(shape + context.shape[-1:])
        self.context = context
        self._table = _Table(logits, context, version or (lambda: 0))
        super().__init__(context.shape[:-1], torch.Size([law.max_tokens]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> FactorisedText:
        expanded = FactorisedText.__new__(FactorisedText)
        expanded.lm, expanded.law, expanded.adapter, expanded.site = self.lm, self.law, None, self.site
        expanded.context = self.context.expand(torch.Size(batch_shape) + self.context.shape[-1:])
        expanded._table = self._table  # the rows stay what they were
        super(FactorisedText, expanded).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        expanded._validate_args = self._validate_args
        return expanded

    @property
    def logits(self) -> Tensor:
        """:math:`\\lambda`, ``batch_shape + (max_tokens, V)``; a view where rows share it."""
        return self._of_batch(*self._table.get())

    @property
    def log_probs(self) -> Tensor:
        """Log-probability of every token at every position that is reached, ``batch_shape + (max_tokens, V)``,
        in nats; a view where rows share their logits."""
        scaled, row = self._scaled()
        self._table.spend()
        return self._of_batch(scaled.log_softmax(-1), row)

    def _of_batch(self, table: Tensor, row: Tensor) -> Tensor:
        if len(table) == 1:
            return table[0].expand(self.batch_shape + table.shape[1:])
        return table[row.expand(self.batch_shape)]

    def sample_with_log_prob(
        self, sample_shape: Any = torch.Size(), temperature: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw texts, and their log-probabilities of shape ``sample_shape + batch_shape``, in nats."""
        scaled, row = self._scaled()
        shape = torch.Size(sample_shape) + self.batch_shape
        row = row.expand(shape).reshape(-1)
        heat = torch.ones(len(row), device=row.device)
        if temperature is not None:
            heat = temperature.to(row.device).expand(shape).reshape(-1)
        with torch.no_grad():
            tokens = _draw(scaled, row, heat)
            ended = self.law.ended(tokens)
            tokens = tokens.masked_fill(torch.nn.functional.pad(ended[:, :-1], (1, 0)), PAD)
            scores = _pick(scaled, row, tokens)
        return tokens.reshape(shape + self.event_shape), scores.sum(-1).reshape(shape)

    def token_log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each token, in nats, zero behind the end.

        :returns: shape ``broadcast(value.shape[:-1], batch_shape) + (T,)``.
        """
        value = check_text(value, "value", self.law.vocabulary)
        flat, _, shape = self._broadcast(value)
        if self._validate_args:
            self._validate_text(value)
        scaled, row = self._scaled()
        self._table.spend()
        width = min(value.shape[-1], self.event_shape[0])
        scores = _pick(scaled, row.expand(shape).reshape(-1), flat[:, :width])
        scores = torch.nn.functional.pad(scores, (0, value.shape[-1] - width))
        scores = scores.masked_fill(~self.support.check(flat)[:, None], -torch.inf)
        return scores.reshape(shape + value.shape[-1:])

    def pending(self, value: Tensor) -> Pending | None:
        return None  # nothing is asked of the network for a value

    def _scaled(self) -> tuple[Tensor, Tensor]:
        """The law's logits of the distinct rows, ``(N, max_tokens, V)``, and each row's number, which broadcasts
        with the batch shape."""
        table, row = self._table.get()
        count, width = len(table), self.event_shape[0]
        step = torch.arange(width, device=table.device).repeat(count)
        scaled = self.law.scaled_logits(table.reshape(count * width, -1), step, None).reshape(count, width, -1)
        wrong = scaled.isnan() | (scaled == torch.inf)
        if bool(wrong.any()):
            where = f"site {self.site!r}: " if self.site else ""
            raise ValueError(
                f"{where}the logits of token {int(wrong.nonzero()[0, 1])} are not finite. Check the model's weights "
                "and dtype (float16 overflows), and lower the learning rate."
            )
        return scaled, row

    def __repr__(self) -> str:
        return f"FactorisedText({', '.join(self._described())})"


@dataclass
class _Table:
    """The logits of the distinct rows of a batch, and which row each entry of the batch has.

    A function's logits are made with a graph where gradients are on, are kept until they are scored with
    that graph, and are made again once parameters have changed.
    """

    logits: Tensor | Callable[[Tensor], Tensor]
    context: Tensor
    version: Callable[[], int]
    _found: tuple[Tensor, Tensor] | None = None
    _made: tuple[bool, int] = (False, 0)

    def detached(self) -> _Table:
        logits = self.logits.detach() if isinstance(self.logits, Tensor) else self.logits
        return _Table(logits, self.context, self.version)

    def get(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.logits, Tensor):
            own = self.logits.shape[:-2]
            row = torch.arange(own.numel(), device=self.logits.device).reshape(own)
            return self.logits.reshape((-1,) + self.logits.shape[-2:]), row
        graph, version = torch.is_grad_enabled(), self.version()
        if self._found is None or self._made[1] != version or (graph and not self._made[0]):
            flat = self.context.reshape(-1, self.context.shape[-1])
            distinct, row = torch.unique(flat, dim=0, return_inverse=True)
            self._found = self.logits(distinct), row.reshape(self.context.shape[:-1])
            self._made = graph, version
        return self._found

    def spend(self) -> None:
        """A graph serves one backward pass."""
        if torch.is_grad_enabled():
            self._found = None


def _pick(scaled: Tensor, row: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token of ``(M, T)`` under its row of a table ``(N, T, V)``, zero for padding."""
    position = torch.arange(tokens.shape[-1], device=tokens.device)
    index = row[:, None], position, tokens.clamp(min=0)
    scores = scaled[index] - scaled.logsumexp(-1)[index[:2]]
    return scores.masked_fill(tokens == PAD, 0.0)


def _draw(scaled: Tensor, row: Tensor, heat: Tensor) -> Tensor:
    """One token for every position of ``M`` rows, ``(M, T)``, by inversion of the cumulated laws.

    :param scaled: the laws, ``(N, T, V)``.
    :param row: which of them each row has, ``(M,)``.
    :param heat: the temperature it is drawn at, ``(M,)``.
    """
    height = torch.rand(len(row), scaled.shape[1], dtype=torch.float64, device=row.device)
    tokens = torch.zeros(height.shape, dtype=torch.long, device=row.device)
    block = max(CELLS // scaled[0].numel(), 1)
    for temperature in heat.unique():
        at = (heat == temperature).nonzero()[:, 0]
        used, group, count = row[at].unique(return_inverse=True, return_counts=True)
        # The rows of one law side by side, as many columns as the fullest has.
        order = group.argsort(stable=True)
        place = torch.empty_like(group)
        place[order] = torch.arange(len(at), device=at.device) - (count.cumsum(0) - count)[group[order]]
        heights = height.new_zeros(len(used), int(count.max()), scaled.shape[1])
        heights[group, place] = height[at]
        drawn = [
            _invert(scaled[used[n : n + block]] / temperature, heights[n : n + block].mT.contiguous())
            for n in range(0, len(used), block)
        ]
        tokens[at] = torch.cat(drawn).mT[group, place]
    return tokens


def _invert(scaled: Tensor, height: Tensor) -> Tensor:
    """Tokens ``(n, T, m)`` of laws ``(n, T, V)`` at heights in [0, 1) of the same shape as the tokens; one of
    probability zero is never chosen."""
    steps = scaled.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = steps[..., -1:]
    below = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(steps, torch.minimum(height * total, below), right=True)
