"""A guide that fills in latent texts step by step, looking at both sides."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import EllipsisType
from typing import Any

from torch import Tensor

from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.distributions.masked_text import MaskedText
from llmppl.distributions.process_text import ProcessText
from llmppl.distributions.refined_text import RefinedText, Refinement
from llmppl.guides.masked_guide import NetworkGuide, check_filled
from llmppl.guides.text_guide import Others, Prompt, _Proposer
from llmppl.language_model import LM
from llmppl.masked_lm import MaskedLM, refuse_truncation
from llmppl.network.unmasking import Plan, check_count
from llmppl.programs.structure import Program, Site
from llmppl.refinement.annealing import anneal, anneal_back
from llmppl.refinement.configurations import Configurations, frames_here
from llmppl.refinement.mixture import mix, mixture_of
from llmppl.text.declared import declared

REFINEMENTS = {"ais": "extended", "mixture": "conditional"}
"""What refined samples have an exact density given or beside."""


@dataclass(frozen=True)
class Refine:
    """How drawn texts are refined before they are returned.

    :param method: ``"ais"``, ``"mixture"``, or ``None``.
    :param temperatures: intermediate targets of ``"ais"``; 0 leaves the draws as they are.
    :param parents: of ``"mixture"``.
    :raises ValueError: naming the argument and the mend.
    """

    method: str | None = None
    temperatures: int = 8
    parents: int = 4

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in REFINEMENTS:
            raise ValueError(f"refine={self.method!r} is no refinement. Use one of {(None, *REFINEMENTS)}.")
        for name, least in (("temperatures", 0), ("parents", 1)):
            check_count(name, getattr(self, name), least)

    def __str__(self) -> str:
        count = f"temperatures={self.temperatures}" if self.method == "ais" else f"parents={self.parents}"
        return f"refine={self.method!r}, {count}"


class RefinementGuide(NetworkGuide):
    r"""A masked-diffusion guide: the length of a latent text, then its tokens in any number of steps.

    By default a latent text is told its prior's own context and the observed texts before it on the left, and
    the observed texts behind it on the right. ``prompt={"middle": lambda beginning, ending: [beginning, ...,
    ending]}`` replaces it. Several latent texts are filled one after another, each told those before it by its
    prior's context. The law is that of :class:`~llmppl.distributions.MaskedText`.

    Train it by denoising first (:class:`~llmppl.objectives.Denoising`), then by
    ``TrajectoryBalance(behaviour=Behaviour(sleep=0.25))``; one training serves any number of steps::

        posterior = importance(story, guide.at(steps=2), num_samples=256)(beginning, ending)

    With ``refine`` the samples are improved by the program's own joint, and their weights stay exact:

    - ``"ais"``: annealed importance sampling [1] from the guide to the posterior
      (:mod:`llmppl.refinement.annealing`). At ``temperatures`` inverse temperatures all texts are proposed anew by
      the guide, and then some tokens of one of them, each accepted by Metropolis-Hastings. The weight is one over the
      sample and its trajectory: exactness ``"extended"``. A temperature costs two looks of the program, a draw of
      the guide and two passes of its network.
    - ``"mixture"``: a mixture around ``parents`` draws [2] (:mod:`llmppl.refinement.mixture`), exact given them:
      ``"conditional"``. It costs a draw, a look of the program and one pass for each parent.

    All latent texts of an observation are refined together, and latents of ``others`` stay as they are. Of texts
    that the guide did not draw, as :func:`~llmppl.inference.bounds` has them, the trajectory is drawn backwards.
    Nothing is trained through a refinement: train with ``refine=None``, then ``guide.at(refine="ais")``.

    :param steps, tokens_per_step, order, num_orders: of a :class:`~llmppl.network.unmasking.Plan`; two tokens a step by
        default.
    :param refine, temperatures, parents: of a :class:`Refine`; no refinement by default.
    Other parameters as in :class:`NetworkGuide`. ``top_k`` and ``top_p`` are refused.

    References

    [1] Neal (2001), `Annealed importance sampling`.
    [2] Cappé, Guillin, Marin, Robert (2004), `Population Monte Carlo`.
    """

    scores_given = True

    @declared
    def __init__(
        self,
        model: Program,
        lm: LM,
        steps: int | None = None,
        order: str = "confidence",
        prompt: Mapping[str, Prompt] | None = None,
        others: Others | None = None,
        network: MaskedLM | None = None,
        tokens_per_step: int | Sequence[int] | None = None,
        num_orders: int = 1,
        max_tokens: int = 32,
        rank: int = 16,
        alpha: float | None = None,
        target_modules: list[str] | None = None,
        adapter: str | None = None,
        seed: int | None = None,
        refine: str | None = None,
        temperatures: int = 8,
        parents: int = 4,
        **unknown: object,
    ) -> None:
        super().__init__(model, lm, prompt, others, network, max_tokens, rank, alpha, target_modules, adapter, seed)
        refuse_truncation(unknown)
        self.refine = Refine(refine, temperatures, parents)
        if steps is None and tokens_per_step is None:
            tokens_per_step = 2
        self.plan = Plan(order, steps, tokens_per_step, num_orders)

    @property
    def exactness(self) -> str:  # type: ignore[override]
        return self.plan.exactness if self.refine.method is None else REFINEMENTS[self.refine.method]

    def at(
        self,
        steps: int | None = None,
        order: str | None = None,
        tokens_per_step: int | Sequence[int] | None = None,
        num_orders: int | None = None,
        refine: str | EllipsisType | None = ...,
        temperatures: int | None = None,
        parents: int | None = None,
    ) -> RefinementGuide:
        """The same guide, with the same parameters, filling in another number of steps or another order, or with
        another refinement; ``refine=None`` is none."""
        other = copy.copy(self)
        if steps is not None or tokens_per_step is not None:
            other.plan = replace(other.plan, steps=steps, tokens_per_step=tokens_per_step)
        if order is not None:
            other.plan = replace(other.plan, order=order)
        if num_orders is not None:
            other.plan = replace(other.plan, num_orders=num_orders)
        other.refine = Refine(
            self.refine.method if isinstance(refine, EllipsisType) else refine,
            self.refine.temperatures if temperatures is None else temperatures,
            self.refine.parents if parents is None else parents,
        )
        return other

    def forward(self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Any]:
        if self.refine.method is None:
            return super().forward(*args, observations=observations, **kwargs)
        self.register()
        given, told = self._draw_others(args, kwargs), observations or {}
        space = Configurations(
            lambda: self.model(*args, **kwargs),
            lambda: self._propose(_Proposer, given, args, kwargs, told),
            frames_here(),
            given,
            told,
        )
        return self._propose(partial(_Refining, self._refinement(space, given)), given, args, kwargs, told)

    def _refinement(self, space: Configurations, given: dict[str, Any]) -> Refinement:
        refine = self.refine
        trained = [t for t in (*self.network.parameters(), *given.values()) if getattr(t, "requires_grad", False)]
        if refine.method == "ais":
            draw, score = partial(anneal, space, refine.temperatures), partial(anneal_back, space, refine.temperatures)
        else:
            draw, score = partial(mix, space, refine.parents), partial(mixture_of, space, refine.parents)
        return Refinement(space.names, draw, score, space.laid_out, trained[0] if trained else None)

    def fill(self, name: str, prior: ConditionedText, left: Tensor, right: Tensor) -> ConditionedText:
        prior = check_filled(name, prior)
        return MaskedText(self.network, left, right, prior.law, self.plan, prior._validate_args)

    def _described(self) -> list[str]:
        plan = self.plan
        steps = f"steps={plan.steps}" if plan.steps else f"tokens_per_step={plan.tokens_per_step}"
        return [steps, f"order={plan.order!r}", *([str(self.refine)] if self.refine.method else [])]


class _Refining(_Proposer):
    """Puts refined texts in place of the priors of latent texts."""

    def __init__(self, refinement: Refinement, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.refinement = refinement

    def _proposal(self, name: str, prior: ConditionedText, msg: Site) -> ConditionedText:
        assert isinstance(prior, ProcessText)
        return RefinedText(prior, name, self.refinement)

    def _pyro_post_sample(self, msg: Site) -> None:
        super()._pyro_post_sample(msg)
        if msg["name"] in self.refinement.names:
            self.refinement.seen[msg["name"]] = msg["value"]
