"""The text that a masked-diffusion language model fills into a gap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmppl.distributions.conditioned_text import Memo, Pending
from llmppl.distributions.process_text import ProcessText
from llmppl.network.drawing import NotFiniteError, choose
from llmppl.network.scoring import check_length
from llmppl.network.text_law import TextLaw
from llmppl.network.text_tensors import check_text, lengths, widen
from llmppl.network.unmasking import GapNetwork, Plan, _parts, draw, log_probs_at, predictions, score, steps_of
from llmppl.text import PAD


@dataclass
class _Trajectories:
    """The last texts that a distribution has drawn or scored, and the steps in which they were filled in.

    Steps that follow from a rule hold for one state of the network; drawn ones always.
    """

    texts: Tensor | None = None  # (N, T)
    steps: Tensor | None = None  # (num_orders, N, T)
    shape: torch.Size = torch.Size()
    version: int = 0


class MaskedText(ProcessText):
    r"""The law of a gap's text under a :class:`~llmppl.masked_lm.MaskedLM`: its length, then its tokens.

    .. math:: q(z) = q(n)\, q(z \mid n, \sigma), \qquad \log q(z \mid n, \sigma) =
              \sum_t \sum_{i\in S_t} \log q_i(z_i \mid n, z_{S_1}, \dots, z_{S_{t-1}})

    given both sides of the gap, with the positions of each step decided before its tokens
    (:mod:`llmppl.network.unmasking`). It has the support of the autoregressive law of the same arguments: a stop token
    ends a text that has fewer than ``max_tokens`` tokens, and stands nowhere else.

    With ``order="random"`` log q is conditional on the order, which each text has of its own (with
    ``num_orders``, on the set of them). Of a text that was not drawn the order is drawn when it is scored, so
    that ``exp(log_prob)`` is an unbiased estimate of the marginal probability, and weights with it are exact.

    :param model: the network.
    :param left, right: the text before and behind the gap, ``batch_shape + (L,)``, padding in it is skipped.
    :param law: stop tokens, lengths, temperature, vocabulary.
    :param plan: order and number of steps.
    :raises ValueError: a law without ``max_tokens``, with more than the model's, or with a grammar.
    """

    def __init__(
        self,
        model: GapNetwork,
        left: Tensor,
        right: Tensor,
        law: TextLaw,
        plan: Plan,
        validate_args: bool | None = None,
    ) -> None:
        self.model, self.lm, self.adapter = model, model.lm, model.adapter
        self.context, self.right, self.law, self.plan = left, right, law, plan
        if law.max_tokens is None:
            raise ValueError("a gap has an end: pass max_tokens.")
        if law.max_tokens > model.max_tokens:
            raise ValueError(
                f"max_tokens={law.max_tokens} is outside the trained range: the network knows gaps of 1 to "
                f"{model.max_tokens} tokens. Lower it, or make the network with max_tokens={law.max_tokens}."
            )
        if law.grammar is not None:
            raise ValueError(
                "a grammar reads from left to right, and a gap is filled in parallel. Use an AutoregressiveGuide for "
                "this site, or leave grammar= out and state the condition by pyro.factor."
            )
        self._memo, self._drawn = Memo(), _Trajectories()
        shape = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
        check_length(
            torch.cat([left.expand(shape + left.shape[-1:]), right.expand(shape + right.shape[-1:])], -1),
            model.max_tokens + 1,
            self.lm.max_length,
        )
        super().__init__(shape, torch.Size([law.max_tokens]), validate_args=validate_args)

    @property
    def exactness(self) -> str:
        """``"marginal"``, or ``"conditional"`` on a random order."""
        return self.plan.exactness

    def with_context(self, context: Tensor, adapter: str | None) -> MaskedText:
        """The same law after another left side.

        :raises ValueError: another adapter, or another batch shape than the right side has.
        """
        if adapter != self.adapter:
            raise ValueError(
                f"a masked text has the adapter of its own network, {self.adapter!r}, and cannot be written from left "
                f"to right with {adapter!r}. Propose it by a RefinementGuide."
            )
        return MaskedText(self.model, context, self.right, self.law, self.plan, self._validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> MaskedText:
        shape = torch.Size(batch_shape)
        left, right = (side.expand(shape + side.shape[-1:]) for side in (self.context, self.right))
        expanded = MaskedText(self.model, left, right, self.law, self.plan, self._validate_args)
        # Shared: what one of them has drawn or scored, the other need not.
        expanded._memo, expanded._drawn, expanded.site = self._memo, self._drawn, self.site
        return expanded

    @property
    def _wants_gradient(self) -> bool:
        return self.model.wants_gradient

    @torch.no_grad()
    def sample_with_log_prob(
        self, sample_shape: Any = torch.Size(), temperature: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw texts, and their log-probabilities of shape ``sample_shape + batch_shape``, in nats."""
        shape = torch.Size(sample_shape) + self.batch_shape
        left, right = self._flat(shape)
        heat = None if temperature is None else temperature.to(left.device).expand(shape).reshape(-1)
        try:
            reading = self.model.read(left, right)
            of_length = self.model.length_log_probs(reading, self.law)
            count = choose(of_length) + 1
            texts, steps, scores = draw(self.model, self.law, self.plan, reading, count, heat)
            found = [scores, *(score(self.model, self.law, reading, texts, count, other) for other in steps[1:])]
        except NotFiniteError as error:
            raise ValueError(f"site {self.site!r}: {error}" if self.site else str(error)) from None
        scores = self._joined(found, of_length, count)
        self._keep(texts, steps, shape)
        value, scores = texts.reshape(shape + self.event_shape), scores.reshape(shape + self.event_shape)
        self.remember(value, scores)
        return value, scores.sum(-1)

    def token_log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each token when it was filled in, in nats, zero behind the end. The last token,
        which ends the text, has the length's log-probability besides.

        :returns: shape ``broadcast(value.shape[:-1], batch_shape) + (T,)``.
        """
        value = check_text(value, "value", self.law.vocabulary)
        flat, (left, right), shape = self._rows_of(value)
        if not self._memo.holds(value, shape, self.model.version(), self._wants_gradient):
            if self._validate_args:
                self._validate_text(value)
            with torch.set_grad_enabled(self._wants_gradient):
                scores = self._score(widen(flat, self.event_shape[0]), left, right, shape)
            self.remember(value, scores[:, : value.shape[-1]].reshape(shape + value.shape[-1:]))
        return self._memo.take(self._wants_gradient)

    def pending(self, value: Tensor) -> Pending | None:
        """Nothing: the network is not the causal one, and reads no shared prefixes."""
        return None

    def denoising_loss(self, value: Tensor, num_masks: int = 1) -> Tensor:
        r"""The denoising cross-entropy of texts, of shape ``broadcast(value.shape[:-1], batch_shape)``, in nats.

        .. math:: -\log q(n) + \mathbb E_{m, M}\Big[\frac nm \sum_{i \in M} -\log q_i(z_i \mid n, z_{\bar M})\Big]

        over ``m`` uniform from 1 to ``n`` and a random set ``M`` of ``m`` masks. Its expectation is that of
        :math:`-\log q(z)` over random orders of one token a step [1], at a fraction of the cost: it trains the
        network for every order and any number of steps.

        :param num_masks: random sets for each text, of different sizes.

        References

        [1] Ou et al. (2025), `Your absorbing discrete diffusion secretly models the conditional distributions of
        clean data`; Hoogeboom et al. (2022), `Autoregressive diffusion models`.
        """
        value = check_text(value, "value", self.law.vocabulary)
        flat, (left, right), shape = self._rows_of(value)
        flat = widen(flat, self.event_shape[0])
        if not bool(self.support.check(flat).all()):
            raise ValueError(f"a text lies outside the support {self.support}, and cannot be learned.")
        count = lengths(flat)
        reading = self.model.read(left, right)
        of_length = self.model.length_log_probs(reading, self.law)
        row = torch.arange(len(flat), device=flat.device).repeat(num_masks)
        texts, size = flat[row], count[row]
        # Sizes stratified over the sets of one text.
        part = torch.arange(num_masks, device=flat.device).repeat_interleave(len(flat))
        height = (part + torch.rand(len(row), device=flat.device)) / num_masks
        masks = (height * size).long().clamp(max=size - 1) + 1
        keys = torch.rand(texts.shape, device=flat.device).masked_fill(texts == PAD, 2.0)
        wanted = (keys.argsort(-1).argsort(-1) < masks[:, None]) & (texts != PAD)
        canvas = torch.where(wanted, self.model.mask, texts)
        found = log_probs_at(self.model, self.law, reading.of(row), canvas, size, wanted, texts).sum(-1)
        tokens = (found * size / masks).reshape(num_masks, -1).mean(0)
        return -(tokens + of_length.gather(-1, (count - 1)[:, None])[:, 0]).reshape(shape)

    def known_steps(self, value: Tensor) -> Tensor:
        """In which steps the texts that were drawn or scored last are filled in, ``(num_orders,)`` and their shape."""
        steps = self._drawn.steps
        if steps is None:
            raise ValueError("these texts were neither drawn nor scored here.")
        return steps.reshape((len(steps), *value.shape))

    def recall(self, value: Tensor, steps: Tensor) -> None:
        """Score texts of the full batch shape given these steps, as :meth:`known_steps` returns them, from now on."""
        self._drawn.texts = value.reshape(-1, value.shape[-1])
        self._drawn.steps = steps.reshape(len(steps), -1, value.shape[-1])
        self._memo.value = None

    @torch.no_grad()
    def refill(self, value: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw some tokens of texts anew in one pass, given the others and the length.

        :param value: texts of the full batch shape, and masks of that shape, true where tokens are drawn.
        :returns: the new texts; the log-probabilities of drawing their tokens and of drawing those of ``value``,
            ``value.shape[:-1]`` in nats.
        """
        flat, (left, right), shape = self._rows_of(value)
        wanted, count = masks.reshape(flat.shape) & (flat != PAD), lengths(flat)
        reading, canvas = self.model.read(left, right), torch.where(wanted, self.model.mask, flat)
        new = flat.clone()
        scores = torch.zeros((2, *flat.shape), dtype=torch.float64, device=flat.device)
        rows = wanted.any(-1).nonzero()[:, 0]
        for part in _parts(rows, flat.shape[-1], self.law.vocabulary, flat.shape[-1]) if len(rows) else ():
            row, column = wanted[part].nonzero(as_tuple=True)
            log_probs = predictions(self.model, self.law, reading.of(part), canvas[part], count[part], row, column)
            token, old = choose(log_probs), flat[part[row], column]
            new[part[row], column] = token
            for score_, picked in zip(scores, (token, old), strict=True):
                score_[part[row], column] = log_probs.gather(-1, picked[:, None])[:, 0].double()
        there, back = scores.sum(-1).reshape(2, *shape)
        return new.reshape(value.shape), there, back

    @torch.no_grad()
    def refill_log_prob(self, value: Tensor, masks: Tensor, new: Tensor) -> Tensor:
        """Log-probability that :meth:`refill` makes these new texts, ``value.shape[:-1]`` in nats."""
        flat, (left, right), shape = self._rows_of(value)
        wanted, texts = masks.reshape(flat.shape) & (flat != PAD), new.expand(value.shape).reshape(flat.shape)
        reachable = ((texts == flat) | (wanted & (texts != PAD))).all(-1)
        result = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
        rows = (reachable & wanted.any(-1)).nonzero()[:, 0]
        if len(rows):
            texts, wanted, count = texts[rows], wanted[rows], lengths(flat[rows])
            reading = self.model.read(left[rows], right[rows])
            canvas = torch.where(wanted, self.model.mask, texts)
            found = log_probs_at(self.model, self.law, reading, canvas, count, wanted, texts)
            result[rows] = found.sum(-1).double()
        return result.masked_fill(~reachable, -torch.inf).reshape(shape)

    def remember(self, value: Tensor, scores: Tensor) -> None:
        self._memo.value, self._memo.scores = value.clone(), scores
        self._memo.version = self.model.version()

    def _score(self, texts: Tensor, left: Tensor, right: Tensor, shape: torch.Size) -> Tensor:
        """Token scores ``(N, T)`` of texts ``(N, T)``, −inf outside the support."""
        inside = self.support.check(texts)
        result = torch.full(texts.shape, -torch.inf, dtype=self.model.length_head.weight.dtype, device=texts.device)
        rows = inside.nonzero()[:, 0]
        if not len(rows):
            return result
        kept, left, right = texts[rows], left[rows], right[rows]
        count = lengths(kept)
        reading = self.model.read(left, right)
        of_length = self.model.length_log_probs(reading, self.law)
        steps = self._steps(texts, rows, reading, kept, count, shape)
        found = [score(self.model, self.law, reading, kept, count, own) for own in steps]
        return result.index_put((rows,), self._joined(found, of_length, count))

    def _steps(
        self, texts: Tensor, rows: Tensor, reading: Any, kept: Tensor, count: Tensor, shape: torch.Size
    ) -> Tensor:
        """The steps of texts: as they were drawn, where they were."""
        known = self._drawn
        all_steps = torch.full((self.plan.num_orders, *texts.shape), -1, device=texts.device)
        missing = torch.ones(len(texts), dtype=torch.bool, device=texts.device)
        holds = known.shape == shape and (self.plan.order == "random" or known.version == self.model.version())
        if holds and known.texts is not None and known.steps is not None:
            same = (known.texts == texts).all(-1)
            all_steps[:, same] = known.steps[:, same]
            missing = ~same
        lacking = missing[rows].nonzero()[:, 0]
        if len(lacking):
            found = steps_of(self.model, self.law, self.plan, reading.of(lacking), kept[lacking], count[lacking])
            all_steps[:, rows[lacking]] = found
        self._keep(texts, all_steps, shape)
        return all_steps[:, rows]

    def _keep(self, texts: Tensor, steps: Tensor, shape: torch.Size) -> None:
        known = self._drawn
        known.texts, known.steps, known.shape, known.version = texts, steps, shape, self.model.version()

    def _joined(self, found: list[Tensor], of_length: Tensor, count: Tensor) -> Tensor:
        """Token scores given the orders: of one order its own; of several, those of the mean density."""
        scores = found[0]
        if len(found) > 1:
            stacked = torch.stack(found)  # (num_orders, N, T)
            totals = stacked.sum(-1)
            total = totals.logsumexp(0) - math.log(len(found))
            scores = (totals.softmax(0)[..., None] * stacked).sum(0)
            # What the mean density has beyond the mean of the logarithms belongs to no token: the last has it.
            of_length = of_length + (total - scores.sum(-1))[:, None]
        last = (count - 1)[:, None]
        return scores.scatter_add(-1, last, of_length.gather(-1, last).to(scores.dtype))

    def _rows_of(self, value: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], torch.Size]:
        flat, _, shape = self._broadcast(value)
        return flat, self._flat(shape), shape

    def _flat(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        left, right = (
            side.expand(shape + side.shape[-1:]).reshape(shape.numel(), side.shape[-1])
            for side in (self.context, self.right)
        )
        return left, right

    def __repr__(self) -> str:
        plan = self.plan
        parts = self._described()
        parts += [
            f"order={plan.order!r}",
            f"steps={plan.steps}" if plan.steps else f"tokens_per_step={plan.tokens_per_step or 1}",
        ]
        parts += [f"num_orders={plan.num_orders}"] if plan.num_orders > 1 else []
        return f"MaskedText({', '.join(parts)})"
