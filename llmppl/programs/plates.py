"""Programs inside plates: of particles, and of observations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro import poutine
from pyro.poutine.runtime import _DIM_ALLOCATOR

from llmppl.programs.structure import Program, signature

PARTICLES = "_particles"
DATA = "_data"


def in_particles(program: Program, num_particles: int, nesting: int) -> Program:
    """The program inside an outermost plate of particles, left of all its own plates."""

    def vectorized(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(PARTICLES, num_particles, dim=-nesting - 1):
            return program(*args, **kwargs)

    return vectorized


def in_data_plate(program: Program) -> Program:
    """The program inside a plate over its arguments: lists, one entry an observation."""

    def rows(*args: Any, **kwargs: Any) -> Any:
        if not args or not hasattr(args[0], "__len__") or isinstance(args[0], str):
            raise TypeError(
                f"vectorize_data=True needs a list of observations for each argument, "
                f"got {args[0] if args else None!r}. Pass lists of one length, or leave vectorize_data out."
            )
        with pyro.plate(DATA, len(args[0]), dim=-1):
            return program(*args, **kwargs)

    if hasattr(program, "log_partition"):
        rows.log_partition = program.log_partition  # type: ignore[attr-defined]
    rows.exactness = getattr(program, "exactness", "marginal")  # type: ignore[attr-defined]
    rows.scores_given = getattr(program, "scores_given", False)  # type: ignore[attr-defined]
    rows.__wrapped__ = program  # type: ignore[attr-defined]
    # Prompts find arguments by the program's own names.
    rows.__signature__ = signature(program)  # type: ignore[attr-defined]
    return rows


@contextmanager
def outside_plates() -> Iterator[None]:
    """For a run of a program within a run of it, as prompts are told of: its plates are those of a run of its own, and
    may have the names of those in progress. What the handlers in progress would see is ``poutine.block``'s to say."""
    open_plates, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = open_plates


def open_plates() -> set[int]:
    """The dimensions of the plates that are open now, negative."""
    return {-1 - n for n, name in enumerate(_DIM_ALLOCATOR._stack) if name is not None}


def check_whole(trace: poutine.Trace, what: str) -> None:
    """Refuse a plate that takes some of its rows, others at every run, where a run must be of the rows of another.

    :raises ValueError: naming the plate.
    """
    for site in trace.nodes.values():
        for frame in site.get("cond_indep_stack", ()):
            if frame.full_size not in (None, frame.size):
                raise ValueError(
                    f"plate {frame.name!r} takes {frame.size} of {frame.full_size} rows, others at every run, and "
                    f"{what} needs to know which. Give the program the rows as arguments: fit(..., batch_size=)."
                )


def has_data_plate(trace: poutine.Trace) -> bool:
    """Whether the program runs inside the plate over its arguments."""
    return any(
        frame.name == DATA
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
    )
