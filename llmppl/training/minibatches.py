"""The order in which a run draws its data. The same for torch and JAX."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

Data = Sequence[tuple[Any, ...]]


class Minibatches:
    """Minibatches of data; each tuple is drawn once before any is drawn again.

    It has its own generator: the order of the data does not depend on how much the objective draws.

    :param batch_size: tuples a minibatch; at most all of them.
    """

    def __init__(self, data: Data, batch_size: int, seed: int) -> None:
        self.data, self.batch_size = list(data), min(batch_size, len(data))
        self.order = np.random.default_rng(seed)
        self.queue = list[int]()

    def upcoming(self) -> list[tuple[Any, ...]]:
        """The minibatch that :meth:`draw` returns next."""
        while len(self.queue) < self.batch_size:
            self.queue.extend(self.order.permutation(len(self.data)).tolist())
        return [self.data[n] for n in self.queue[: self.batch_size]]

    def draw(self) -> list[tuple[Any, ...]]:
        batch = self.upcoming()
        self.queue = self.queue[self.batch_size :]
        return batch

    def state_dict(self) -> dict[str, Any]:
        # As text: the generator's state has whole numbers of 128 bits.
        return {"queue": list(self.queue), "order": json.dumps(self.order.bit_generator.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.queue = list(state["queue"])
        self.order.bit_generator.state = json.loads(state["order"])


def checked(data: Data, name: str = "data") -> list[tuple[Any, ...]]:
    """Data as a list.

    :raises TypeError, ValueError: naming the item that is no tuple; no data.
    """
    data = list(data)
    if not data:
        raise ValueError(f"{name} is empty. Pass a list of the program's argument tuples.")
    for n, item in enumerate(data):
        if not isinstance(item, tuple):
            raise TypeError(
                f"{name}[{n}] is a {type(item).__name__}; it must be a tuple of the program's arguments, "
                f"e.g. ({item!r},)."
            )
    return data
