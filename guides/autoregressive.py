"""Guides that write the latent text token by token."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llmppl.checkpoint import load_adapter, save_adapter
from llmppl.distributions.autoregressive import AutoregressiveText
from llmppl.distributions.conditioned import ConditionedText
from llmppl.guides.base import Prompt, TextGuide, register_module
from llmppl.language_model import LM
from llmppl.tracing import Program

_numbers = itertools.count()


class PromptGuide(TextGuide):
    """The language model itself, told the observations: zero-shot, nothing to train.

    The baseline that every report shows. Parameters as in :class:`TextGuide`.
    """

    def distribution(self, name: str, prior: ConditionedText, context: Tensor) -> ConditionedText:
        return prior.with_context(context, None)

    def __repr__(self) -> str:
        prompts = f", prompt for {sorted(self.prompt)}" if self.prompt else ""
        return f"{type(self).__name__}({_name(self.model)}, {self.lm!r}{prompts})"


class AutoregressiveGuide(TextGuide):
    r"""A LoRA-adapted language model: :math:`q(z|x) = \prod_t q(z_t \mid \text{prompt}, z_{<t})`.

    It shares the transformer with the prior: its adapter is on while the guide samples or scores,
    and off while the prior does. Untrained it equals :class:`PromptGuide`. The law of a text (stop
    tokens, lengths, temperature, vocabulary, grammar) is the prior's, so both have one support.

    :param rank: rank of the adapter's matrices (Hu et al. 2022, LoRA).
    :param alpha: their scale; ``2 * rank`` by default.
    :param target_modules: name endings of the layers to adapt; all linear layers but the head by default.
    :param adapter: name of the adapter on the model; made up by default.
    :param seed: of the adapter's initial weights; drawn from torch's generator by default.
    :param sampling_dtype: draw with a copy of the model in this precision, e.g. ``torch.bfloat16``. Weights
        of :func:`~llmppl.importance` use the log-probabilities recorded while drawing and stay exact.

    Other parameters as in :class:`TextGuide`.
    """

    def __init__(
        self,
        model: Program,
        lm: LM,
        prompt: Mapping[str, Prompt] | None = None,
        others: Program | None = None,
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
        self.adapter = adapter or f"{type(self).__name__}_{next(_numbers)}"
        # forget the seeded state afterwards, unless the caller's generator is what seeds it
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            lm.adapters.add(self.adapter, rank, self.alpha, target_modules)
        self.weights = nn.ParameterDict(
            {key.replace(".", "/"): p for key, p in lm.adapters.parameters(self.adapter).items()}
        )

    def distribution(self, name: str, prior: ConditionedText, context: Tensor) -> ConditionedText:
        fn = prior.with_context(context, self.adapter)
        if isinstance(fn, AutoregressiveText):
            fn.sampling_dtype = self.sampling_dtype
        return fn

    def register(self) -> None:
        register_module(self.adapter, self.weights)

    def reset_parameters(self) -> None:
        """Start anew, as the prompt guide, with other random numbers from torch's generator. Parameters of
        ``others`` stay."""
        self.lm.adapters.reset(self.adapter)

    def settings(self) -> dict[str, object]:
        """What a checkpoint must agree with, beside the model."""
        return {"guide": type(self).__name__, "rank": self.rank, "alpha": self.alpha}

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors, by name."""
        return dict(self.lm.adapters.parameters(self.adapter))

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write the adapter to a safetensors file, whole or not at all.

        :param dtype: ``torch.float16`` halves the file.
        """
        save_adapter(path, self.tensors(), self.lm.fingerprint(), self.settings(), dtype)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read an adapter written by :meth:`save`. Nothing changes if it does not fit.

        :raises FileNotFoundError: no such file.
        :raises ValueError: damaged, or of another model, guide or adapter shape; names the difference.
        """
        loaded = load_adapter(path, self.tensors(), self.lm.fingerprint(), self.settings())
        with torch.no_grad():
            for key, tensor in self.tensors().items():
                tensor.copy_(loaded[key])

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        prompts = f", prompt for {sorted(self.prompt)}" if self.prompt else ""
        return (
            f"{type(self).__name__}({_name(self.model)}, {self.lm.name.rsplit('/', 1)[-1]}, adapter={self.adapter!r}, "
            f"rank={self.rank}, {count / 1e6:.2f} M parameters{prompts})"
        )


def _name(model: Program) -> str:
    return getattr(model, "__name__", type(model).__name__)
