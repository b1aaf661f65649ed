"""One of several given strings, weighted by a language model."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from llmppl.distributions.conditioned_text import ConditionedText, LanguageModel, Pending, score_together
from llmppl.network.scoring import Request
from llmppl.network.text_law import TextLaw
from llmppl.network.text_tensors import check_text, unpad_rows, widen
from llmppl.text import PAD


class _Option(constraints.Constraint):
    """One of the rows of a text tensor of options."""

    is_discrete = True
    event_dim = 1

    def __init__(self, options: Tensor) -> None:
        self.options = options
        super().__init__()

    def __repr__(self) -> str:
        return f"Option({len(self.options)} texts)"

    def check(self, value: Tensor) -> Tensor:
        return (option_index(value, self.options) >= 0) & (value >= PAD).all(-1)


def option_index(value: Tensor, options: Tensor) -> Tensor:
    """Which option each text is, of shape ``value.shape[:-1]``; −1 for none."""
    width = max(value.shape[-1], options.shape[-1])
    equal = (widen(value, width)[..., None, :] == widen(options, width)).all(-1)
    return torch.where(equal.any(-1), equal.long().argmax(-1), -1)


class Choice(ConditionedText, TorchDistribution):
    r"""The finite distribution over given strings.

    .. math:: p(o_i) = \frac{P_i e^{t_i}}{\sum_j P_j e^{t_j}}, \qquad P_i = P(\text{the continuation begins with } o_i)

    Made by :meth:`llmppl.LM.choice`. It enumerates, so that ``TraceEnum_ELBO`` is exact on it.

    :param lm: the language model.
    :param context: text tensor of shape ``batch_shape + (L,)``; padding in it is skipped.
    :param options: text tensor of shape ``(n, T)``, none a prefix of another.
    :param adapter: the adapter to switch on while scoring.
    :param given: normalised log-probabilities of the options that stand in for the model's, ``(n,)``.
    :param tilt: added to them before they are normalised, ``batch_shape + (n,)``, nats.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_enumerate_support = True

    def __init__(
        self,
        lm: LanguageModel,
        context: Tensor,
        options: Tensor,
        adapter: str | None = None,
        validate_args: bool | None = None,
        given: Tensor | None = None,
        tilt: Tensor | None = None,
    ) -> None:
        if tilt is not None:
            shape = torch.broadcast_shapes(context.shape[:-1], tilt.shape[:-1])
            context, tilt = context.expand(*shape, -1), tilt.expand(*shape, -1)
        self.lm, self.context, self.options, self.adapter, self.given = lm, context, options, adapter, given
        self.tilt = tilt
        self._cached_logits: Tensor | None = None
        super().__init__(context.shape[:-1], options.shape[-1:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        return _Option(self.options)

    def with_context(self, context: Tensor, adapter: str | None) -> Choice:
        """The same options after another context, under another adapter, weighted by the model."""
        return Choice(self.lm, context, self.options, adapter, validate_args=self._validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> Choice:
        batch_shape = torch.Size(batch_shape)
        context = self.context.expand(batch_shape + self.context.shape[-1:])
        tilt = None if self.tilt is None else self.tilt.expand(*batch_shape, -1)
        return Choice(self.lm, context, self.options, self.adapter, self._validate_args, self.given, tilt)

    @property
    def logits(self) -> Tensor:
        """Normalised log-probabilities of the options, of shape ``batch_shape + (n,)``, nats."""
        return self._untilted if self.tilt is None else (self._untilted + self.tilt).log_softmax(-1)

    @property
    def _untilted(self) -> Tensor:
        if self.given is not None:
            return self.given.expand(*self.batch_shape, -1)
        if self._cached_logits is None:
            score_together([(self, self.pending(self.options[0]))])
        logits = self._cached_logits
        assert logits is not None
        if self._trains:
            self._cached_logits = None  # the adapter may change, and a graph serves one backward pass
        return logits

    def pending(self, value: Tensor) -> Pending | None:
        if self.given is not None:
            return None
        # Whatever the value, all options are scored.
        if self._cached_logits is not None and (self._cached_logits.requires_grad or not self._wants_gradient):
            return None
        texts = unpad_rows(self.options)
        contexts = unpad_rows(self.context.reshape(-1, self.context.shape[-1]))
        distinct = list(dict.fromkeys(map(tuple, contexts)))
        row = {context: n for n, context in enumerate(distinct)}
        law = TextLaw(self.lm.vocabulary, None, 0, self.options.new_empty(0))

        def finish(scores: Tensor) -> None:
            logits = scores.sum(-1).reshape(len(distinct), len(texts)).log_softmax(-1)
            index = torch.tensor([row[tuple(context)] for context in contexts], device=logits.device)
            self._cached_logits = logits[index].reshape(self.batch_shape + (len(texts),))

        asked = [list(context) for context in distinct for _ in texts]
        return Pending(Request(law, asked, texts * len(distinct), self.options.shape[-1]), finish)

    def sample(self, sample_shape: Any = torch.Size(), temperature: Tensor | None = None) -> Tensor:
        """Draw options of shape ``sample_shape + batch_shape + (T,)``.

        :param temperature: an extra temperature to draw at, as in :class:`AutoregressiveText`.
        """
        with torch.no_grad():
            logits = self.logits.expand(torch.Size(sample_shape) + self.batch_shape + (-1,))
            if temperature is not None:
                logits = logits / temperature.to(logits.device).expand(logits.shape[:-1])[..., None]
            return self.options[torch.distributions.Categorical(logits=logits).sample()]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability in nats, of shape ``broadcast(value.shape[:-1], batch_shape)``.

        :raises ValueError: a text that is none of the options (−inf where validation is off).
        """
        value = check_text(value, "value", self.lm.vocabulary)
        index = option_index(value, self.options)
        if self._validate_args and bool((index < 0).any()):
            row = tuple((index < 0).nonzero()[0].tolist())
            raise ValueError(
                f"the text {self.lm.decode(value[row])!r} (row {row}) is none of the options "
                f"{self.lm.decode(self.options)}. Observe one of them, encoded by lm.encode."
            )
        logits = self.logits
        shape = torch.broadcast_shapes(index.shape, self.batch_shape)
        logits, index = logits.expand(shape + logits.shape[-1:]), index.expand(shape)
        chosen = logits.gather(-1, index.clamp(min=0)[..., None])[..., 0]
        return torch.where(index >= 0, chosen, torch.full_like(chosen, -torch.inf))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """The options: ``(n,) + batch_shape + (T,)``, or ones in place of the batch shape."""
        options = self.options.reshape((len(self.options),) + (1,) * len(self.batch_shape) + (-1,))
        return options.expand((-1, *self.batch_shape, -1)) if expand else options

    def __repr__(self) -> str:
        more = "" if self.adapter is None else f", adapter={self.adapter!r}"
        more += "" if self.given is None else f", probs={[round(p, 3) for p in self.given.exp().tolist()]}"
        more += "" if self.tilt is None else ", tilted"
        return f"Choice(batch_shape={tuple(self.batch_shape)}, options={self.lm.decode(self.options)}{more})"
