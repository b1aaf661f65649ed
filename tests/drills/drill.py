"""What the drills have in common: the command line, a progress line, a summary, and what a raw traceback is."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

# Before torch and JAX start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests' own small run

import llmppl

ROOT = Path(llmppl.__file__).parent.parent
OURS = tuple(str(ROOT / part) + os.sep for part in ("llmppl", "guides", "models"))


class Drill:
    """Counts what a drill has tried, and what failed.

    :param name: of the script.
    :param count: tries in all.
    """

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.tried = 0
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []

    def tries(self) -> Iterator[int]:
        for n in range(self.count):
            yield n
            self.progress()

    def progress(self) -> None:
        self.tried += 1
        step = max(self.count // 20, 1)
        if self.tried % step == 0 or self.tried == self.count:
            end = "\n" if self.tried == self.count else "\r"
            print(f"{self.name}: {self.tried} of {self.count}, {len(self.failures)} failed", end=end, flush=True)

    def fail(self, what: str) -> None:
        self.failures.append(what)

    def summary(self) -> int:
        """Print what came of it; the exit status."""
        said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        for failure in self.failures[:20]:
            print(f"  {failure}")
        if len(self.failures) > 20:
            print(f"  and {len(self.failures) - 20} more")
        print(f"{self.name}: {self.tried} tried: {said or 'nothing to tell'}; {len(self.failures)} failed", flush=True)
        return 1 if self.failures else 0


def raised_at(error: BaseException) -> tuple[str, int]:
    """File and line of the innermost frame of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return (frames[-1].filename, frames[-1].lineno or 0) if frames else ("", 0)


def is_named(error: BaseException) -> bool:
    """Whether a ``raise`` of this library made it: not a framework below, nor Python where a line went wrong."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        bool(frames)
        and os.path.abspath(frames[-1].filename).startswith(OURS)
        and (frames[-1].line or "").startswith("raise")
    )


def described(error: BaseException) -> str:
    file, line = raised_at(error)
    return f"{type(error).__name__}: {str(error)[:200]!r} raised at {file}:{line}"


def main(name: str, count: int, run: Callable[[int, int], Drill], doc: str | None) -> None:
    """A drill as a script: ``--count`` and ``--seed``."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(run(options.count, options.seed).summary())


class TooLong(BaseException):
    """A call that is honest work, too much of it to wait for."""


def too_long(signal: int, frame: FrameType | None) -> None:
    raise TooLong
