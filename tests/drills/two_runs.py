"""Two processes on one run folder: the second is refused while the first lives; once it is killed the next one goes on,
to the same result.

    python tests/drills/two_runs.py [--count 20] [--seed 0]
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from drill import Drill, main
from training_run import REFUSED, differs, reference, start, wait


def run(count: int, seed: int) -> Drill:
    drill, generator = Drill("two_runs", count), random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        wanted, _ = reference(base)
        for n in drill.tries():
            folder, result = base / f"run-{n}", base / f"run-{n}.pt"
            step = generator.randrange(1, 24)
            reading, writing = os.pipe()

            def held(done: int, history: Any, step: int = step, writing: int = writing) -> None:
                if done == step:
                    os.write(writing, b"x")
                    time.sleep(600)

            first = start(folder, base / "first.pt", callback=held)
            os.close(writing)
            os.read(reading, 1)  # the first run is at its step, or has ended
            os.close(reading)
            before = sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir())
            status = wait(start(folder, result))
            said = result.read_text(errors="replace") if result.exists() else ""
            if status != REFUSED or f"{folder} is in use: another run is writing to it now" not in said:
                drill.fail(f"seed {seed}, try {n}: the second run was not refused (exit status {status}): {said[:200]}")
            if before != sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir()):
                drill.fail(f"seed {seed}, try {n}: the second run has changed the first one's folder")
            os.kill(first, signal.SIGKILL)
            wait(first)
            status = wait(start(folder, result))
            if status:
                drill.fail(f"seed {seed}, try {n}: the next run: exit status {status}: {result.read_text()}")
            elif found := differs(wanted, torch.load(result)):
                drill.fail(f"seed {seed}, try {n}: the next run, from step {step}: {found}")
            drill.outcomes["refused, then gone on"] += 1
    return drill


if __name__ == "__main__":
    main("two_runs", 20, run, __doc__)
