"""Several processes that train one guide: gloo on this machine."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from llmppl import Behaviour, fit, simulate
from llmppl.objectives import TrajectoryBalance
from llmppl.testing import tiny_lm

SCRIPT = """
import pickle, sys
from torch import distributed
sys.path.insert(0, {tests!r})
from test_processes import trained
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method="file://" + folder + "/meet", rank=rank, world_size=2)
history, parameters = trained(4, 1, seed=3 + rank, folder=folder + "/run", start=rank)
pickle.dump((history, parameters), open(folder + f"/{{rank}}.pickle", "wb"))
distributed.destroy_process_group()
"""


def trained(steps: int, accumulate: int, seed: int, folder: str, start: int = 0, resume: bool = False) -> Any:
    """A story's guide; the losses, and the parameters."""
    import pyro

    from llmppl.guides import GFlowNetGuide

    torch.set_num_threads(1)
    lm = tiny_lm()

    def story(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", lm(beginning, max_tokens=3, stop="."))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    # A process may start from another guide than the first: the first one's counts.
    guide = GFlowNetGuide(story, lm, rank=2, seed=start)
    data = [("ab", "cd"), ("b", "e"), ("cc", "a"), ("d", "bb"), ("ea", "c")]
    history = fit(story, guide, data, TrajectoryBalance(4, log_partition="learned"), steps, accumulate=accumulate,
                  learning_rate=3e-2, seed=seed, folder=folder, checkpoint_every=2, resume=resume,
                  progress=False)  # fmt: skip
    return history.loss + history.elbo, {name: p.detach() for name, p in guide.named_parameters()}


@pytest.fixture
def group(tmp_path: Path) -> Any:
    """A group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.long
def test_two_processes_are_one_with_twice_the_minibatches(tmp_path: Path, group: None) -> None:
    """Losses and parameters to 1e-5; one writer; the same again from a checkpoint of the two, by one."""
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    workers = [
        subprocess.Popen([sys.executable, "-c", script, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    alone, parameters = trained(4, 2, 3, str(tmp_path / "alone_run"))
    for worker in workers:
        _, error = worker.communicate(timeout=120)
        assert worker.returncode == 0, error
    for rank in (0, 1):
        losses, theirs = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        assert losses == pytest.approx(alone, abs=1e-5)
        for name, value in theirs.items():
            torch.testing.assert_close(value, parameters[name], rtol=0, atol=1e-5)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4, "one writer"
    more, further = trained(6, 2, 3, str(tmp_path / "run"), resume=True)
    straight, expected = trained(6, 2, 3, str(tmp_path / "straight"))
    assert more == pytest.approx(straight, abs=1e-5)
    for name, value in further.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_what_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyro

    from llmppl.guides import PromptGuide

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda box, source: None)
    lm = tiny_lm()

    def program(ending: str) -> None:
        middle = pyro.sample("middle", lm("a", max_tokens=2))
        pyro.sample("ending", lm(middle), obs=lm.encode(ending))

    guide, replay = PromptGuide(program, lm), TrajectoryBalance(4, behaviour=Behaviour(replayed=0.5))
    with pytest.raises(ValueError, match=r"replay buffer, and each of 2 processes.*Leave replayed= out"):
        fit(program, guide, [("b",)], replay, 1)
    with pytest.raises(ValueError, match=r"stream of simulated pairs, which 2 processes.*num_pairs="):
        fit(program, guide, simulate(program, [("b",)], progress=False), TrajectoryBalance(4), 1)
