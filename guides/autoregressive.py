"""Guides that write the latent text token by token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.guides.adapter_guide import AdapterGuide
from llmppl.guides.text_guide import Others, Prompt, TextGuide, program_name
from llmppl.language_model import LM
from llmppl.programs.structure import Program
from llmppl.text.declared import declared


class PromptGuide(TextGuide):
    """The language model itself, told the observations: zero-shot, nothing to train.

    The baseline that every report shows. Of a model that learns, ``PromptGuide(program, lm.adapt(...))`` goes on with
    what it has learned. Parameters as in :class:`TextGuide`.
    """

    def distribution(self, name: str, prior: ConditionedText, context: Tensor) -> ConditionedText:
        return prior.with_context(context, self.lm.adapter)

    def __repr__(self) -> str:
        prompts = f", prompt for {sorted(self.prompt)}" if self.prompt else ""
        return f"{type(self).__name__}({program_name(self.model)}, {self.lm!r}{prompts})"


class AutoregressiveGuide(AdapterGuide):
    r"""A LoRA-adapted language model: :math:`q(z|x) = \prod_t q(z_t \mid \text{prompt}, z_{<t})`.

    It shares the transformer with the prior: its adapter is on while the guide samples or scores,
    and off while the prior does. Untrained it equals :class:`PromptGuide`. The law of a text (stop
    tokens, lengths, temperature, vocabulary, grammar) is the prior's, so both have one support.

    Of a model that learns, ``AutoregressiveGuide(program, lm.adapt(...))``, it starts with what that has learned: its
    adapter is a copy of the model's, whose rank, scale and layers count in place of those given here.

    :param rank: rank of the adapter's matrices (Hu et al. 2022, LoRA).
    :param alpha: their scale; ``2 * rank`` by default.
    :param target_modules: name endings of the layers to adapt; all linear layers but the head by default.
    :param adapter: name of the adapter on the model; made up by default.
    :param seed: of the adapter's initial weights; drawn from torch's generator by default.
    :param sampling_dtype: draw with a copy of the model in this precision, e.g. ``torch.bfloat16``. Weights
        of :func:`~llmppl.importance` use the log-probabilities recorded while drawing and stay exact.

    Other parameters as in :class:`TextGuide`.
    """

    @declared
    def __init__(
        self,
        model: Program,
        lm: LM,
        prompt: Mapping[str, Prompt] | None = None,
        others: Others | None = None,
        rank: int = 16,
        alpha: float | None = None,
        target_modules: list[str] | None = None,
        adapter: str | None = None,
        seed: int | None = None,
        sampling_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, lm, prompt, others)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}.")
        self.rank = rank
        self.alpha = float(2 * rank if alpha is None else alpha)
        self.sampling_dtype = sampling_dtype
        if lm.adapter is not None:
            self.rank, self.alpha, target_modules = lm.adapters.made(lm.adapter)
        self._adapt(adapter, seed, lambda name: lm.adapters.add(name, self.rank, self.alpha, target_modules))
        if lm.adapter is not None:
            AutoregressiveGuide.reset_parameters(self)

    def distribution(self, name: str, prior: ConditionedText, context: Tensor) -> ConditionedText:
        fn = super().distribution(name, prior, context)
        if isinstance(fn, AutoregressiveText):
            fn.sampling_dtype = self.sampling_dtype
        return fn

    def reset_parameters(self) -> None:
        """Start anew, as the prompt guide, with other random numbers from torch's generator. Parameters of
        ``others`` stay."""
        self.lm.adapters.reset(self.adapter)
        if self.lm.adapter is not None:
            self.lm.adapters.load(self.adapter, dict(self.lm.adapters.parameters(self.lm.adapter)))

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "rank": self.rank, "alpha": self.alpha}

    def _adaptation(self) -> str:
        return f"rank={self.rank}"
