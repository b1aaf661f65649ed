"""A small training run in a process of its own, which the drills kill and interrupt; whether two runs are the same."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drill  # sets the environment, before torch starts
import numpy as np
import torch
from long_run import train

__all__ = ["Result", "checkpoints", "differs", "reference", "sleep", "start", "wait"]

Result = tuple[dict[str, Any], dict[str, Any]]
"""A guide's tensors and a history."""

STOPPED = 130
REFUSED = 3
assert drill.ROOT


def start(folder: Path, result: Path, callback: Callable[[int, Any], None] | None = None, **changes: Any) -> int:
    """The run in a child process, whose id is returned: it goes on in ``folder``, and leaves its result in a file.

    The file holds the message where the run was stopped by Ctrl-C (exit status 130) or refused (3).
    """
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            guide, history = train(str(folder), resume=True, callback=callback, **changes)
        except KeyboardInterrupt as stopped:
            result.write_text(str(stopped))
            os._exit(STOPPED)
        except ValueError as error:
            result.write_text(str(error))
            os._exit(REFUSED)
        torch.save(({k: v.detach() for k, v in guide.tensors().items()}, history.state_dict()), result)
        os._exit(0)
    finally:
        os._exit(1)


def wait(child: int, seconds: float = 120.0) -> int:
    """The exit status of a child; of one killed by a signal its negative number."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a run did not end in {seconds:.0f} s")


def sleep(generator: random.Random, seconds: float, folder: Path) -> None:
    """Until a random moment: of the whole run in one case of five, else of its steps.

    :param seconds: that a whole run takes.
    """
    if generator.random() < 0.2:
        time.sleep(generator.uniform(0.0, seconds))
        return
    end, before = time.monotonic() + 60.0, size(folder)
    while size(folder) == before and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(generator.uniform(0.0, 0.25 * seconds))


def size(folder: Path) -> int:
    """Bytes of the metrics."""
    file = folder / "metrics.jsonl"
    return file.stat().st_size if file.exists() else 0


def reference(folder: Path) -> tuple[Result, float]:
    """The result of a run that nobody disturbs, and its seconds."""
    start_time = time.monotonic()
    status = wait(start(folder / "reference", folder / "reference.pt"))
    assert status == 0, (folder / "reference.pt").read_text()
    return torch.load(folder / "reference.pt"), time.monotonic() - start_time


def checkpoints(folder: Path) -> list[int]:
    """The steps of a folder's checkpoints."""
    return sorted(int(file.name.split("-")[1]) for file in folder.glob("step-*.pt"))


def differs(first: Any, second: Any, place: str = "") -> str:
    """Where two results differ in a bit, but for the seconds; empty where they do not."""
    if isinstance(first, torch.Tensor):
        same = first.dtype == second.dtype and torch.equal(first, second)
        return "" if same else f"{place} is another tensor"
    if isinstance(first, dict):
        if list(first) != list(second):
            return f"{place} has other names"
        found = (differs(first[key], second[key], f"{place}/{key}") for key in first if key != "seconds")
        return next(filter(None, found), "")
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return f"{place} has {len(second)} entries, not {len(first)}"
        return next(filter(None, (differs(a, b, f"{place}/{n}") for n, (a, b) in enumerate(zip(first, second)))), "")  # noqa: B905
    try:
        np.testing.assert_equal(first, second)
    except AssertionError:
        return f"{place} is {second!r}, not {first!r}"
    return ""
