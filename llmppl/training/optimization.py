"""What a run trains, by which optimizer and at which learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from llmppl.programs.structure import Program, structure

SCHEDULES = ("constant", "cosine")


def trained_parameters(model: Program, guide: Program, module: Program, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Every parameter that guide and model meet in Pyro's store, as SVI finds them, and the guide module's own.

    Found by a run that costs no forward pass of the language model. In order of first use: sums over a
    set would differ from one process to the next.

    :param module: the guide itself, whose parameters are named as ``named_parameters()`` names them;
        others keep their name in the store.
    :raises ValueError: there are none.
    """
    found: dict[Tensor, str] = {}
    for program in (guide, model):
        for name, site in structure(program, args, {}).nodes.items():
            if site["type"] == "param":
                found.setdefault(site["value"].unconstrained(), name)
    if isinstance(module, nn.Module):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad or parameter in found:
                found[parameter] = name
    if not found:
        raise ValueError(
            "nothing to train: neither model nor guide has parameters. PromptGuide has none; use AutoregressiveGuide."
        )
    priors: list[str] = []
    return {_steady(name, priors): parameter for parameter, name in found.items()}


def _steady(name: str, priors: list[str]) -> str:
    """A name in the store with the made-up name of an adapted prior as its number among those met: the same in every
    process, so that a checkpoint finds its parameters again."""
    match = re.match(r"prior_\d+(?=\$\$\$)", name)
    if match is None:
        return name
    if match[0] not in priors:
        priors.append(match[0])
    return f"prior {priors.index(match[0]) + 1}{name[match.end() :]}"


def of_program(parameters: Mapping[str, Tensor], model: Program, module: Program, args: tuple[Any, ...]) -> list[str]:
    """Which of the trained parameters are the program's and not the guide's, by name."""
    sites = structure(model, args, {}).nodes.values()
    met = {site["value"].unconstrained() for site in sites if site["type"] == "param"}
    if isinstance(module, nn.Module):
        met -= set(module.parameters())
    return [name for name, parameter in parameters.items() if parameter in met]


def make_optimizer(
    parameters: Mapping[str, Tensor],
    guide: Program,
    program: Sequence[str],
    learning_rate: float,
    head_rate: float,
    program_rate: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW, with learning rates of their own for the program's parameters and the head of a learned log-partition.

    :param program: names of the program's.
    """
    head = set(guide.head.parameters()) if hasattr(guide, "head") else set()
    learned = {parameters[name] for name in program}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters.values() if p not in head | learned], "lr": learning_rate},
        {"params": [p for p in parameters.values() if p in head], "lr": head_rate, "weight_decay": 0.0},
        {"params": [p for p in parameters.values() if p in learned], "lr": program_rate},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, weight_decay=weight_decay)


def make_scheduler(optimizer: torch.optim.Optimizer, schedule: str, warmup_steps: int, steps: int) -> LambdaLR:
    """Linear warm-up, then a constant rate or half a cosine that ends at zero after the last step."""

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(warmup_steps, 1))
        if schedule == "constant" or step < warmup_steps:
            return warm
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))

    return LambdaLR(optimizer, factor)
