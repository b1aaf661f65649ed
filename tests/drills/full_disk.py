"""A disk that fills up while a checkpoint, an adapter, a page, a simulated set or a netCDF file is written: what was
there is as it was and can be read, and the error says which path and what to do.

    python tests/drills/full_disk.py [--count 100] [--seed 0]

The disk is a small one in memory (tmpfs), where the system lets one be mounted; elsewhere a limit of a file's size.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import arviz
from drill import Drill, described, is_named, main
from small_run import STEPS, SmallRun
from training_run import checkpoints, differs

from llmppl import SimulatedSet, importance
from llmppl.files.folders import written_whole
from llmppl.guides import PromptGuide

SIZE = 4 << 20
"""Bytes of the disk."""

MENDS = ("Make room", "Raise the limit", "Choose another path")


@contextlib.contextmanager
def disk(base: Path) -> Iterator[tuple[Path, bool]]:
    """A folder on a small disk, and whether it is one."""
    folder = base / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield folder, done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def full(folder: Path, mounted: bool, left: int) -> Iterator[None]:
    """A block in which so many bytes can still be written, in a file where there is no disk of its own."""
    if not mounted:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    filler = folder / "filler"
    free = shutil.disk_usage(folder).free
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - left, 1))
    try:
        yield
    finally:
        filler.unlink()


def run(count: int, seed: int) -> Drill:
    drill, generator = Drill("full_disk", count), random.Random(seed)
    small = SmallRun()
    with tempfile.TemporaryDirectory() as temporary, disk(Path(temporary)) as (folder, mounted):
        warnings.simplefilter("ignore")
        print(f"full_disk: {'a tmpfs of 4 MiB' if mounted else 'no tmpfs can be mounted: a limit of a file size'}")
        wanted = small.train(Path(temporary) / "wanted")
        small.train(folder / "run", 2)
        small.put(wanted[0])
        guide, pairs, many = small.guide, small.pairs(), small.pairs(3000)
        posterior = importance(small.program, PromptGuide(small.program, small.lm), 16, progress=False)("a", "b")
        page = folder / "page.html"
        guide.save(folder / "guide.safetensors")
        pairs.save(folder / "pairs")
        written_whole(page, lambda path: Path(path).write_text("the old page"))
        posterior.to_netcdf(folder / "posterior.nc")

        def of_guide() -> str:
            small.put(small.beginning)
            guide.load(folder / "guide.safetensors")
            return differs(wanted[0], small.tensors())

        def of_pairs() -> str:
            found = SimulatedSet.load(folder / "pairs")
            return differs([pairs.args, pairs.latents], [found.args, found.latents])

        def of_page() -> str:
            return "" if page.read_text() == "the old page" else "another page"

        def of_netcdf() -> str:
            shape = arviz.from_netcdf(str(folder / "posterior.nc")).posterior["middle_ids"].shape
            return "" if shape[1] == 16 else f"another shape {shape}"

        saved: dict[str, tuple[Callable[[], Any], Callable[[], str], int]] = {
            "adapter": (lambda: guide.save(folder / "guide.safetensors"), of_guide, 4096),
            "simulated set": (lambda: many.save(folder / "pairs"), of_pairs, 100_000),
            "page": (
                lambda: written_whole(page, lambda path: Path(path).write_text("x" * 300_000)), of_page, 300_000
            ),
            "netCDF": (lambda: posterior.to_netcdf(folder / "posterior.nc", num_samples=20_000), of_netcdf, 300_000),
        }  # fmt: skip
        for n in drill.tries():
            kind = generator.choice(["checkpoint", *saved])
            if kind == "checkpoint":
                _checkpoint(drill, small, wanted, folder, mounted, generator, f"seed {seed}, try {n}, checkpoint")
                continue
            write, read, size = saved[kind]
            left = generator.randrange(0, size)
            what = f"seed {seed}, try {n}, {kind} with {left} bytes left"
            names = {file for file in folder.rglob("*")}
            try:
                with full(folder, mounted, left):
                    write()
            except OSError as error:
                drill.outcomes["refused"] += 1
                if not is_named(error):
                    drill.fail(f"raw: {what}: {described(error)}")
                elif str(folder) not in str(error) or not any(mend in str(error) for mend in MENDS):
                    drill.fail(f"without path or mend: {what}: {described(error)}")
            except Exception as error:
                drill.fail(f"raw: {what}: {described(error)}")
            else:
                # It fitted after all: put the old one back.
                drill.outcomes["fitted"] += 1
                guide.save(folder / "guide.safetensors")
                pairs.save(folder / "pairs")
                written_whole(page, lambda path: Path(path).write_text("the old page"))
                posterior.to_netcdf(folder / "posterior.nc")
            try:
                if found := read():
                    drill.fail(f"the old file is another: {what}: {found}")
            except Exception as error:
                drill.fail(f"the old file cannot be read: {what}: {described(error)}")
            if left_over := {file for file in folder.rglob("*")} - names:
                drill.fail(f"left behind: {what}: {sorted(map(str, left_over))}")
    return drill


def _checkpoint(
    drill: Drill,
    small: SmallRun,
    wanted: Any,
    folder: Path,
    mounted: bool,
    generator: random.Random,
    what: str,
) -> None:
    """A run on a full disk goes on to its end, keeps the checkpoint that it had, and can be resumed from it."""
    own = folder / f"run-{drill.tried}"
    shutil.copytree(folder / "run", own)
    left = generator.randrange(0, 40_000)
    try:
        with full(folder, mounted, left), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = small.train_aloud(own)
        if not checkpoints(own):
            drill.fail(f"no checkpoint is left: {what}")
        if place := differs(wanted, found):
            drill.fail(f"another result on the full disk: {what}: {place}")
        said = [str(item.message) for item in told if "no checkpoint could be written" in str(item.message)]
        if max(checkpoints(own), default=0) < STEPS and not any("Make room" in t and str(own) in t for t in said):
            drill.fail(f"nothing is said of a checkpoint that is not there: {what}: {said}")
        drill.outcomes["went on without a checkpoint" if said else "fitted"] += 1
        if place := differs(wanted, small.train(own)):
            drill.fail(f"another result when resumed: {what}: {place}")
    except Exception as error:
        drill.fail(f"raised: {what}: {described(error)}")
    shutil.rmtree(own)


if __name__ == "__main__":
    main("full_disk", 100, run, __doc__)
