"""A guide's family: its parameters found, saved, put in place, started anew, and given back as they were."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from llmppl.programs.structure import Program, structure
from llmppl.training.minibatches import Data


class Family:
    """The members of a guide's family, for one observation: any values of the parameters that it meets in
    Pyro's store and, of a module, of its own.

    :param x: the program's arguments.
    """

    def __init__(self, guide: Program, x: tuple[Any, ...]) -> None:
        self.parameters = [p for p in _parameters(guide, x) if p.requires_grad]
        self._resets = _resets(guide, set(self.parameters))
        # A start without the statistics that a layer keeps would be another member.
        buffers = guide.buffers() if isinstance(guide, nn.Module) and self.parameters else ()
        self._tensors = [*self.parameters, *buffers]

    @property
    def starts_anew(self) -> bool:
        """Whether every parameter can be initialised again, by the ``reset_parameters()`` of its module."""
        return self._resets is not None

    def member(self) -> list[Tensor]:
        """The present member."""
        return [tensor.detach().clone() for tensor in self._tensors]

    def become(self, member: Sequence[Tensor]) -> None:
        """Put a member in place, with no gradient left from another."""
        with torch.no_grad():
            # Not through .data: drawing and scoring see by a tensor's version that it has changed.
            for tensor, value in zip(self._tensors, member, strict=True):
                tensor.copy_(value)
        for parameter in self.parameters:
            parameter.grad = None

    def start_anew(self) -> None:
        """Initialise every parameter again."""
        for reset in self._resets or ():
            reset()


@contextmanager
def left_as_it_was(model: Program, guide: Program, data: Data) -> Iterator[None]:
    """A block after which every parameter of program and guide, with its gradient, and Pyro's parameter
    store are as they were, however the block ends.

    Parameters that the program meets are frozen in it, also where the guide shares them: another value
    would be another posterior.
    """
    store = pyro.get_param_store()
    before = store.get_state()
    try:
        with store.scope(before.copy()), warnings.catch_warnings():
            # pyro.module says so of every frozen parameter.
            warnings.filterwarnings("ignore", message=".*was not registered in the param store")
            # Some guides make their parameters when they first run, and all of them must be known here.
            tensors = dict.fromkeys(p for x in data for program in (model, guide) for p in _parameters(program, x))
            tensors |= dict.fromkeys(p for _, p in store.named_parameters())
            tensors |= dict.fromkeys(guide.buffers() if isinstance(guide, nn.Module) else ())
            kept = [(tensor, tensor.detach().clone(), tensor.grad, tensor.requires_grad) for tensor in tensors]
            try:
                for parameter in {p for x in data for p in _parameters(model, x)}:
                    parameter.requires_grad_(False)
                for tensor in tensors:
                    tensor.grad = None
                yield
            finally:
                with torch.no_grad():
                    for tensor, value, grad, trained in kept:
                        if not torch.equal(tensor, value):
                            tensor.copy_(value)
                        tensor.requires_grad_(trained)
                        tensor.grad = grad
    finally:
        # Reading a parameter renews its link to the unconstrained one, which get_state() has cut.
        for name in before["params"]:
            _ = store[name]


def _parameters(program: Program, x: tuple[Any, ...]) -> dict[Tensor, None]:
    """What a program meets in Pyro's store, and a module's own trained parameters, in that order."""
    sites = structure(program, x, {}).nodes.values()
    found = {site["value"].unconstrained(): None for site in sites if site["type"] == "param"}
    if isinstance(program, nn.Module):
        found |= dict.fromkeys(p for p in program.parameters() if p.requires_grad)
    return found


def _resets(guide: Program, parameters: set[Tensor]) -> list[Callable[[], None]] | None:
    """What initialises all of these parameters again; ``None`` where some have nothing that does."""
    if not isinstance(guide, nn.Module):
        return None
    resets, covered = [], set[Tensor]()
    # Inner modules first: the outer one has the last word.
    for module in reversed(list(guide.modules())):
        own = set(module.parameters(recurse=False))
        for child in module.children():
            own |= set(child.parameters()) if isinstance(child, (nn.ParameterDict, nn.ParameterList)) else set()
        reset = getattr(module, "reset_parameters", None)
        # A frozen layer has been trained elsewhere, and stays.
        if own and own <= parameters and callable(reset):
            resets.append(reset)
            covered |= own
    return resets if covered == parameters else None
