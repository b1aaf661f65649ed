"""What the benchmarks have in common: interleaved CPU times, the machine, a table."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


def cpu_seconds(contenders: Mapping[str, Callable[[], object]], repeats: int, warm: bool = False) -> dict[str, float]:
    """Median CPU seconds of each contender, which ran once before. They take turns, so that a slow minute
    hits all alike.

    :param warm: in each turn run it once unmeasured, as in a loop of nothing else: whoever allocates its memory anew
        in every run otherwise pays for what the contender before it gave back to the system.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            if warm:
                run()
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> str:
    """One line: processor, threads, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "pyro-ppl"))
    return f"{processor}, {torch.get_num_threads()} thread(s); Python {platform.python_version()}, {versions}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats with three digits."""
    cells = [list(header), *([f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def records(path: Path) -> list[dict[str, Any]]:
    """What runs have written to a file, a line of JSON each; none where it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def keep(path: Path, record: dict[str, Any]) -> None:
    """Write one more, so that a run that is cut off goes on behind it."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(record, flush=True)


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017) of what was chosen, equal-width bins."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        (place == n).mean() * abs(right[place == n].mean() - confidence[place == n].mean())
        for n in range(bins)
        if (place == n).any()
    ]
    return float(sum(gaps))


def nothing(*args: Any) -> None:
    """The guide of a program without latents."""
