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


class EchoedText(DerivedText):
    r"""A text as it is, and with probability ``mistake`` any text at all.

    .. math:: p(t \mid z) = (1 - \varepsilon)\, 1[t = z] + \varepsilon\, \frac{V^{-|t|}}{T + 1}

    over texts of up to ``T`` tokens, the width of ``z``, from a vocabulary of ``V``. What a program computes from a
    latent text, a result or an output, is observed through it: simulated it is the text that was computed, so that a
    guide learns from it, and a text that was not has a small density instead of none. Made by :meth:`llmppl.LM.echo`.

    :param lm: the language model whose tokens these are.
    :param text: text tensor of shape ``batch_shape + (T,)``.
    :param mistake: :math:`\varepsilon`, in (0, 1).
    """

    what = "an echo is of its own text"

    def __init__(self, lm: LanguageModel, text: Tensor, mistake: float, validate_args: bool | None = None) -> None:
        if not 0 < mistake < 1:
            raise ValueError(f"mistake={mistake} must lie between 0 and 1.")
        self.mistake = mistake
        super().__init__(lm, text, text.shape[-1], validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> EchoedText:
        shape = torch.Size(batch_shape)
        text = self.context.expand(shape + self.context.shape[-1:])
        expanded = EchoedText(self.lm, text, self.mistake, self._validate_args)
        expanded.site = self.site
        return expanded

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Texts of shape ``sample_shape + batch_shape + (T,)``."""
        shape, width, device = torch.Size(sample_shape) + self.batch_shape, self.event_shape[0], self.context.device
        length = torch.randint(width + 1, (*shape, 1), device=device)
        other = torch.randint(self.lm.vocabulary, (*shape, width), device=device)
        other = torch.where(torch.arange(width, device=device) < length, other, PAD)
        wrong = torch.rand(*shape, 1, device=device) < self.mistake
        return torch.where(wrong, other, self.context.expand(*shape, width))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability in nats, of shape ``broadcast(value.shape[:-1], batch_shape)``; −inf of a text that has more
        tokens than the echo's width.

        :raises TypeError, ValueError: no well-formed text tensor.
        """
        value, width = check_text(value, "value", self.lm.vocabulary), self.event_shape[0]
        fits = (value[..., width:] == PAD).all(-1)
        value = widen(value, width)[..., :width]
        count = (value != PAD).sum(-1)
        other = math.log(self.mistake) - math.log(width + 1) - count.to(self._dtype) * math.log(self.lm.vocabulary)
        same = torch.where((value == self.context).all(-1), math.log1p(-self.mistake), -torch.inf).to(self._dtype)
        return torch.where(fits, torch.logaddexp(same, other), -torch.inf)

    def __repr__(self) -> str:
        return f"EchoedText(batch_shape={tuple(self.batch_shape)}, mistake={self.mistake})"
