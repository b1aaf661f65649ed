"""Every combination of a program's latent values: how many there are, and in which order they are run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

LARGEST = 1_000_000
"""Most combinations of a program whose structure does not depend on sampled values."""

MOST_RUNS = 20_000
"""Most runs of a program whose structure does."""

Trace = TypeVar("Trace")


class StructureVaries(Exception):
    """The program cannot be enumerated in one piece, and why."""


class SiteReached(Exception):
    """A run has come to a latent site whose value is not fixed."""

    def __init__(self, site: dict[str, Any]) -> None:
        super().__init__()
        self.site = site


def check_latents(latent: Mapping[str, Any]) -> None:
    """Refuse a program with nothing to enumerate.

    :raises ValueError: always, where it has no latent site.
    """
    if not latent:
        raise ValueError("the model has no latent site to enumerate. Leave obs= out at one.")


def number_of_combinations(sizes: Mapping[str, int]) -> int:
    """Of all sites together.

    :raises ValueError: more than :data:`LARGEST`, with the sites' own numbers.
    """
    size = math.prod(sizes.values())
    if size > LARGEST:
        listed = ", ".join(f"{name}: {count:,}" for name, count in sizes.items())
        raise ValueError(
            f"the latent sites have {size:,} combinations ({listed}); at most {LARGEST:,} can be enumerated. "
            "Lower max_tokens, restrict allowed=, or use importance()."
        )
    return size


def check_sites(found: Sequence[str], expected: Sequence[str]) -> None:
    """Refuse latent sites that depend on sampled values.

    :raises StructureVaries: they differ.
    """
    if list(found) != list(expected):
        raise StructureVaries(f"its latent sites are {list(expected)} for some values, {list(found)} for others")


def support_varies(name: str) -> StructureVaries:
    """The values of a site depend on earlier ones."""
    return StructureVaries(f"the support of site {name!r} depends on earlier values")


def entries_of_a_plate(name: str, values: int, count: int) -> np.ndarray:
    """Which value each entry of a plate has, in every combination of its own: ``(values ** count, count)``.

    :raises ValueError: more than :data:`LARGEST` of them.
    """
    if values**count > LARGEST:
        raise ValueError(
            f"latent site {name!r} stands in a plate of {count} entries that does not contain every site: its "
            f"{values:,} values make {values:,}^{count} combinations, and at most {LARGEST:,} can be "
            "enumerated. Use importance()."
        )
    return np.array(list(itertools.product(range(values), repeat=count)), dtype=np.int64).reshape(-1, count)


def own_support(name: str, fn: Any, enumerates: bool) -> Any:
    """The values of one entry of a site, ``(n,) + event_shape``.

    :param enumerates: whether the distribution says that it does.
    :raises ValueError: it does not, or has too many values.
    """
    refusal = f"latent site {name!r} ({type(fn).__name__}) cannot be enumerated. Use importance(), or condition on it."
    if not enumerates:
        raise ValueError(refusal)
    try:
        values = fn.enumerate_support(expand=False)
    except ValueError as error:
        raise ValueError(f"latent site {name!r}: {error}") from None
    except NotImplementedError as error:
        raise ValueError(f"{refusal} ({error})") from None
    return values.reshape(tuple(values.shape[:1]) + tuple(fn.event_shape))


def plates_vary() -> ValueError:
    """A program whose plates depend on sampled values."""
    return ValueError(
        "the program's plates depend on sampled values, so that its rows are no fixed set of observations. "
        "Use importance()."
    )


def depth_first(
    run: Callable[[dict[str, Any]], Trace], support: Callable[[str, dict[str, Any]], Any], reason: str
) -> Iterator[Trace]:
    """A trace for each combination: with its first sites fixed the program says what comes next.

    :param run: the program at the values of its first sites; raises :class:`SiteReached` at the next one.
    :param support: every value of a site, by its name and the site itself.
    :param reason: why the program must be run for each combination.
    :raises ValueError: more than :data:`MOST_RUNS` runs.
    """
    waiting: list[dict[str, Any]] = [{}]
    runs = 0
    while waiting:
        values = waiting.pop()
        runs += 1
        if runs + len(waiting) > MOST_RUNS:
            raise ValueError(
                f"the program must be run for each combination of values, because {reason}; that takes more than "
                f"{MOST_RUNS:,} runs. Lower max_tokens, write the program so that it does the same for every value, "
                "or use importance()."
            )
        try:
            trace = run(values)
        except SiteReached as reached:
            name = reached.site["name"]
            choices = support(name, reached.site)
            waiting += [{**values, name: choices[n]} for n in range(len(choices) - 1, -1, -1)]
            continue
        yield trace
