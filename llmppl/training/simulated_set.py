"""simulate(): a training set of simulated latents and observations, drawn in large batches, saved and read back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from llmppl.files.guide_file import written_whole
from llmppl.network.text_tensors import widen
from llmppl.programs.plates import in_data_plate
from llmppl.programs.random_states import randomness_kept
from llmppl.programs.simulated_pair import SimulatedPair
from llmppl.programs.simulation import check_simulable
from llmppl.programs.simulation import simulate as simulate_once
from llmppl.programs.structure import Program, is_deterministic, structure
from llmppl.training.collation import collate
from llmppl.training.minibatches import Data, checked

FORMAT = "llmppl-simulated-1"
FILE = "pairs.safetensors"


class SimulatedSet(Sequence[SimulatedPair]):
    """Pairs of latents and observations that a program simulated, each an argument tuple of the program.

    As data of :func:`~llmppl.fit` forward-KL objectives (``WakeSleep(insomnia=0)``) learn from these pairs, and others
    from their observations; as ``pairs=`` of :class:`~llmppl.Evaluation` they measure the held-out gain. Slices are
    sets, too.

    :param args: the arguments of each pair.
    :param latents, observations: by site, ``(N, ...)``; texts padded to one width.
    """

    def __init__(
        self, args: Sequence[tuple[Any, ...]], latents: dict[str, Tensor], observations: dict[str, Tensor]
    ) -> None:
        self.args, self.latents, self.observations = list(args), latents, observations

    def __len__(self) -> int:
        return len(self.args)

    @overload
    def __getitem__(self, index: int) -> SimulatedPair: ...
    @overload
    def __getitem__(self, index: slice) -> SimulatedSet: ...
    def __getitem__(self, index: int | slice) -> SimulatedPair | SimulatedSet:
        parts = [{name: value[index] for name, value in group.items()} for group in (self.latents, self.observations)]
        if isinstance(index, slice):
            return SimulatedSet(self.args[index], *parts)
        return SimulatedPair.of(self.args[index], *parts)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the set to a folder, whole or not at all: one safetensors file.

        :raises TypeError: arguments other than strings and numbers, which a file cannot hold.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        for n, row in enumerate(self.args):
            if not all(isinstance(value, (str, int, float)) for value in row):
                raise TypeError(f"pair {n} has arguments {row!r}; only strings and numbers can be saved.")
        tensors = {f"latent {name}": value.contiguous() for name, value in self.latents.items()}
        tensors |= {f"observed {name}": value.contiguous() for name, value in self.observations.items()}
        written_whole(path / FILE, tensors, {"format": FORMAT, "args": json.dumps(self.args)}, save_file)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SimulatedSet:
        """Read what :meth:`save` has written.

        :raises FileNotFoundError: no such set.
        :raises ValueError: a damaged one; nothing of it is read.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"no simulated set in {folder}. Draw one: simulate(program, data, n, folder=...).")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            args = [tuple(row) for row in json.loads(metadata["args"])]
            if metadata["format"] != FORMAT or any(len(value) != len(args) for value in tensors.values()):
                raise ValueError("another format, or rows are missing")
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged or no simulated set ({error}). Delete it and simulate again; nothing else depends "
                "on it."
            ) from None
        parts: dict[str, dict[str, Tensor]] = {"latent": {}, "observed": {}}
        for name, value in tensors.items():
            kind, site = name.split(" ", 1)
            parts[kind][site] = value
        return cls(args, parts["latent"], parts["observed"])

    def __repr__(self) -> str:
        sites = ", ".join([*self.latents, *(f"{name} observed" for name in self.observations)])
        return f"SimulatedSet({len(self)} pairs of {sites})"


def simulate(
    program: Program,
    data: Data | Callable[[int], Data],
    num_pairs: int,
    batch_size: int = 128,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SimulatedSet:
    """Draw latents and observations from a program, in large batches.

    Large, for texts that are drawn together cost less: on one core a pair of :func:`~llmppl.models.keyword` costs half
    as much in batches of 128 as in batches of 32. A guide of many parameters reads each pair once or twice: read more
    often, pairs are learned by heart. What is scarce is distinct arguments, not pairs of one.

    :param data: argument tuples of the program; each is used once before any is used again. Observed values among them
        say only what is observed, and of a stream how many tokens. Or a function that gives so many new ones, for
        programs that say themselves how their arguments come about.
    :param num_pairs: how many.
    :param batch_size: pairs that are drawn together, in a plate over the arguments.
    :param seed: of all random numbers.
    :param folder: where the set is kept. One that is there already is read back instead of drawn, if it has as many
        pairs.
    :param progress: show a progress bar if it takes more than a few seconds.
    :raises ValueError: a program with a factor or without an observation; a damaged set, or one of another number, in
        the folder.
    """
    for name, number in (("num_pairs", num_pairs), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    if folder is not None and (Path(folder) / FILE).exists():
        found = SimulatedSet.load(folder)
        if len(found) != num_pairs:
            raise ValueError(
                f"{folder} holds a simulated set of {len(found)} pairs, and num_pairs={num_pairs} are asked for. "
                "Delete it, or choose another folder."
            )
        return found
    order = np.random.default_rng(seed)
    drawn: list[tuple[list[tuple[Any, ...]], dict[str, Tensor], dict[str, Tensor]]] = []
    with (
        torch.no_grad(),
        randomness_kept(seed),
        tqdm(total=num_pairs, desc="simulate", disable=not progress, delay=5, leave=False) as bar,
    ):
        rows = _arguments(data, num_pairs, order)
        sites = structure(program, rows[0], {})
        check_simulable(sites)
        if not any(
            s["type"] == "sample" and s["is_observed"] and not is_deterministic(s) for s in sites.nodes.values()
        ):
            raise ValueError(
                "the program observes nothing, so there is nothing that a guide could be told. Give a site obs=."
            )
        for start in range(0, num_pairs, batch_size):
            part = rows[start : start + batch_size]
            latents, observations = simulate_once(in_data_plate(program), collate(part), {})
            drawn.append((part, latents, observations))
            bar.update(len(part))
    counts = [len(part) for part, _, _ in drawn]
    found = SimulatedSet(
        rows, _joined([latents for _, latents, _ in drawn], counts), _joined([seen for _, _, seen in drawn], counts)
    )
    if folder is not None:
        found.save(folder)
    return found


def _arguments(data: Data | Callable[[int], Data], count: int, order: np.random.Generator) -> list[tuple[Any, ...]]:
    if callable(data):
        return checked(data(count), "data")[:count]
    known = checked(data)
    rounds = -(-count // len(known))
    index = np.concatenate([order.permutation(len(known)) for _ in range(rounds)])[:count]
    return [known[n] for n in index]


def _joined(parts: Sequence[dict[str, Tensor]], counts: Sequence[int]) -> dict[str, Tensor]:
    """Values of several batches as rows; texts are padded to the longest."""
    found = {}
    for name in parts[0]:
        values = [part[name].expand(n, *part[name].shape[1:]) for part, n in zip(parts, counts, strict=True)]
        if values[0].dtype == torch.long and values[0].dim() > 1:
            values = [widen(value, max(value.shape[-1] for value in values)) for value in values]
        found[name] = torch.cat(values).cpu()
    return found
