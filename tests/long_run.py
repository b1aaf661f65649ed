"""A small training run that can be killed; tests start it in processes of their own.

``python tests/long_run.py FOLDER SEED`` trains in child processes, kills each by SIGKILL a random time into its
steps or as soon as it writes a checkpoint, resumes, and lets the last one finish.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import ELBO

from llmppl import LM, Evaluation, fit
from llmppl.guides import GFlowNetGuide
from llmppl.objectives import TrajectoryBalance
from llmppl.testing import tiny_lm
from llmppl.training.history import History

DATA = [("ab", "cd"), ("cde", "a"), ("d", "eb"), ("aa", "bbb"), ("ce", "d")]
HELD_OUT = [("bb", "ca"), ("e", "dd")]
STEPS = 24
KILLS = 4


def story(lm: LM) -> Callable[[str, str], None]:
    def program(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", lm(beginning, max_tokens=2, stop="."))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    return program


def train(folder: str | None = None, rank: int = 2, lm_seed: int = 0, **changes: Any) -> tuple[GFlowNetGuide, History]:
    """A run on a new model and guide, the same each time but for the changes."""
    lm = tiny_lm(vocabulary=6, seed=lm_seed, dtype=torch.float64)
    program = story(lm)
    guide = GFlowNetGuide(program, lm, rank=rank, target_modules=["q_proj", "v_proj"], seed=0)
    arguments: dict[str, Any] = {
        "data": DATA,
        "objective": TrajectoryBalance(3, log_partition="learned"),
        "steps": STEPS,
        "batch_size": 2,
        "vectorize_data": True,
        "learning_rate": 1e-2,
        "seed": 3,
        "progress": False,
        "folder": folder,
        "checkpoint_every": 2,
        "evaluation": Evaluation(HELD_OUT, every=4, num_samples=3),
        **changes,
    }
    if not isinstance(arguments["objective"], ELBO):
        arguments["objective"] = arguments["objective"]()  # one of its own for each run: it may hold a buffer
    return guide, fit(program, guide, **arguments)


def wait(child: int, until: Callable[[], bool], seconds: float = 20.0) -> None:
    """Until something is true, or the child has ended."""
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return


def checkpoints(folder: str) -> set[str]:
    """Files of checkpoints, whole or not."""
    return {name for name in os.listdir(folder) if name.startswith("step-")}


def written(folder: str) -> int:
    """Bytes of metrics."""
    path = f"{folder}/metrics.jsonl"
    return os.path.getsize(path) if os.path.exists(path) else 0


def main(folder: str, seed: int) -> None:
    warnings.simplefilter("error")  # a kill leaves no damaged checkpoint
    torch.set_num_threads(1)
    rng = random.Random(seed)
    # Imports of the libraries behind, once for all children.
    warm = tiny_lm()
    GFlowNetGuide(story(warm), warm, rank=1)
    for attempt in range(KILLS + 1):
        child = os.fork()
        if child == 0:
            guide, _ = train(folder, resume=True)
            torch.save({name: tensor.detach() for name, tensor in guide.tensors().items()}, f"{folder}/final")
            os._exit(0)
        if attempt < KILLS:
            if attempt % 2:
                before = checkpoints(folder)
                wait(child, lambda before=before: bool(checkpoints(folder) - before))
            else:
                # A step takes some 30 milliseconds: up to six steps after the first, at any moment of one.
                size = written(folder)
                wait(child, lambda size=size: written(folder) != size)
                time.sleep(rng.uniform(0.0, 0.2))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", sorted(os.listdir(folder)))
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
