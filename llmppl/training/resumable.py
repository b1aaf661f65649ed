"""A run whose state is written to its folder, and put in place from there."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from llmppl.network.random_states import random_state, set_random_state
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
        try:
            return self._found(self.folder, resume)
        except BaseException:
            # Not held by what a notebook keeps of an error.
            self.folder.close()
            raise

    def _found(self, folder: RunFolder, resume: bool) -> int:
        if not resume and folder.checkpoints():
            raise ValueError(
                f"{folder.path} holds the checkpoints of a run already. Pass resume=True to go on with it, or "
                "choose another folder."
            )
        state = folder.load() if resume else None
        if state is not None:
            check_identity(state["identity"], self.identity, f"the checkpoint in {folder.path}")
            try:
                self._put_back(state)
            # Of a file whose hash and identity are right, and its contents not: nobody but a person makes one.
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"the checkpoint in {folder.path} was not written by fit: its state does not fit this run "
                    f"({type(error).__name__}: {error}). Start again in another folder, with a new guide."
                ) from error
        step = 0 if state is None else int(state["step"])
        if self.writes:
            folder.begin(step)
        return step

    def _put_back(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                stored = state["tensors"][name]
                if stored.shape != tensor.shape:  # copied, it would be broadcast
                    raise ValueError(f"{name!r} has shape {tuple(stored.shape)}, not {tuple(tensor.shape)}")
                tensor.copy_(stored)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        set_random_state(state["random"])
        if not isinstance(state["step"], int) or state["step"] < 0:
            raise ValueError(f"its step is {state['step']!r}")

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

    def stopped(self, step: int) -> str:
        """What is left of a run that was told to stop."""
        if self.folder is None:
            return f"stopped after step {step}"
        if not self.folder.checkpoints():
            return f"stopped after step {step}; {self.folder.path} has no checkpoint yet, and resume=True starts anew"
        return f"stopped after step {step}; resume=True goes on from there, in {self.folder.path}"

    def record(self, event: str, step: int, values: dict[str, Any]) -> None:
        if self.folder is not None and self.writes:
            self.folder.record(event, step, values)

    def __enter__(self) -> Resumable:
        return self

    def __exit__(self, *error: object) -> None:
        if self.folder is not None and self.writes:
            self.folder.close()
