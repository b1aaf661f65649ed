"""Ctrl-C at random moments of a training run with a folder: the step is ended, its checkpoint written, no step is
lost, and what the resumed run comes to is, bit for bit, what a run comes to that nobody interrupted.

python tests/drills/interrupted.py [--count 100] [--seed 0]
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import tempfile
from pathlib import Path

import torch
from drill import Drill, main
from training_run import STOPPED, checkpoints, differs, reference, sleep, start, wait


def last_step(folder: Path) -> int:
    """The last step that the metrics tell of; 0 before the first."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def lost(folder: Path, message: str) -> str:
    """What an interrupted run has lost; empty where it has lost nothing and says so."""
    newest, step = max(checkpoints(folder), default=0), last_step(folder)
    if newest != step:
        return f"the last step is {step}, and the newest checkpoint that of {newest}"
    told = re.search(r"stopped after step (\d+)", message)
    if told and int(told[1]) != step:
        return f"it says {message!r}, and the last step is {step}"
    if step and message and not ("resume=True" in message and str(folder) in message):
        return f"it does not say where to go on: {message!r}"
    return ""


def run(count: int, seed: int) -> Drill:
    drill, generator = Drill("interrupted", count), random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        wanted, seconds = reference(base)
        runs, stops = 0, 0
        folder, result = base / "run-0", base / "run-0.pt"
        while drill.tried < count or stops:
            child = start(folder, result, checkpoint_every=1000)  # only the last step has one of itself
            last = drill.tried == count
            if not last:
                sleep(generator, seconds, folder)
                os.kill(child, signal.SIGINT)
            status = wait(child)
            if status == STOPPED:
                stops += 1
                message = result.read_text()
                drill.outcomes["stopped behind a step" if "stopped after step" in message else "stopped before"] += 1
                if found := lost(folder, message):
                    drill.fail(f"seed {seed}, run {runs}, stop {stops}: {found}")
                drill.progress()
                continue
            drill.outcomes["runs compared"] += 1
            where = f"seed {seed}, run {runs}, stopped {stops} times"
            runs += 1
            if status:
                drill.fail(
                    f"seed {seed}, run {runs}, stopped {stops} times: exit status {status}: {result.read_text()}"
                )
            elif found := differs(wanted, torch.load(result)):
                drill.fail(f"{where}: {found}")
            stops = 0
            folder, result = base / f"run-{runs}", base / f"run-{runs}.pt"
    return drill


if __name__ == "__main__":
    main("interrupted", 100, run, __doc__)
