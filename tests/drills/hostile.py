"""Hostile files in the place of adapters, checkpoints, simulated sets and run folders: nothing of them is executed,
nothing is written outside, and an error of this library says which file it is.

    python tests/drills/hostile.py [--count 200] [--seed 0]
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from drill import Drill, described, is_named, main
from safetensors.torch import save
from small_run import SmallRun

from llmppl import SimulatedSet
from llmppl.files.guide_file import FORMAT as ADAPTER
from llmppl.files.guide_file import read_settings
from llmppl.training.run_folder import FORMAT as RUN
from llmppl.training.simulated_set import FORMAT as PAIRS

Maker = Callable[[random.Random, Path], bytes]


class Executed:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


class Opened(Executed):
    def __reduce__(self) -> Any:
        return open, (str(self.canary), "w")


class Evaluated(Executed):
    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.canary)!r}, 'w')",)


def _evil(generator: random.Random, canary: Path) -> Any:
    return generator.choice([Executed, Opened, Evaluated])(canary)


def pickled(generator: random.Random, canary: Path) -> bytes:
    return pickle.dumps(_evil(generator, canary), protocol=generator.randrange(6))


def saved(generator: random.Random, canary: Path) -> bytes:
    """By torch.save, in its present form and the one before, among what a checkpoint has."""
    stream, evil = io.BytesIO(), _evil(generator, canary)
    state = {"format": RUN, "identity": {}, "step": 2, "tensors": {"a": evil}, "parts": {}, "random": {}}
    new = generator.random() < 0.5
    torch.save(generator.choice([state, evil, [evil]]), stream, _use_new_zipfile_serialization=new)
    return stream.getvalue()


def out_of_the_zip(generator: random.Random, canary: Path) -> bytes:
    """An archive with names that lead out of it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in (f"../../../../..{canary}", str(canary), "archive/../../x", "archive/data.pkl", "archive/version"):
            archive.writestr(name, pickled(generator, canary) if name.endswith("pkl") else b"3\n")
    return stream.getvalue()


def out_of_the_tar(generator: random.Random, canary: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in (f"../../../..{canary}", "storages", "pickle"):
            entry = tarfile.TarInfo(name)
            content = pickled(generator, canary)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def huge(generator: random.Random, canary: Path) -> bytes:
    """A header that declares more than there is."""
    size = generator.choice([2**63, 2**64 - 1, 10**9, 200])
    return size.to_bytes(8, "little") + generator.randbytes(100)


def huge_tensor(generator: random.Random, canary: Path) -> bytes:
    shape = generator.choice([[2**40], [2**31, 2**31], [-1], [2**62, 4], []])
    header: dict[str, Any] = {
        "../../x": {"dtype": "F32", "shape": shape, "data_offsets": [0, generator.choice([2**50, 4, -4])]}
    }
    header["__metadata__"] = {"format": generator.choice([ADAPTER, PAIRS]), "args": "[]", "model": "{}"}
    content = json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + b"\0\0\0\0"


def lying(generator: random.Random, canary: Path) -> bytes:
    """A whole file whose descriptions are none, or lead elsewhere."""
    text = generator.choice(["[" * 100_000, "{", "3", "null", '"x"', "[3]", "[[" + str(canary) + "]]", "{}", "NaN"])
    metadata = {"format": generator.choice([ADAPTER, PAIRS]), "args": text, "model": text, "settings": text}
    for name in generator.sample(sorted(metadata), generator.randrange(2)):
        del metadata[name]
    names = ["latent ../../x", "../../../x", f"observed {canary}", "x", "latent ", ""]
    return save({generator.choice(names): torch.zeros(1)}, metadata=metadata)


def of_another_kind(generator: random.Random, canary: Path) -> bytes:
    """A checkpoint in form, without or with other contents."""
    stream = io.BytesIO()
    full = {"format": RUN, "identity": {}, "step": 2, "tensors": {}, "parts": {}, "random": {}}
    changed = {**full, generator.choice(sorted(full)): generator.choice([None, 3, "x", [], {"step": "x"}])}
    for name in generator.sample(sorted(changed), generator.randrange(2)):
        del changed[name]
    torch.save(generator.choice([changed, 3, [], {}]), stream)
    return stream.getvalue()


def forged(generator: random.Random, canary: Path) -> bytes:
    """A checkpoint of this very run, with something else in the place of a part of its state."""
    state = torch.load(next((canary.parent / "kept").glob("step-*.pt")))
    group = state[generator.choice(["tensors", "parts", "random"])]
    wrong = generator.choice(
        [None, 3, "x", [], {}, {"x": "../../x"}, torch.zeros(3), [torch.zeros(2**10)], float("nan")]
    )
    group[generator.choice(sorted(group))] = wrong
    if generator.random() < 0.3:
        state["step"] = generator.choice([None, "x", -1])
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


MAKERS: list[Maker] = [
    forged,
    forged,
    pickled,
    saved,
    out_of_the_zip,
    out_of_the_tar,
    huge,
    huge_tensor,
    lying,
    of_another_kind,
]


def run(count: int, seed: int) -> Drill:
    drill, generator = Drill("hostile", count), random.Random(seed)
    small = SmallRun()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        canary, outside = base / "canary", base / "outside"
        kept = base / "kept"
        small.train(kept, 2)
        stolen = next(kept.glob("step-*.pt")).read_bytes()
        for n in drill.tries():
            folder = base / "work" / f"try-{n}"
            folder.mkdir(parents=True)
            outside.write_text("as it was")
            before = {file for file in base.rglob("*") if folder not in file.parents}
            place = generator.choice(["adapter", "checkpoint", "pairs", "settings", "link", "run's link"])
            made = generator.choice(MAKERS)
            content = made(generator, canary)
            if place == "checkpoint":
                # Under the name that its bytes ask for, so that they are read.
                (folder / f"step-00000002-{hashlib.sha256(content).hexdigest()[:16]}.pt").write_bytes(content)
                call: Callable[[], Any] = lambda folder=folder: small.train(folder)  # noqa: E731
            elif place == "run's link":
                name = generator.choice([".lock", "metrics.jsonl", "tensorboard"])
                target = generator.choice([outside, base / "new"])
                (folder / name).symlink_to(target)
                if generator.random() < 0.5:
                    (folder / f"step-00000002-{hashlib.sha256(stolen).hexdigest()[:16]}.pt").write_bytes(stolen)
                call = lambda folder=folder: small.train(folder)  # noqa: E731
            elif place == "pairs":
                (folder / "pairs.safetensors").write_bytes(content)
                call = lambda folder=folder: SimulatedSet.load(folder)  # noqa: E731
            else:
                file = folder / "guide.safetensors"
                if place == "link":
                    file.symlink_to(generator.choice([outside, Path("/dev/zero"), Path("/etc/passwd"), base / "new"]))
                else:
                    file.write_bytes(content)
                read: Callable[..., Any] = read_settings if place == "settings" else small.guide.load
                call = lambda read=read, file=file: read(file)  # noqa: E731
            what = f"seed {seed}, try {n}, {made.__name__} as {place}"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call()
            except Exception as error:
                drill.outcomes["refused"] += 1
                if not is_named(error):
                    drill.fail(f"raw: {what}: {described(error)}")
                # Other numbers in their right places are a run of somebody else's, and go on as any.
                elif str(folder) not in str(error) and made is not forged:
                    drill.fail(f"does not say which file: {what}: {described(error)}")
            else:
                drill.outcomes["read, and harmless"] += 1
                if place not in ("settings", "pairs") and made is not forged:
                    drill.fail(f"not refused: {what}")
            if canary.exists():
                drill.fail(f"EXECUTED: {what}")
                canary.unlink()
            new = {file for file in base.rglob("*") if folder not in file.parents} - before
            if new:
                drill.fail(f"written outside: {what}: {sorted(map(str, new))}")
                for file in new:
                    file.unlink() if file.is_file() or file.is_symlink() else None
            if outside.read_text() != "as it was":
                drill.fail(f"changed outside: {what}")
    return drill


if __name__ == "__main__":
    main("hostile", 200, run, __doc__)
