"""simulate(): latents and observations drawn from a program in large batches, as a set or as a stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from llmppl.network.random_states import randomness_kept
from llmppl.network.text_tensors import widen
from llmppl.programs.plates import in_data_plate
from llmppl.programs.simulated_pair import SimulatedPair
from llmppl.programs.simulation import check_simulable
from llmppl.programs.simulation import simulate as simulate_once
from llmppl.programs.structure import Program, is_deterministic, is_latent, is_observation, plate_nesting, structure
from llmppl.text.arguments import check_count, check_programs
from llmppl.text.declared import declared
from llmppl.training.collation import collate
from llmppl.training.minibatches import Rows, checked
from llmppl.training.simulated_set import FILE, SimulatedSet

Arguments = Rows | Callable[[int], Rows]


class SimulatedStream:
    """Simulated pairs without end, drawn while training in large batches: what is read once is not learned by heart.
    Made by :func:`simulate` without ``num_pairs``.

    As data of :func:`~llmppl.fit` every step has pairs that no step before it had. Pair ``n`` depends on the seed and
    on ``n`` alone, so that a resumed run reads what it would have read.

    Parameters as of :func:`simulate`.
    """

    @declared
    def __init__(self, program: Program, data: Arguments, batch_size: int = 128, seed: int = 0) -> None:
        self.program, self.data, self.batch_size, self.seed = program, data, batch_size, seed
        self.drawn = 0
        """Pairs that :meth:`draw` has returned."""
        self._blocks: dict[int, SimulatedSet] = {}

    def upcoming(self, count: int) -> list[SimulatedPair]:
        """The pairs that :meth:`draw` returns next."""
        last = (self.drawn + count - 1) // self.batch_size
        self._blocks = {
            n: self._blocks[n] if n in self._blocks else self._block(n)
            for n in range(self.drawn // self.batch_size, last + 1)
        }
        places = (divmod(n, self.batch_size) for n in range(self.drawn, self.drawn + count))
        return [self._blocks[block][place] for block, place in places]

    def draw(self, count: int) -> list[SimulatedPair]:
        """So many pairs that no call before has returned."""
        found = self.upcoming(count)
        self.drawn += count
        return found

    def _block(self, number: int) -> SimulatedSet:
        own = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        with torch.no_grad(), randomness_kept(own):
            rows = _arguments(self.program, self.data, self.batch_size, self.seed, number * self.batch_size)
            return _drawn(self.program, [rows])

    def described(self) -> list[tuple[Any, ...]]:
        """What makes two streams of one program the same."""
        known = [] if callable(self.data) else checked(self.data, program=self.program)
        return [("stream", self.batch_size, self.seed), *known]

    def __repr__(self) -> str:
        return f"SimulatedStream({self.drawn} pairs drawn, {self.batch_size} at a time, seed={self.seed})"


class FreshMinibatches:
    """Minibatches of a stream; as :class:`~llmppl.training.minibatches.Minibatches` of data."""

    def __init__(self, stream: SimulatedStream, batch_size: int) -> None:
        self.stream, self.batch_size = stream, batch_size

    def upcoming(self) -> list[SimulatedPair]:
        return self.stream.upcoming(self.batch_size)

    def draw(self) -> list[SimulatedPair]:
        return self.stream.draw(self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.stream.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.drawn = state["drawn"]


@overload
def simulate(
    program: Program,
    data: Arguments,
    num_pairs: int,
    batch_size: int = ...,
    seed: int = ...,
    folder: str | os.PathLike[str] | None = ...,
    progress: bool = ...,
) -> SimulatedSet: ...
@overload
def simulate(
    program: Program, data: Arguments, num_pairs: None = ..., batch_size: int = ..., seed: int = ...
) -> SimulatedStream: ...
@declared
def simulate(
    program: Program,
    data: Arguments,
    num_pairs: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SimulatedSet | SimulatedStream:
    """Draw latents and observations from a program, in large batches.

    Large, for texts that are drawn together cost less: on one core a pair of :func:`~llmppl.models.keyword` costs half
    as much in batches of 128 as in batches of 32. A guide of many parameters reads each pair once or twice: read more
    often, pairs are learned by heart. What is scarce is distinct arguments, not pairs of one.

    :param data: argument tuples of the program; each is used once before any is used again. Observed values among them
        say only what is observed, and of a stream how many tokens. Or a function that gives so many new ones, for
        programs that say themselves how their arguments come about.
    :param num_pairs: how many; by default a stream of fresh ones without end, which ``fit`` draws from as it goes.
    :param batch_size: pairs that are drawn together, in a plate over the arguments.
    :param seed: of all random numbers.
    :param folder: where the set is kept. One that is there already is read back instead of drawn, if it is of as many
        pairs, of the same arguments, seed and sites; that the program's laws are the same is not seen.
    :param progress: show a progress bar if it takes more than a few seconds.
    :raises ValueError: a program with a factor, without an observation or with a plate of its own; a damaged set, or
        another one, in the folder; a folder for a stream, which is not kept.
    """
    check_programs(program=program)
    check_count(batch_size=batch_size, **({} if num_pairs is None else {"num_pairs": num_pairs}))
    if num_pairs is None:
        if folder is not None:
            raise ValueError("a stream of fresh pairs is not kept in a folder. Say how many pairs: num_pairs=.")
        with torch.no_grad(), randomness_kept(seed):
            _check(program, _arguments(program, data, 1, seed)[0])
        return SimulatedStream(program, data, batch_size, seed)
    if folder is not None and (Path(folder) / FILE).exists():
        return _read_back(folder, program, data, num_pairs, seed)
    with (
        torch.no_grad(),
        randomness_kept(seed),
        tqdm(total=num_pairs, desc="simulate", disable=not progress, delay=5, leave=False) as bar,
    ):
        rows = _arguments(program, data, num_pairs, seed)
        _check(program, rows[0])
        parts = [rows[start : start + batch_size] for start in range(0, num_pairs, batch_size)]
        found = _drawn(program, parts, bar.update)
    found.seed = seed
    if folder is not None:
        found.save(folder)
    return found


def _read_back(
    folder: str | os.PathLike[str], program: Program, data: Arguments, num_pairs: int, seed: int
) -> SimulatedSet:
    """The set of a folder, if it is the one that would be drawn, as far as that shows.

    :raises ValueError: it is another one.
    """
    found = SimulatedSet.load(folder)
    wrong = ""
    if len(found) != num_pairs:
        wrong = f"of {len(found)} pairs, and num_pairs={num_pairs} are asked for"
    elif found.seed not in (None, seed):
        wrong = f"drawn with seed={found.seed}, and seed={seed} is asked for"
    elif not callable(data) and found.args != _arguments(program, data, num_pairs, seed):
        wrong = "of other arguments than those of data="
    else:
        sites = structure(program, found.args[0], {})
        names = {name for name, site in sites.nodes.items() if is_latent(site) or is_observation(site)}
        if names != {*found.latents, *found.observations}:
            wrong = f"of sites {sorted({*found.latents, *found.observations})}, and the program has {sorted(names)}"
    if wrong:
        raise ValueError(f"{folder} holds a simulated set {wrong}. Delete it, or choose another folder.")
    return found


def _check(program: Program, args: tuple[Any, ...]) -> None:
    """Refuse a program that cannot be simulated, or whose simulation says nothing.

    :raises ValueError: a factor; no observation; a plate of the program's own.
    """
    sites = structure(program, args, {})
    check_simulable(sites)
    if plate_nesting(sites):
        raise ValueError(
            "the program has a plate of its own, and simulated pairs are kept as one row an argument tuple. Make the "
            "plate's rows argument tuples, or a text or array of them one site."
        )
    if not any(s["type"] == "sample" and s["is_observed"] and not is_deterministic(s) for s in sites.nodes.values()):
        raise ValueError(
            "the program observes nothing, so there is nothing that a guide could be told. Give a site obs=."
        )


def _drawn(
    program: Program, parts: Sequence[list[tuple[Any, ...]]], told: Callable[[int], Any] = lambda count: None
) -> SimulatedSet:
    """Pairs of several batches of arguments.

    :param told: called with the number of pairs after each batch.
    """
    latents, seen = [], []
    for part in parts:
        drawn = simulate_once(in_data_plate(program), collate(part), {})
        latents.append(drawn[0])
        seen.append(drawn[1])
        told(len(part))
    counts = [len(part) for part in parts]
    rows = [args for part in parts for args in part]
    return SimulatedSet(rows, _joined(latents, counts), _joined(seen, counts))


def _arguments(program: Program, data: Arguments, count: int, seed: int, first: int = 0) -> list[tuple[Any, ...]]:
    """Arguments ``first`` to ``first + count`` of an endless order, which has all of them in each of its rounds."""
    if callable(data):
        return checked(data(count), "data", program)[:count]
    known = checked(data, program=program)
    orders: dict[int, np.ndarray] = {}
    rows = []
    for n in range(first, first + count):
        number, place = divmod(n, len(known))
        if number not in orders:
            orders[number] = np.random.default_rng([seed, number]).permutation(len(known))
        rows.append(known[orders[number][place]])
    return rows


def _joined(parts: Sequence[dict[str, Tensor]], counts: Sequence[int]) -> dict[str, Tensor]:
    """Values of several batches as rows; texts are padded to the longest."""
    found = {}
    for name in parts[0]:
        values = [part[name].expand(n, *part[name].shape[1:]) for part, n in zip(parts, counts, strict=True)]
        if values[0].dtype == torch.long and values[0].dim() > 1:
            values = [widen(value, max(value.shape[-1] for value in values)) for value in values]
        found[name] = torch.cat(values).cpu()
    return found
