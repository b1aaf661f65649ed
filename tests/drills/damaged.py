"""Damaged run folders, guides and simulated sets: each is read as it was written, or from an older whole checkpoint, or
refused by an error of this library that says which file and what to do.

    python tests/drills/damaged.py [--count 1000] [--seed 0]
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drill import Drill, described, is_named, main
from small_run import SmallRun
from training_run import differs

from llmppl import SimulatedSet

Damage = Callable[[random.Random, Path, list[Path]], None]


def truncated(generator: random.Random, file: Path, others: list[Path]) -> None:
    os.truncate(file, generator.randrange(max(file.stat().st_size, 1)))


def flipped(generator: random.Random, file: Path, others: list[Path]) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(generator.choice([1, 1, 8, 64]) if content else 0):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(content)


def emptied(generator: random.Random, file: Path, others: list[Path]) -> None:
    file.write_bytes(b"")


def missing(generator: random.Random, file: Path, others: list[Path]) -> None:
    file.unlink()


def garbage(generator: random.Random, file: Path, others: list[Path]) -> None:
    noise = generator.randbytes(generator.randrange(4000))
    file.write_bytes(generator.choice([noise, b"{}", b"PK\x03\x04", b"\x80\x04"]))


def lengthened(generator: random.Random, file: Path, others: list[Path]) -> None:
    with file.open("ab") as stream:
        stream.write(generator.randbytes(generator.randrange(1, 100)))


def swapped(generator: random.Random, file: Path, others: list[Path]) -> None:
    other = generator.choice(others)
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)


def renamed(generator: random.Random, file: Path, others: list[Path]) -> None:
    name = generator.choice([
        file.name + ".bak", "step-99999999-0123456789abcdef.pt", "step-00000001-0123456789abcdef.pt", "é.pt",
        file.name.replace("0000", "0009", 1), file.name.upper(),
    ])  # fmt: skip
    file.rename(file.with_name(name))


def a_folder(generator: random.Random, file: Path, others: list[Path]) -> None:
    file.unlink()
    file.mkdir()


def a_dangling_link(generator: random.Random, file: Path, others: list[Path]) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nothing here"))


def a_whole_one_is_left(folder: Path) -> bool:
    """Whether a run could go on: a checkpoint is whole, and nothing stands in the place of lock and metrics."""
    files = [file for file in folder.glob("step-*.pt") if file.is_file()]
    whole = any(hashlib.sha256(file.read_bytes()).hexdigest()[:16] in file.name for file in files)
    links = any((folder / name).is_symlink() for name in (".lock", "metrics.jsonl"))  # which are refused
    return whole and not links and not (folder / ".lock").is_dir()


DAMAGES: list[Damage] = [
    truncated, flipped, emptied, missing, garbage, lengthened, swapped, renamed, a_folder, a_dangling_link
]  # fmt: skip


def run(count: int, seed: int) -> Drill:
    drill, generator = Drill("damaged", count), random.Random(seed)
    small = SmallRun()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        wanted = small.train(base / "wanted")
        small.train(base / "run", 4)
        small.put(wanted[0])
        (base / "files").mkdir()
        small.guide.save(base / "files" / "guide.safetensors")
        pairs = small.pairs()
        pairs.save(base / "files" / "pairs")
        shutil.copy(base / "files" / "pairs" / "pairs.safetensors", base / "files" / "other.safetensors")

        def resumed(folder: Path) -> str:
            return differs(wanted, small.train(folder))

        def loaded(folder: Path) -> str:
            small.put(small.beginning)
            small.guide.load(folder / "guide.safetensors")
            return differs(wanted[0], small.tensors())

        def read(folder: Path) -> str:
            found = SimulatedSet.load(folder / "pairs")
            as_dicts: list[Any] = [[s.args, s.latents, s.observations] for s in (pairs, found)]
            return differs(*as_dicts)

        for n in drill.tries():
            kind, use = generator.choice([("run", resumed), ("run", resumed), ("files", loaded), ("files", read)])
            folder = base / f"try-{n}"
            shutil.copytree(base / kind, folder)
            done = []
            for _ in range(generator.choice([1, 1, 2, 3])):
                files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
                if use is loaded:
                    files = [file for file in files if file.name == "guide.safetensors"] or files
                if use is read:
                    files = [file for file in files if file.name == "pairs.safetensors"] or files
                if not files:
                    break
                file, damage = generator.choice(files), generator.choice(DAMAGES)
                others = sorted(f for f in folder.rglob("*") if f.is_file() and f != file) or [file]
                damage(generator, file, others)
                done.append(f"{file.relative_to(folder)} {damage.__name__}")
            what = f"seed {seed}, try {n} ({kind}: {', '.join(done)})"
            try:
                found = use(folder)
            except Exception as error:
                drill.outcomes["refused"] += 1
                if use is resumed and a_whole_one_is_left(folder):
                    drill.fail(f"refused beside a whole checkpoint: {what}: {described(error)}")
                if not is_named(error):
                    drill.fail(f"raw: {what}: {described(error)}")
                elif str(folder) not in str(error):
                    drill.fail(f"does not say which file: {what}: {described(error)}")
            else:
                drill.outcomes["read as it was written"] += 1
                if found:
                    drill.fail(f"another result: {what}: {found}")
            shutil.rmtree(folder)
    return drill


if __name__ == "__main__":
    main("damaged", 1000, run, __doc__)
