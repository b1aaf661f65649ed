"""Guides that write the latent text token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from llmppl.numpyro.guides.adapter_guide import AdapterGuide
from llmppl.numpyro.guides.text_guide import Others, Prompt
from llmppl.numpyro.language_model import LM
from llmppl.numpyro.network import adapters
from llmppl.numpyro.network.decoder import Weights
from llmppl.numpyro.programs.tracing import Program
from llmppl.text.declared import declared


class AutoregressiveGuide(AdapterGuide):
    r"""A LoRA-adapted language model: :math:`q(z|x) = \prod_t q(z_t \mid \text{prompt}, z_{<t})`.

    It shares the weights of the prior's network. Untrained it equals :class:`PromptGuide`. The law of a text (stop
    tokens, lengths, temperature, vocabulary) is the prior's, so both have one support.

    Files of :meth:`save` are those of :class:`llmppl.guides.AutoregressiveGuide`, in both directions.

    :param rank: rank of the adapter's matrices (Hu et al. 2022, LoRA).
    :param alpha: their scale; ``2 * rank`` by default.
    :param target_modules: name endings of the Hugging Face layers to adapt; all linear layers but the head by default.
    :param adapter: the adapter's name, part of that of its ``numpyro.param`` site; made up by default.
    :param seed: of the adapter's initial weights; 0 by default.
    :raises ValueError: a rank below one; ``target_modules`` that are no layers.

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
    ) -> None:
        super().__init__(model, lm, prompt, others, adapter, seed)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}.")
        self.rank = rank
        self.alpha = float(2 * rank if alpha is None else alpha)
        self._targets = adapters.targets(lm.architecture, target_modules)
        self.weights = self._initial(jax.random.key(self._seed))

    def _initial(self, key: jax.Array) -> Weights:
        return adapters.initial(self.lm.weights, self._targets, self.rank, key, self._precision)

    def _lora(self) -> Weights:
        return adapters.scaled(self.weights, self.alpha / self.rank, self.lm.dtype)

    def tensors(self) -> dict[str, np.ndarray]:
        return adapters.to_tensors(self.weights, self.lm.architecture)

    def _load(self, tensors: Mapping[str, Any]) -> None:
        self.weights = adapters.from_tensors(tensors, self.weights, self.lm.architecture)

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "rank": self.rank, "alpha": self.alpha}

    def _adaptation(self) -> str:
        return f"rank={self.rank}"
