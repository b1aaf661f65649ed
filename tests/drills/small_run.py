"""A training run of a few steps within this process, for drills that make thousands; and its files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import drill  # sets the environment, before torch starts
import pyro
import torch

from llmppl import fit, simulate
from llmppl.guides import AutoregressiveGuide
from llmppl.objectives import TrajectoryBalance
from llmppl.testing import tiny_lm

assert drill.ROOT
DATA = [("a", "b"), ("b", "c"), ("c", "ab")]
STEPS = 5

Ran = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""The guide's tensors, and a history."""


class SmallRun:
    """One guide, put back to its beginning before each run."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.lm = tiny_lm()
        lm = self.lm

        def program(beginning: Any, ending: Any) -> None:
            middle = pyro.sample("middle", lm(beginning, max_tokens=2, stop="."))
            pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

        self.program = program
        self.guide = AutoregressiveGuide(program, lm, rank=2, target_modules=["q_proj"], seed=0)
        self.beginning = self.tensors()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.guide.tensors().items()}

    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.guide.tensors().items():
                tensor.copy_(tensors[name])

    def train(self, folder: Path | None, steps: int = STEPS, **changes: Any) -> Ran:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.train_aloud(folder, steps, **changes)

    def train_aloud(self, folder: Path | None, steps: int = STEPS, **changes: Any) -> Ran:
        """With its warnings."""
        self.put(self.beginning)
        options = {"learning_rate": 1e-2, "seed": 0, "progress": False, "checkpoint_every": 2, "resume": True}
        options |= changes
        history = fit(self.program, self.guide, DATA, TrajectoryBalance(2), steps, folder=folder, **options)
        return self.tensors(), history.state_dict()

    def pairs(self, count: int = 6) -> Any:
        return simulate(self.program, DATA, count, progress=False)
