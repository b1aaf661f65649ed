"""The processes that train one guide together, each on its own minibatches of a step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import pyro
import torch
from torch import Tensor, distributed

from llmppl.training.simulated_stream import SimulatedStream


class Processes:
    """The group that ``torch.distributed`` has started; a single process where it has not.

    In a group a step has ``accumulate`` minibatches *a process*. They are drawn in one order, and minibatch ``n`` is
    that of process ``n mod size``. Each has random numbers of its own, by seed, step and ``n``: so that the steps do
    not depend on how many processes share them.

    :param seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.grouped = distributed.is_available() and distributed.is_initialized()
        self.size = distributed.get_world_size() if self.grouped else 1
        self.rank = distributed.get_rank() if self.grouped else 0
        self.seed = int(self._first(seed))

    @property
    def writes(self) -> bool:
        """Whether this process keeps the run's folder and shows the progress bar."""
        return self.rank == 0

    def check(self, objective: Any, data: Any) -> None:
        """Refuse what several processes cannot share.

        :raises ValueError: naming the argument and the mend.
        """
        if self.size == 1:
            return
        if isinstance(data, SimulatedStream):
            raise ValueError(
                f"data= is a stream of simulated pairs, which {self.size} processes would each draw whole. Draw a set "
                "once, simulate(program, data, num_pairs=...), save it, and train all on it."
            )
        if getattr(getattr(objective, "behaviour", None), "buffer", None) is not None:
            raise ValueError(
                f"the objective has a replay buffer, and each of {self.size} processes would fill another. Leave "
                "replayed= out, or train in one process."
            )

    def same_start(self, parameters: Iterable[Tensor]) -> None:
        """Give every process the first one's parameters."""
        if self.size > 1:
            for parameter in parameters:
                distributed.broadcast(parameter.data, 0)

    def own(self, count: int) -> Iterator[tuple[int, bool]]:
        """The minibatches of a step, and whether each is this process's."""
        for n in range(count * self.size):
            yield n, n % self.size == self.rank

    def seed_minibatch(self, step: int, minibatch: int) -> None:
        """Start the random numbers of one minibatch; a process that is in no group goes on with its own."""
        if self.grouped:
            key = f"{self.seed} {step} {minibatch}".encode()
            pyro.set_rng_seed(int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big"))

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add the gradients of all processes up; a parameter that none has one of keeps none."""
        if self.size == 1:
            return
        own = list(parameters)
        has = torch.tensor([float(p.grad is not None) for p in own])
        distributed.all_reduce(has)
        some = [p for p, count in zip(own, has.tolist(), strict=True) if count]
        for parameter in some:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if some:
            # One message for all: an adapter has hundreds of small matrices.
            flat = torch.cat([p.grad.reshape(-1) for p in some])  # type: ignore[union-attr]
            distributed.all_reduce(flat)
            for parameter, part in zip(some, flat.split([p.numel() for p in some]), strict=True):
                parameter.grad = part.view_as(parameter).clone()

    def gathered(self, own: list[tuple[int, Any]]) -> list[Any]:
        """What all processes have of a step's minibatches, in their order."""
        if self.size > 1:
            parts: list[Any] = [None] * self.size
            distributed.all_gather_object(parts, own)
            own = [item for part in parts for item in part]
        return [value for _, value in sorted(own, key=lambda item: item[0])]

    def _first(self, value: Any) -> Any:
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, 0)
        return box[0]
