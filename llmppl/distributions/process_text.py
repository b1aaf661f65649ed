"""Texts under a :class:`~llmppl.network.text_law.TextLaw`, whatever network gives their probabilities."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.network.text_law import Text, TextLaw, enumerate_texts
from llmppl.network.text_tensors import lengths, widen
from llmppl.text.text_support import why_outside


class ProcessText(ConditionedText, TorchDistribution):
    """What distributions over the texts of one law have in common: support, enumeration, validation.

    The law says which texts there are: stop tokens, lengths, vocabulary, grammar.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_enumerate_support = True
    law: TextLaw

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        return Text(self.law)

    def sample(self, sample_shape: Any = torch.Size(), temperature: Tensor | None = None) -> Tensor:
        """Draw texts of shape ``sample_shape + batch_shape + (max_tokens,)``.

        :param temperature: an extra temperature to draw tokens at, broadcastable to
            ``sample_shape + batch_shape``: a behaviour policy. It is no part of the law.
        :raises ValueError: for the unbounded stream.
        """
        return self.sample_with_log_prob(sample_shape, temperature)[0]

    def sample_with_log_prob(
        self, sample_shape: Any = torch.Size(), temperature: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw texts, and the log-probabilities recorded while drawing, of shape ``sample_shape + batch_shape``,
        in nats."""
        raise NotImplementedError

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability in nats, of shape ``broadcast(value.shape[:-1], batch_shape)``.

        :raises TypeError, ValueError: the value is no well-formed text tensor.
        """
        return self.token_log_prob(value).sum(-1)

    def token_log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each token, in nats, zero behind the end.

        :returns: shape ``broadcast(value.shape[:-1], batch_shape) + (T,)``.
        """
        raise NotImplementedError

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Every text of a small support: ``(n,) + batch_shape + (max_tokens,)``, or with
        ``expand=False`` ones in place of the batch shape.

        :raises ValueError: more than a million texts, or the unbounded stream.
        """
        texts = enumerate_texts(self.law)
        texts = texts.reshape((len(texts),) + (1,) * len(self.batch_shape) + texts.shape[-1:])
        return texts.expand((-1, *self.batch_shape, -1)) if expand else texts

    def _validate_text(self, value: Tensor) -> None:
        law = self.law
        widened = value if law.max_tokens is None else widen(value, law.max_tokens)
        inside = self.support.check(widened)
        if bool(inside.all()):
            return
        row = tuple((~inside).nonzero()[0].tolist())
        text = value[row]
        count = int(lengths(text))
        excluded = law.allowed is not None and not bool(law.allowed[text[:count]].all())
        early = bool(law.ended(text[: max(count - 1, 0)]).any())
        reason = why_outside(count, law.min_tokens, law.max_tokens, excluded, early)
        raise ValueError(
            f"the text {self.lm.decode(text)!r} (row {row}) is outside the support {self.support}: {reason}. "
            "For an observed text of any form leave stop and max_tokens out of lm(...)."
        )

    def _described(self) -> list[str]:
        """The law and the batch shape, for a ``repr``."""
        law = self.law
        parts = [f"batch_shape={tuple(self.batch_shape)}"]
        if law.max_tokens is None:
            parts.append("unbounded stream")
        else:
            parts.append(f"max_tokens={law.max_tokens}")
            parts += [f"min_tokens={law.min_tokens}"] if law.min_tokens else []
            parts += [law.described_stop()] if law.stops else []
        parts += [f"temperature={law.temperature}"] if law.temperature != 1 else []
        parts += [f"{int(law.allowed.sum())} allowed tokens"] if law.allowed is not None else []
        parts += [f"{law.grammar!r}"] if law.grammar is not None else []
        return parts
