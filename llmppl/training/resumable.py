"""A run whose state is written to its folder, and put in place from there."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from llmppl.programs.random_states import random_state, set_random_state
from llmppl.programs.structure import Program
from llmppl.training.run_folder import RunFolder
from llmppl.training.run_identity import check_identity


class Resumable:
    """A run's checkpoints and metrics, or neither where it has no folder.

    :param parts: what has ``state_dict()`` and ``load_state_dict(state)``, by name.
    :param writes: whether this process keeps the folder; others read it.
    """

    def __init__(
        self,
        identity: dict[str, str],
        parameters: dict[str, Tensor],
        guide: Program,
        parts: dict[str, Any],
        folder: str | os.PathLike[str] | None,
        writes: bool = True,
    ) -> None:
        self.identity, self.parts, self.writes = identity, parts, writes
        self.folder = None if folder is None else RunFolder(folder)
        buffers = dict(guide.named_buffers()) if isinstance(guide, nn.Module) else {}
        self.tensors = {**parameters, **{f"buffer {name}": buffer for name, buffer in buffers.items()}}

    def open(self, resume: bool) -> int:
        """The step to go on from: 0, or that of the newest whole checkpoint, whose state is put in place."""
        if self.folder is None:
            return 0
        if self.writes:
            self.folder.claim()
        if not resume and self.folder.checkpoints():
            raise ValueError(
                f"{self.folder.path} holds the checkpoints of a run already. Pass resume=True to go on with it, or "
                "choose another folder."
            )
        state = self.folder.load() if resume else None
        if state is not None:
            check_identity(state["identity"], self.identity, f"the checkpoint in {self.folder.path}")
            with torch.no_grad():
                for name, tensor in self.tensors.items():
                    tensor.copy_(state["tensors"][name])
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
            set_random_state(state["random"])
        step = 0 if state is None else int(state["step"])
        if self.writes:
            self.folder.begin(step)
        return step

    def save(self, step: int) -> None:
        if self.folder is not None and self.writes:
            state = {
                "identity": self.identity,
                "step": step,
                "tensors": {name: tensor.detach() for name, tensor in self.tensors.items()},
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
                "random": random_state(),
            }
            self.folder.save(step, state)

    def last_good(self) -> str:
        """What is left of a run that has gone wrong."""
        kept = [] if self.folder is None else self.folder.checkpoints()
        if self.folder is None:
            return "The run has no folder=, and nothing of it is left."
        if not kept:
            return f"{self.folder.path} has no checkpoint yet."
        return f"The last good checkpoint is {kept[0]}."

    def record(self, event: str, step: int, values: dict[str, Any]) -> None:
        if self.folder is not None and self.writes:
            self.folder.record(event, step, values)

    def __enter__(self) -> Resumable:
        return self

    def __exit__(self, *error: object) -> None:
        if self.folder is not None and self.writes:
            self.folder.close()
