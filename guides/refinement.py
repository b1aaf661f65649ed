"""A guide that fills in latent texts step by step, looking at both sides."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmppl.checkpoint import load_adapter, save_adapter
from llmppl.distributions.conditioned import ConditionedText
from llmppl.distributions.masked import MaskedText
from llmppl.distributions.process import ProcessText
from llmppl.guides.base import Prompt, TextGuide, register_module
from llmppl.language_model import LM
from llmppl.masked_lm import MaskedLM, refuse_truncation
from llmppl.tracing import Program
from llmppl.unmasking import Plan


class RefinementGuide(TextGuide):
    r"""A masked-diffusion guide: the length of a latent text, then its tokens in any number of steps.

    By default a latent text is told its prior's own context and the observed texts before it on the left, and
    the observed texts behind it on the right. ``prompt={"middle": lambda beginning, ending: [beginning, ...,
    ending]}`` replaces it. Several latent texts are filled one after another, each told those before it by its
    prior's context. The law is that of :class:`~llmppl.distributions.MaskedText`.

    Train it by denoising first (:class:`~llmppl.objectives.Denoising`), then by
    ``TrajectoryBalance(behaviour=Behaviour(sleep=0.25))``; one training serves any number of steps::

        posterior = importance(story, guide.at(steps=2), num_samples=256)(beginning, ending)

    :param steps, tokens_per_step, order, num_orders: of a :class:`~llmppl.unmasking.Plan`; two tokens a step by
        default.
    :param network: a :class:`~llmppl.masked_lm.MaskedLM`; the language model's own transformer with an adapter
        by default.
    :param max_tokens: the longest latent text, of the default network; so are the next parameters.
    :param rank, alpha, target_modules, adapter, seed: as of :class:`AutoregressiveGuide`.

    Other parameters as in :class:`TextGuide`.
    """

    two_sided = True

    def __init__(
        self,
        model: Program,
        lm: LM,
        steps: int | None = None,
        order: str = "confidence",
        prompt: Mapping[str, Prompt] | None = None,
        others: Program | None = None,
        network: MaskedLM | None = None,
        tokens_per_step: int | Sequence[int] | None = None,
        num_orders: int = 1,
        max_tokens: int = 32,
        rank: int = 16,
        alpha: float | None = None,
        target_modules: list[str] | None = None,
        adapter: str | None = None,
        seed: int | None = None,
        **unknown: object,
    ) -> None:
        super().__init__(model, lm, prompt, others)
        refuse_truncation(unknown)
        if steps is None and tokens_per_step is None:
            tokens_per_step = 2
        self.plan = Plan(order, steps, tokens_per_step, num_orders)
        if network is None:
            network = MaskedLM.adapted(lm, max_tokens, rank, alpha, target_modules, adapter, seed)
        elif network.lm is not lm:
            raise ValueError("network= belongs to another language model. Make it with the lm of this guide.")
        self.network = network

    @property
    def exactness(self) -> str:  # type: ignore[override]
        return self.plan.exactness

    def at(
        self,
        steps: int | None = None,
        order: str | None = None,
        tokens_per_step: int | Sequence[int] | None = None,
        num_orders: int | None = None,
    ) -> RefinementGuide:
        """The same guide, with the same parameters, filling in another number of steps or another order."""
        other = copy.copy(self)
        if steps is not None or tokens_per_step is not None:
            other.plan = replace(other.plan, steps=steps, tokens_per_step=tokens_per_step)
        if order is not None:
            other.plan = replace(other.plan, order=order)
        if num_orders is not None:
            other.plan = replace(other.plan, num_orders=num_orders)
        return other

    def fill(self, name: str, prior: ConditionedText, left: Tensor, right: Tensor) -> ConditionedText:
        if not isinstance(prior, ProcessText):
            raise ValueError(
                f"site {name!r} is a {type(prior).__name__}, which is not filled token by token. Pass a guide for it "
                "as others=, or use AutoregressiveGuide."
            )
        return MaskedText(self.network, left, right, prior.law, self.plan, prior._validate_args)

    def register(self) -> None:
        register_module(self._name, self.network)

    @property
    def _name(self) -> str:
        return f"refinement_{self.network.adapter or id(self.network)}"

    def reset_parameters(self) -> None:
        """Start anew, with other random numbers from torch's generator. Parameters of ``others`` stay."""
        self.network.reset_parameters()

    def settings(self) -> dict[str, object]:
        """What a checkpoint must agree with, beside the model. Steps and order may differ."""
        return {"guide": type(self).__name__, **self.network.settings()}

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors, by name."""
        return {key.replace("/", "."): tensor for key, tensor in self.network.named_parameters()}

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write the network's trained tensors to a safetensors file, whole or not at all.

        :param dtype: ``torch.float16`` halves the file.
        """
        save_adapter(path, self.tensors(), self.lm.fingerprint(), self.settings(), dtype)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what :meth:`save` has written. Nothing changes if it does not fit.

        :raises FileNotFoundError: no such file.
        :raises ValueError: damaged, or of another model or network; names the difference.
        """
        loaded = load_adapter(path, self.tensors(), self.lm.fingerprint(), self.settings())
        with torch.no_grad():
            for key, tensor in self.tensors().items():
                tensor.copy_(loaded[key])

    def __repr__(self) -> str:
        plan = self.plan
        steps = f"steps={plan.steps}" if plan.steps else f"tokens_per_step={plan.tokens_per_step}"
        prompts = f", prompt for {sorted(self.prompt)}" if self.prompt else ""
        model = getattr(self.model, "__name__", type(self.model).__name__)
        return f"RefinementGuide({model}, {steps}, order={plan.order!r}, {self.network!r}{prompts})"
