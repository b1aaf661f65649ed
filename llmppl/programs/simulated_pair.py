"""What a program simulated: arguments, latents, and the observations that go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmppl.network.text_tensors import widen
from llmppl.programs.structure import Program, signature


class SimulatedPair(tuple[Any, ...]):
    """Argument tuple of a program, with latents and observations that were drawn from the program at it.

    Given the observations the latents are an exact draw from the posterior. Of the arguments only what is not observed
    counts.
    """

    latents: Mapping[str, Tensor]
    observations: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, args: Sequence[Any], latents: Mapping[str, Tensor], observations: Mapping[str, Tensor]
    ) -> SimulatedPair:
        pair = cls(args)
        pair.latents, pair.observations = latents, observations
        return pair


def stacked(values: Sequence[Tensor]) -> Tensor:
    """Values of one site as rows, ``(B, ...)``; texts are padded to one width."""
    if len({value.shape for value in values}) > 1:
        width = max(value.shape[-1] for value in values)
        values = [widen(value, width) for value in values]
    return torch.stack(list(values))


def with_pair(program: Program, pair: SimulatedPair) -> Program:
    """The program, which says what it simulated: objectives of the sleep phase take that and draw nothing."""

    def told(*args: Any, **kwargs: Any) -> Any:
        return program(*args, **kwargs)

    told.simulated_pair = pair  # type: ignore[attr-defined]
    told.__signature__ = signature(program)  # type: ignore[attr-defined]
    return told
