"""Guides that adapt the shared transformer: their parameters are those of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.distributions.parameter_store import register_module
from llmppl.guides.saved_guide import SavedGuide
from llmppl.guides.text_guide import program_name


class AdapterGuide(SavedGuide):
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
        self.adapter = adapter or self.lm.adapters.free_name(type(self).__name__)
        # forget the seeded state afterwards, unless the caller's generator is what seeds it
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            add(self.adapter)
        self.weights = nn.ParameterDict(
            {key.replace(".", "/"): p for key, p in self.lm.adapters.parameters(self.adapter).items()}
        )

    def own_adapters(self) -> tuple[str, ...]:
        return (self.adapter,)

    def became_a_copy(self, names: Mapping[str, str]) -> None:
        self.adapter = names.get(self.adapter, self.adapter)

    def distribution(self, name: str, prior: ConditionedText, context: Tensor) -> ConditionedText:
        return prior.with_context(context, self.adapter)

    def register(self) -> None:
        register_module(self.adapter, self.weights)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.lm.adapters.parameters(self.adapter))

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
