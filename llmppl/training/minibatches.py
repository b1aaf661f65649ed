"""The order in which a run draws its data. The same for torch and JAX."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Data = Sequence[tuple[Any, ...]]
"""Argument tuples of a program."""

Rows = Data | Sequence[Mapping[str, Any]]
"""What users have: argument tuples, or arguments by name; also as a map-style dataset."""


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
        return self.ahead(1)

    def draw(self) -> list[tuple[Any, ...]]:
        batch = self.upcoming()
        self.queue = self.queue[self.batch_size :]
        return batch

    def ahead(self, count: int) -> list[tuple[Any, ...]]:
        """The tuples of the next ``count`` minibatches, which are none the later for it."""
        while len(self.queue) < count * self.batch_size:
            self.queue.extend(self.order.permutation(len(self.data)).tolist())
        return [self.data[n] for n in self.queue[: count * self.batch_size]]

    def state_dict(self) -> dict[str, Any]:
        # As text: the generator's state has whole numbers of 128 bits.
        return {"queue": list(self.queue), "order": json.dumps(self.order.bit_generator.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.queue = list(state["queue"])
        self.order.bit_generator.state = json.loads(state["order"])


def checked(data: Any, name: str = "data", program: Callable[..., Any] | None = None) -> list[tuple[Any, ...]]:
    """Data as a list of argument tuples.

    :param data: tuples, or mappings from the program's arguments by name to values, in a list or anything with a length
        and places: a ``Sequence``, a map-style ``Dataset`` of torch, a ``datasets.Dataset``.
    :param program: whose arguments a mapping names; columns that are none of its arguments are left out. Without it
        mappings stay mappings.
    :raises TypeError, ValueError: naming the item that is neither, or the argument that it lacks; no data; a
        ``DataLoader``, a table by columns, or something endless.
    """
    if type(data).__name__ == "DataLoader" and hasattr(data, "dataset"):
        raise TypeError(
            f"{name} is a DataLoader, and the training loop makes minibatches itself. Pass its dataset: "
            f"{name}={name}_loader.dataset, with batch_size=."
        )
    if isinstance(data, (str, bytes)):
        raise TypeError(f"{name} is a string. Pass a list of the program's argument tuples, e.g. [({data!r},)].")
    if isinstance(data, Mapping):
        raise TypeError(
            f"{name} is a mapping of columns {list(data)}. Pass rows: a list of tuples or of mappings, e.g. "
            "datasets.Dataset.from_dict(columns)."
        )
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        raise TypeError(f'{name} is a table. Pass its rows: {name}.to_dict("records").')
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise TypeError(f"{name} must be a list of the program's argument tuples, got {data!r}.")
    if getattr(data, "shape", None) == ():
        raise TypeError(f"{name} must be a list of the program's argument tuples, got one number.")
    places = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    rows = [data[n] for n in range(len(data))] if places else list(data)
    if not rows:
        raise ValueError(f"{name} is empty. Pass a list of the program's argument tuples.")
    names = None if program is None else _parameters(program)
    for n, item in enumerate(rows):
        if isinstance(item, Mapping):
            rows[n] = item if names is None else _arguments_of(item, names, f"{name}[{n}]")
        elif not isinstance(item, tuple):
            raise TypeError(
                f"{name}[{n}] is a {type(item).__name__}; it must be a tuple of the program's arguments, "
                f"e.g. ({item!r},), or a mapping of them by name."
            )
    return rows


def _parameters(program: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments that a program takes by their places."""
    known = inspect.signature(getattr(program, "forward", program)).parameters.values()
    return {p.name: p for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)}


def _arguments_of(row: Mapping[str, Any], names: Mapping[str, inspect.Parameter], where: str) -> tuple[Any, ...]:
    """A row's arguments in the program's order.

    :raises ValueError: an argument without default that the row lacks.
    """
    found: list[Any] = []
    last = max((n for n, name in enumerate(names) if name in row), default=-1)
    for n, (name, parameter) in enumerate(names.items()):
        if name in row:
            found.append(row[name])
        elif parameter.default is inspect.Parameter.empty:
            raise ValueError(
                f"{where} has {sorted(row)}, and not the program's argument {name!r}. Name the columns as the program "
                f"names its arguments: {list(names)}."
            )
        elif n < last:
            found.append(parameter.default)
    return tuple(found)
