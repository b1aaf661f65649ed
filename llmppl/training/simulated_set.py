"""A set of simulated latents and observations, saved and read back."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmppl.files.folders import made
from llmppl.files.guide_file import check_whole, written_tensors
from llmppl.programs.simulated_pair import SimulatedPair
from llmppl.text.declared import declared

FORMAT = "llmppl-simulated-1"
FILE = "pairs.safetensors"


class SimulatedSet(Sequence[SimulatedPair]):
    """Pairs of latents and observations that a program simulated, each an argument tuple of the program.

    As data of :func:`~llmppl.fit` forward-KL objectives (``WakeSleep(insomnia=0)``) learn from these pairs, and others
    from their observations; as ``pairs=`` of :class:`~llmppl.Evaluation` they measure the held-out gain. Slices are
    sets, too.

    :param args: the arguments of each pair.
    :param latents, observations: by site, ``(N, ...)``; texts padded to one width.
    :param seed: of the random numbers that they were drawn by, where that is known.
    """

    @declared
    def __init__(
        self,
        args: Sequence[tuple[Any, ...]],
        latents: dict[str, Tensor],
        observations: dict[str, Tensor],
        seed: int | None = None,
    ) -> None:
        self.args, self.latents, self.observations, self.seed = list(args), latents, observations, seed
        for kind, group in (("latents", latents), ("observations", observations)):
            for name, value in group.items():
                if not isinstance(value, Tensor) or value.dim() < 1 or len(value) != len(self.args):
                    shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                    raise ValueError(
                        f"{kind}[{name!r}] is {shown}; it must be a tensor with a row for each of the "
                        f"{len(self.args)} args."
                    )

    def __len__(self) -> int:
        return len(self.args)

    @overload
    def __getitem__(self, index: int) -> SimulatedPair: ...
    @overload
    def __getitem__(self, index: slice) -> SimulatedSet: ...
    def __getitem__(self, index: int | slice) -> SimulatedPair | SimulatedSet:
        latents, seen = (
            {name: value[index] for name, value in group.items()} for group in (self.latents, self.observations)
        )
        if isinstance(index, slice):
            return SimulatedSet(self.args[index], latents, seen, self.seed)
        return SimulatedPair.of(self.args[index], latents, seen)

    @declared
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the set to a folder, whole or not at all: one safetensors file.

        :raises TypeError: arguments other than strings and numbers, which a file cannot hold.
        """
        path = made(folder)
        for n, row in enumerate(self.args):
            if not all(isinstance(value, (str, int, float)) for value in row):
                raise TypeError(f"pair {n} has arguments {row!r}; only strings and numbers can be saved.")
        tensors = {f"latent {name}": value.contiguous() for name, value in self.latents.items()}
        tensors |= {f"observed {name}": value.contiguous() for name, value in self.observations.items()}
        metadata = {"format": FORMAT, "args": json.dumps(self.args), "seed": json.dumps(self.seed)}
        written_tensors(path / FILE, tensors, metadata, save_file)

    @classmethod
    @declared
    def load(cls, folder: str | os.PathLike[str]) -> SimulatedSet:
        """Read what :meth:`save` has written.

        :raises FileNotFoundError: no such set.
        :raises ValueError: a damaged one; nothing of it is read.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"no simulated set in {folder}. Draw one: simulate(program, data, n, folder=...).")
        try:
            check_whole(path)
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            args = [tuple(row) for row in json.loads(metadata["args"]) if isinstance(row, list)]
            seed = json.loads(metadata.get("seed", "null"))
            if metadata["format"] != FORMAT or any(len(value) != len(args) for value in tensors.values()):
                raise ValueError("another format, or rows are missing")
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged or no simulated set ({error}). Delete it and simulate again; nothing else depends "
                "on it."
            ) from None
        parts: dict[str, dict[str, Tensor]] = {"latent": {}, "observed": {}}
        for name, value in tensors.items():
            kind, _, site = name.partition(" ")
            if kind not in parts or not site:
                raise ValueError(f"{path} is damaged or no simulated set: {name!r} is no site. Simulate again.")
            parts[kind][site] = value
        return cls(args, parts["latent"], parts["observed"], seed if isinstance(seed, int) else None)

    def __repr__(self) -> str:
        sites = ", ".join([*self.latents, *(f"{name} observed" for name in self.observations)])
        return f"SimulatedSet({len(self)} pairs of {sites})"
