"""Guides that fill gaps with a masked-diffusion network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.distributions.parameter_store import register_module
from llmppl.distributions.process_text import ProcessText
from llmppl.guides.saved_guide import SavedGuide
from llmppl.guides.text_guide import Others, Prompt, program_name
from llmppl.language_model import LM
from llmppl.masked_lm import MaskedLM
from llmppl.programs.structure import Program
from llmppl.text.declared import declared


class NetworkGuide(SavedGuide):
    """A guide whose parameters are a :class:`~llmppl.masked_lm.MaskedLM`'s, which is told both sides.

    :param network: the language model's own transformer with an adapter by default.
    :param max_tokens: the longest latent text, of the default network; so are the next parameters.
    :param rank, alpha, target_modules, adapter, seed: as of :class:`AutoregressiveGuide`.

    Other parameters as in :class:`TextGuide`.
    """

    two_sided = True

    @declared
    def __init__(
        self,
        model: Program,
        lm: LM,
        prompt: Mapping[str, Prompt] | None = None,
        others: Others | None = None,
        network: MaskedLM | None = None,
        max_tokens: int = 32,
        rank: int = 16,
        alpha: float | None = None,
        target_modules: list[str] | None = None,
        adapter: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, lm, prompt, others)
        if network is None:
            network = MaskedLM.adapted(lm, max_tokens, rank, alpha, target_modules, adapter, seed)
        elif network.lm is not lm:
            raise ValueError("network= belongs to another language model. Make it with the lm of this guide.")
        self.network = network

    def own_adapters(self) -> tuple[str, ...]:
        return () if self.network.adapter is None else (self.network.adapter,)

    def became_a_copy(self, names: Mapping[str, str]) -> None:
        self.network.rename(names)

    def register(self) -> None:
        register_module(self._name, self.network)

    @property
    def _name(self) -> str:
        return f"{type(self).__name__}_{self.network.adapter or id(self.network)}"

    def reset_parameters(self) -> None:
        """Start anew, with other random numbers from torch's generator. Parameters of ``others`` stay."""
        self.network.reset_parameters()

    def settings(self) -> dict[str, object]:
        return {**super().settings(), **self.network.settings()}

    def tensors(self) -> dict[str, Tensor]:
        return {key.replace("/", "."): tensor for key, tensor in self.network.named_parameters()}

    def _described(self) -> list[str]:
        """What a ``repr`` says of the guide, behind the program's name."""
        return []

    def __repr__(self) -> str:
        prompts = [f"prompt for {sorted(self.prompt)}"] if self.prompt else []
        parts = [program_name(self.model), *self._described(), repr(self.network), *prompts]
        return f"{type(self).__name__}({', '.join(parts)})"


def check_filled(name: str, prior: ConditionedText) -> ProcessText:
    """The prior of a site that is filled token by token.

    :raises ValueError: it is not.
    """
    if not isinstance(prior, ProcessText):
        raise ValueError(
            f"site {name!r} is a {type(prior).__name__}, which is not filled token by token. Pass a guide for it as "
            "others=, or use AutoregressiveGuide."
        )
    return prior
