"""What the guides have in common whose proposals are the prior's own law under a learned twist."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmppl.distributions.parameter_store import register_module
from llmppl.distributions.twisted_text import Twist
from llmppl.guides.saved_guide import SavedGuide
from llmppl.guides.text_guide import Others, Prompt, _Proposer, program_name
from llmppl.language_model import LM
from llmppl.programs.structure import Program

_numbers = itertools.count()


class TwistedGuide(SavedGuide):
    """A guide whose only parameters are those of a twist.

    :param make: makes the twist, or several in a module; called under ``seed``.
    :param hidden: width of the hidden layers.
    :param seed: of the initial weights; drawn from torch's generator by default.

    Other parameters as in :class:`TextGuide`.
    """

    proposer: type[_Proposer]
    """Hands what the sites are told to the twist."""

    def __init__(
        self,
        model: Program,
        lm: LM,
        prompt: Mapping[str, Prompt] | None,
        others: Others | None,
        hidden: int,
        seed: int | None,
        make: Callable[[], nn.Module],
    ) -> None:
        super().__init__(model, lm, prompt, others)
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}.")
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            dtype = torch.promote_types(lm.dtype, torch.float32)
            self.twist: Any = make().to(device=lm.device, dtype=dtype)
        self._number = next(_numbers)

    def forward(self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Any]:
        self.register()
        given = self._draw_others(args, kwargs)
        return self._propose(self.proposer, given, args, kwargs, observations or {})

    def became_a_copy(self, names: Mapping[str, str]) -> None:
        self._number = next(_numbers)

    def register(self) -> None:
        register_module(f"{type(self).__name__}_{self._number}", self.twist)

    def reset_parameters(self) -> None:
        """Start anew, with other random numbers from torch's generator. Parameters of ``others`` stay."""
        for twist in self.twist.modules():
            if isinstance(twist, Twist):
                twist.reset_parameters()

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.twist.named_parameters())

    def _told_in_repr(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.twist.parameters())
        prompts = f", prompt for {sorted(self.prompt)}" if self.prompt else ""
        return (
            f"{type(self).__name__}({program_name(self.model)}, {self.lm.name.rsplit('/', 1)[-1]}, "
            f"{self._told_in_repr()}, {count:,} parameters{prompts})"
        )
