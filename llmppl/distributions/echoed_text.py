"""A text that is said again, now and then with a mistake."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmppl.distributions.conditioned_text import LanguageModel
from llmppl.distributions.derived_text import DerivedText
from llmppl.network.text_tensors import check_text, widen
from llmppl.text import PAD
from llmppl.text.echoes import check_echo


class EchoedText(DerivedText):
    r"""A text as it is, and with probability ``mistake`` any text of up to ``T`` tokens.

    .. math:: p(t \mid z) = (1 - \varepsilon)\, 1[t = z] + \varepsilon\, \frac{V^{-|t|}}{T + 1}\, 1[|t| \le T]

    from a vocabulary of ``V``. ``T`` is the program's to say, not the width of ``z``: that of a computed text is of
    the longest of all rows, and a row's density must not depend on others. What a program computes from a
    latent text, a result or an output, is observed through it: simulated it is the text that was computed, so that a
    guide learns from it, and a text that was not has a small density instead of none. Made by :meth:`llmppl.LM.echo`.

    :param lm: the language model whose tokens these are.
    :param text: text tensor of shape ``batch_shape + (W,)``.
    :param mistake: :math:`\varepsilon`, in (0, 1).
    :param max_tokens: ``T``.
    :raises ValueError: either out of its range.
    """

    what = "an echo is of its own text"

    def __init__(
        self, lm: LanguageModel, text: Tensor, mistake: float, max_tokens: int, validate_args: bool | None = None
    ) -> None:
        check_echo(mistake, max_tokens)
        self.mistake, self.max_tokens = mistake, max_tokens
        width = max(text.shape[-1], max_tokens)
        super().__init__(lm, widen(text, width), width, validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> EchoedText:
        shape = torch.Size(batch_shape)
        text = self.context.expand(shape + self.context.shape[-1:])
        expanded = EchoedText(self.lm, text, self.mistake, self.max_tokens, self._validate_args)
        expanded.site = self.site
        return expanded

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Texts of shape ``sample_shape + batch_shape + (max(T, W),)``."""
        shape, width, device = torch.Size(sample_shape) + self.batch_shape, self.event_shape[0], self.context.device
        length = torch.randint(self.max_tokens + 1, (*shape, 1), device=device)
        other = torch.randint(self.lm.vocabulary, (*shape, width), device=device)
        other = torch.where(torch.arange(width, device=device) < length, other, PAD)
        wrong = torch.rand(*shape, 1, device=device) < self.mistake
        return torch.where(wrong, other, self.context.expand(*shape, width))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability in nats, of shape ``broadcast(value.shape[:-1], batch_shape)``; −inf of another text
        than the echo's that has more than ``T`` tokens.

        :raises TypeError, ValueError: no well-formed text tensor.
        """
        value, width = check_text(value, "value", self.lm.vocabulary), self.event_shape[0]
        count = (value != PAD).sum(-1)
        other = (
            math.log(self.mistake)
            - math.log(self.max_tokens + 1)
            - count.to(self._dtype) * math.log(self.lm.vocabulary)
        )
        other = torch.where(count <= self.max_tokens, other, -torch.inf)
        width = max(width, value.shape[-1])
        same = (widen(value, width) == widen(self.context, width)).all(-1)
        return torch.logaddexp(torch.where(same, math.log1p(-self.mistake), -torch.inf).to(self._dtype), other)

    def __repr__(self) -> str:
        return (
            f"EchoedText(batch_shape={tuple(self.batch_shape)}, mistake={self.mistake}, max_tokens={self.max_tokens})"
        )
