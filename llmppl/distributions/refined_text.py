"""Texts that were drawn together and then refined, as the distribution of each site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmppl.distributions.conditioned_text import Pending
from llmppl.distributions.process_text import ProcessText
from llmppl.network.text_tensors import check_text

Values = dict[str, Tensor]


class Refinement:
    """What the sites of one run of a guide share: the refined configuration, and its log-density.

    :param names: of the sites, in order.
    :param draw: draws all texts, and their log-density, of the shape of the units in nats.
    :param score: the log-density of texts that were not drawn here.
    :param lay_out: puts a log-density of the units at one text of each, zero at the others.
    :param anchor: a parameter of the guide, through which training would go.
    """

    def __init__(
        self,
        names: list[str],
        draw: Callable[[], tuple[Values, Tensor]],
        score: Callable[[Values], Tensor],
        lay_out: Callable[[Tensor, torch.Size], Tensor],
        anchor: Tensor | None,
    ) -> None:
        self.names, self._draw, self._score, self.lay_out, self.anchor = names, draw, score, lay_out, anchor
        self.seen: Values = {}
        """The sites' values, as they came to be."""
        self._drawn: tuple[Values, Tensor] | None = None
        self._scored: tuple[Values, Tensor] | None = None

    def value(self, name: str, shape: torch.Size) -> Tensor:
        """The refined text of a site, of the site's shape.

        :raises ValueError: others were given beforehand.
        """
        if self._drawn is None:
            if self.seen:
                raise ValueError(
                    f"site {name!r} is drawn while {sorted(self.seen)} were given: a refined guide draws all latent "
                    "texts together. Give all of them or none, or use refine=None."
                )
            self._drawn = self._draw()
        values = self._drawn[0]
        values[name] = values[name].reshape(shape)
        return values[name]

    def log_density(self, name: str, value: Tensor) -> Tensor:
        """Of all texts together, where the last one is ``value``."""
        values = {**self.seen, name: value}
        if self._drawn is not None:
            kept = [name for name in self.names if torch.equal(values[name], self._drawn[0][name])]
            if len(kept) == len(self.names):
                return self._drawn[1]
            replaced = sorted(set(self.names) - set(kept))
            raise ValueError(
                f"the texts of {replaced} were drawn and then replaced, so that the refined density is not theirs. "
                "Give all latent texts beforehand (as by poutine.replay), or use refine=None."
            )
        if self._scored is None or any(not torch.equal(v, self._scored[0][n]) for n, v in values.items()):
            # Kept: scored a second time a text would have another trajectory.
            self._scored = (values, self._score(values))
        return self._scored[1]


class RefinedText(ProcessText):
    r"""The text of a site in a configuration that was drawn by a guide as a whole, and refined.

    The last site of the program has :math:`\log q(z, \tau) - \log r(\tau \mid z)` of all texts ``z`` and their
    trajectory ``τ``; of the others the log-probability is zero. Of texts that were not drawn, all of which must
    be given, ``τ`` is drawn from ``r`` when they are scored.

    :param prior: the program's distribution at this site, whose law this one has.
    :param name: of the site.
    :param refinement: what the sites have together.
    """

    has_enumerate_support = False

    def __init__(
        self, prior: ProcessText, name: str, refinement: Refinement, batch_shape: torch.Size | None = None
    ) -> None:
        self.prior, self.name, self.refinement = prior, name, refinement
        self.lm, self.context, self.law, self.adapter = prior.lm, prior.context, prior.law, None
        super().__init__(
            prior.batch_shape if batch_shape is None else batch_shape, prior.event_shape, validate_args=False
        )

    def expand(self, batch_shape: Any, _instance: object = None) -> RefinedText:
        expanded = RefinedText(self.prior, self.name, self.refinement, torch.Size(batch_shape))
        expanded.site = self.site
        return expanded

    def sample(self, sample_shape: Any = torch.Size(), temperature: Tensor | None = None) -> Tensor:
        """The refined text, of shape ``batch_shape + (max_tokens,)``.

        :raises ValueError: asked for several at once, or for tempered ones: all sites are drawn together, once.
        """
        if temperature is not None:
            raise ValueError("a refined text is not drawn at other temperatures. Train and temper with refine=None.")
        if len(torch.Size(sample_shape)):
            raise ValueError(
                "a refined text is drawn once, with its program. Use num_samples= or a plate for more, or refine=None."
            )
        return self.refinement.value(self.name, self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats of all texts together at the last site, at one text of each observation; zero elsewhere.

        :raises ValueError: a text that was replaced after it was drawn.
        """
        value = check_text(value, "value", self.law.vocabulary)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value, last = value.expand(shape + value.shape[-1:]), self.name == self.refinement.names[-1]
        if not last:
            result = torch.zeros(shape, dtype=torch.float64, device=value.device)
        else:
            result = self.refinement.lay_out(self.refinement.log_density(self.name, value), shape)
        anchor = self.refinement.anchor
        if torch.is_grad_enabled() and anchor is not None and anchor.requires_grad:
            return _Untrained.apply(result, anchor)
        return result

    def token_log_prob(self, value: Tensor) -> Tensor:
        """The log-density at the last token, for it belongs to none; zero at the others."""
        scores = torch.zeros(value.shape, dtype=torch.float64, device=value.device)
        scores[..., -1] = self.log_prob(value)
        return scores

    def with_context(self, context: Tensor, adapter: str | None) -> RefinedText:
        raise ValueError("a refined text belongs to its configuration, and has no other context. Use refine=None.")

    def pending(self, value: Tensor) -> Pending | None:
        """Nothing: it is scored as a whole."""
        return None

    def __repr__(self) -> str:
        return f"RefinedText({', '.join(self._described())})"


class _Untrained(torch.autograd.Function):
    """The identity, without a gradient: one that ignores the refinement would train another guide."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, anchor: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ValueError(
            "a refined guide is not trained through its refinement. Train it with refine=None, and refine when "
            "sampling: importance(model, guide.at(refine='ais'))."
        )
