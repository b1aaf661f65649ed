"""SIGKILL at random moments of a training run with a folder, resumed each time: what comes out is, bit for bit,
what a run comes to that nobody killed.

python tests/drills/killed.py [--count 100] [--seed 0]
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
from pathlib import Path

import torch
from drill import Drill, main
from training_run import checkpoints, differs, reference, sleep, start, wait


def run(count: int, seed: int) -> Drill:
    drill, generator = Drill("killed", count), random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        wanted, seconds = reference(base)
        runs, kills = 0, 0
        folder, result = base / "run-0", base / "run-0.pt"
        while drill.tried < count or kills:
            child = start(folder, result)
            last = drill.tried == count
            if not last:
                sleep(generator, seconds, folder)
                os.kill(child, signal.SIGKILL)
            status = wait(child)
            if status == -signal.SIGKILL:
                kills += 1
                drill.outcomes[f"killed {'with' if checkpoints(folder) else 'before'} a checkpoint"] += 1
            else:
                drill.outcomes["runs compared"] += 1
                where = f"seed {seed}, run {runs}, killed {kills} times"
                runs += 1
                if status:
                    drill.fail(
                        f"seed {seed}, run {runs}, killed {kills} times: exit status {status}: {result.read_text()}"
                    )
                elif found := differs(wanted, torch.load(result)):
                    drill.fail(f"{where}: {found}")
                kills = 0
                folder, result = base / f"run-{runs}", base / f"run-{runs}.pt"
            if not last and status == -signal.SIGKILL:
                drill.progress()
    return drill


if __name__ == "__main__":
    main("killed", 100, run, __doc__)
