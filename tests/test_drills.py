"""What goes wrong in practice, said by name: learning rates, folders, processes, hubs that cannot be reached."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Story
from huggingface_hub import constants

from llmppl import LM, fit, simulate
from llmppl.guides import AutoregressiveGuide
from llmppl.objectives import LeaveOneOutELBO, TrajectoryBalance


def trained(story: Story, **options: Any) -> Any:
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    return fit(story.program, guide, [story.args], TrajectoryBalance(4), **{"seed": 0, "progress": False, **options})


@pytest.mark.parametrize("rate", [1e300, 1e160, 1e308])
def test_weights_made_useless_are_blamed_on_the_learning_rate(story: Story, tmp_path: Path, rate: float) -> None:
    with pytest.raises(ValueError, match=r"step \d+: the learning rate \(1e\+\d+ at this step\) is too high.* Lower"):
        trained(story, steps=50, learning_rate=rate, warmup_steps=0)
    trained(story, steps=4, folder=tmp_path, checkpoint_every=2)

    def at_last(step: int, history: Any) -> None:
        if step == 6:
            with torch.no_grad():
                for layer in story.lm.transformer.modules():
                    for name, parameter in layer.named_parameters(recurse=False):
                        if "lora" not in name and parameter.requires_grad:
                            parameter.fill_(torch.nan)

    with pytest.raises(ValueError, match=r"The last good checkpoint is .*step-00000006-[0-9a-f]{16}\.pt"):
        trained(story, steps=20, folder=tmp_path, checkpoint_every=2, resume=True, callback=at_last)


def test_a_program_that_is_wrong_from_the_start_is_not_blamed_on_it(lm: LM) -> None:
    import pyro

    def program() -> None:
        pyro.sample("text", lm("a", max_tokens=2))
        pyro.factor("wrong", torch.tensor(torch.nan))

    guide = AutoregressiveGuide(program, lm, rank=2, seed=0)
    for objective in (TrajectoryBalance(4), LeaveOneOutELBO(4)):
        with pytest.raises(ValueError, match="(?i)nan") as caught:
            fit(program, guide, [()], objective, 3, progress=False)
        assert "learning rate" not in str(caught.value)


def test_a_programs_own_nan_of_a_later_step_is_not_blamed_on_it(lm: LM) -> None:
    import pyro

    calls = []

    def program() -> None:
        calls.append(1)
        pyro.sample("text", lm("a", max_tokens=2))
        pyro.factor("wrong", torch.tensor(0.0 if len(calls) < 12 else torch.nan))

    guide = AutoregressiveGuide(program, lm, rank=2, seed=0)
    steps: list[int] = []
    with pytest.raises(ValueError, match="(?i)nan") as caught:
        fit(program, guide, [()], TrajectoryBalance(4), 20, progress=False, callback=lambda n, history: steps.append(n))
    assert steps, "it was wrong from the start"
    assert "learning rate" not in str(caught.value)


def test_a_second_run_on_a_folder_is_refused_while_the_first_lives(story: Story, tmp_path: Path) -> None:
    def second(step: int, history: Any) -> None:
        with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} is in use: another run is writing"):
            trained(story, steps=2, folder=tmp_path, resume=True)

    trained(story, steps=2, folder=tmp_path, callback=second)
    trained(story, steps=3, folder=tmp_path, resume=True)  # free again
    with pytest.raises(RuntimeError, match="stop here"):
        trained(story, steps=9, folder=tmp_path, resume=True, callback=lambda step, history: stop())
    trained(story, steps=10, folder=tmp_path, resume=True)
    # Another process, which is killed: the system lets go of what it held.
    code = (
        "import sys, time\nfrom llmppl.training.run_folder import RunFolder\n"
        "folder = RunFolder(sys.argv[1])\nfolder.claim()\nprint('claimed', flush=True)\ntime.sleep(600)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "claimed\n"
    with pytest.raises(ValueError, match="is in use"):
        trained(story, steps=11, folder=tmp_path, resume=True)
    other.kill()
    other.communicate()
    trained(story, steps=11, folder=tmp_path, resume=True)


def stop() -> None:
    raise RuntimeError("stop here")


def test_a_path_that_is_a_file_where_a_folder_belongs_is_said_so(story: Story, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    pairs = simulate(story.program, [story.args], 2, seed=0, progress=False)
    calls: list[Any] = [
        lambda path: trained(story, steps=1, folder=path),
        lambda path: pairs.save(path),
        lambda path: guide.save(path / "guide.safetensors"),
    ]
    for call in calls:
        for path in (file, file / "below"):
            with pytest.raises((ValueError, OSError), match="is a file"):
                call(path)


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def nowhere(host: str, port: int) -> Any:
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("llmppl.network.servable.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    with pytest.raises(
        FileNotFoundError, match=r"'nobody/nothing' is no folder here.* cannot be reached .*Pass a folder"
    ):
        LM.from_pretrained("nobody/nothing")
    assert len(asked) == 1
