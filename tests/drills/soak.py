"""Hours of `fit`, of `importance`, and of NumPyro's `importance`, a process each, with the memory they hold sampled:
after a warm-up it stays within 2 %.

    python tests/drills/soak.py [--hours 2] [--only fit|importance|numpyro]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from drill import Drill

WARM = 0.3
"""Share of the time that is warm-up."""

LIMIT = 0.02


def resident() -> float:
    """MiB that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class _Enough(Exception):
    """The time is over."""


def of_fit(tick: Callable[[], None]) -> None:
    from small_run import DATA, SmallRun

    from llmppl import fit
    from llmppl.objectives import TrajectoryBalance

    small = SmallRun()
    fit(
        small.program, small.guide, DATA, TrajectoryBalance(4), 10**9, learning_rate=1e-4, seed=0, progress=False,
        callback=lambda step, history: tick(),
    )  # fmt: skip


def of_importance(tick: Callable[[], None]) -> None:
    from small_run import DATA, SmallRun

    from llmppl import importance

    small = SmallRun()
    for n in _endless():
        importance(small.program, small.guide, 64, progress=False)(*DATA[n % len(DATA)])
        tick()


def of_numpyro(tick: Callable[[], None]) -> None:
    import numpyro
    from jax import random

    from llmppl.numpyro import importance
    from llmppl.numpyro.guides import AutoregressiveGuide
    from llmppl.numpyro.testing import tiny_lm

    lm = tiny_lm()

    def program(beginning: Any, ending: Any) -> None:
        middle = numpyro.sample("middle", lm(beginning, max_tokens=2, stop="."))
        numpyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    infer = importance(program, AutoregressiveGuide(program, lm, rank=2, seed=0), 64, progress=False)
    for n in _endless():
        infer(random.key(n), "abc"[n % 3], "b")
        tick()


KINDS = {"fit": of_fit, "importance": of_importance, "numpyro": of_numpyro}


def _endless() -> Iterator[int]:
    n = 0
    while True:
        yield n
        n += 1


def soaked(kind: str, seconds: float, answers: Any) -> None:
    """Run one kind, and answer with its samples: seconds, MiB, and how often it has run."""
    begun, samples, runs = time.monotonic(), list[tuple[float, float]](), 0

    def tick() -> None:
        nonlocal runs
        runs += 1
        now = time.monotonic() - begun
        if not samples or now - samples[-1][0] > seconds / 200:
            samples.append((now, resident()))
        if now > seconds:
            raise _Enough

    try:
        KINDS[kind](tick)
    except _Enough:
        answers.put((samples, runs))


def run(hours: float, kinds: list[str]) -> Drill:
    drill = Drill("soak", len(kinds))
    context = multiprocessing.get_context("spawn")
    for kind in kinds:
        seconds, answers = hours * 3600 / len(kinds), context.Queue()
        child = context.Process(target=soaked, args=(kind, seconds, answers))
        child.start()
        try:
            samples, runs = answers.get(timeout=seconds + 300)
        finally:
            child.join(10)
        warm = [size for at, size in samples if at > WARM * seconds]
        half = len(warm) // 2
        before, after = statistics.median(warm[: max(half // 2, 1)]), statistics.median(warm[-max(half // 2, 1) :])
        growth = after / before - 1
        print(
            f"soak: {kind}: {runs} runs in {seconds:.0f} s, {samples[0][1]:.1f} MiB at first, {before:.1f} MiB when "
            f"warm, {after:.1f} MiB at the end ({growth:+.2%}), {max(warm):.1f} MiB at most",
            flush=True,
        )
        drill.outcomes["runs"] += runs
        if growth > LIMIT:
            drill.fail(f"{kind}: memory has grown by {growth:.1%} after the warm-up")
        drill.progress()
    return drill


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--only", choices=list(KINDS))
    options = parser.parse_args()
    sys.exit(run(options.hours, [options.only] if options.only else list(KINDS)).summary())
