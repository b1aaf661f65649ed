"""Guides that adapt the shared transformer: their parameters are those of an adapter."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmppl.checkpoint import load_adapter, save_adapter
from llmppl.distributions.conditioned import ConditionedText
from llmppl.guides.base import TextGuide, program_name, register_module

_numbers = itertools.count()


class AdapterGuide(TextGuide):
    """A guide whose proposals are the language model's own laws under an adapter.

    It shares the transformer with the prior: its adapter is on while the guide samples or scores,
    and off while the prior does. A subclass adds the adapter by :meth:`_adapt`.
    """

    adapter: str
    """The adapter's name on the model."""
    weights: nn.ParameterDict
    """The adapter's parameters."""

    def _adapt(self, adapter: str | None, seed: int | None, add: Callable[[str], object]) -> None:
        """Add the adapter to the model.

        :param adapter: its name; made up by default.
        :param seed: of its initial weights; drawn from torch's generator by default.
        :param add: adds an adapter of a name.
        """
        self.adapter = adapter or f"{type(self).__name__}_{next(_numbers)}"
        # forget the seeded state afterwards, unless the caller's generator is what seeds it
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            add(self.adapter)
        self.weights = nn.ParameterDict(
            {key.replace(".", "/"): p for key, p in self.lm.adapters.parameters(self.adapter).items()}
        )

    def distribution(self, name: str, prior: ConditionedText, context: Tensor) -> ConditionedText:
        return prior.with_context(context, self.adapter)

    def register(self) -> None:
        register_module(self.adapter, self.weights)

    def settings(self) -> dict[str, object]:
        """What a checkpoint must agree with, beside the model."""
        return {"guide": type(self).__name__}

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

    def _adaptation(self) -> str:
        """What the adapter is, for a ``repr``."""
        raise NotImplementedError

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        prompts = f", prompt for {sorted(self.prompt)}" if self.prompt else ""
        return (
            f"{type(self).__name__}({program_name(self.model)}, {self.lm.name.rsplit('/', 1)[-1]}, "
            f"adapter={self.adapter!r}, {self._adaptation()}, {_short(count)} parameters{prompts})"
        )


def _short(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 100_000 else f"{count:,}"
