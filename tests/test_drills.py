"""What goes wrong in practice, said by name: learning rates, folders, processes, hubs that cannot be reached."""

from __future__ import annotations

import importlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Story
from huggingface_hub import constants

import llmppl
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


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("damaged", 60),
        ("hostile", 60),
        pytest.param("full_disk", 15, marks=pytest.mark.long),
        pytest.param("fuzzed", 120, marks=pytest.mark.long),
        ("fuzzed", -1),
    ],
)
def test_a_short_drill(name: str, count: int) -> None:
    drill = importlib.import_module(name)
    done = drill.run(60, 3, ("torch",)) if count < 0 else drill.run(count, 0)
    assert done.tried == done.count
    assert not done.failures, "\n".join(done.failures)


@pytest.fixture
def heeding_interrupts() -> Iterator[None]:
    """What starts the tests in the background has its processes ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Stopping:
    """A program that presses Ctrl-C at some of its calls, in the middle of a step."""

    def __init__(self, program: Any, *moments: int) -> None:
        self.program, self.moments, self.calls = program, moments, 0

    def __call__(self, beginning: Any, ending: Any) -> None:
        self.calls += 1
        if self.calls in self.moments:
            os.kill(os.getpid(), signal.SIGINT)
        self.program(beginning, ending)


@pytest.mark.usefixtures("heeding_interrupts")
@pytest.mark.parametrize("where", ["program", "callback", "raised by a callback"])
def test_ctrl_c_ends_the_step_and_loses_none(tmp_path: Path, where: str) -> None:
    small = importlib.import_module("small_run").SmallRun()
    differs = importlib.import_module("training_run").differs
    own, counted = small.program, Stopping(small.program)
    small.program = counted
    wanted = small.train(tmp_path / "wanted", 7)

    def callback(step: int, history: Any) -> None:
        if where != "program" and step == 3:
            if where == "callback":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                raise KeyboardInterrupt

    small.program = Stopping(own, counted.calls - 2) if where == "program" else own
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match=rf"stopped after step \d; resume=True goes on.*{folder}") as caught:
        small.train(folder, 7, checkpoint_every=100, callback=callback)
    step = int(re.findall(r"step (\d)", str(caught.value))[0])
    assert step == 3 if where != "program" else 1 <= step < 7
    assert [int(file.name.split("-")[1]) for file in folder.glob("step-*.pt")] == [step]
    small.program = own
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not differs(wanted, small.train(folder, 7, checkpoint_every=100))


@pytest.mark.usefixtures("heeding_interrupts")
@pytest.mark.parametrize("folder", [True, False])
def test_a_second_ctrl_c_or_one_without_a_folder_does_not_wait(tmp_path: Path, folder: bool) -> None:
    small = importlib.import_module("small_run").SmallRun()
    own, counted = small.program, Stopping(small.program)
    small.program = counted
    small.train(tmp_path / "wanted", 7)
    last = counted.calls - 1  # a step calls it twice
    small.program = stopping = Stopping(own, last) if not folder else Stopping(own, last, last + 1)
    path = tmp_path / "run" if folder else None
    with pytest.raises(KeyboardInterrupt) as caught:
        small.train(path, 7, checkpoint_every=100, resume=folder)
    assert stopping.calls == last + folder
    assert not str(caught.value)
    assert path is None or not list(path.glob("step-*.pt"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_refused_run_lets_go_of_its_folder(story: Story, tmp_path: Path) -> None:
    trained(story, steps=2, folder=tmp_path)
    with pytest.raises(ValueError, match="resume=True") as kept:
        trained(story, steps=2, folder=tmp_path)
    trained(story, steps=3, folder=tmp_path, resume=True)  # although the error, as a notebook does, keeps its frames
    assert kept.traceback


def test_what_was_drawn_before_a_run_is_none_of_its_numbers(tmp_path: Path) -> None:
    small = importlib.import_module("small_run").SmallRun()
    differs = importlib.import_module("training_run").differs
    wanted = small.train(tmp_path / "first")
    small.pairs(3000)
    assert small.lm.drawn
    assert not differs(wanted, small.train(tmp_path / "second"))


def test_a_flipped_bit_of_a_guide_or_a_set_is_seen(tmp_path: Path) -> None:
    small = importlib.import_module("small_run").SmallRun()
    small.guide.save(tmp_path / "guide.safetensors")
    small.pairs().save(tmp_path)
    for file, load in (
        (tmp_path / "guide.safetensors", small.guide.load),
        (tmp_path / "pairs.safetensors", lambda path: llmppl.SimulatedSet.load(path.parent)),
    ):
        load(file)
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file.name} is damaged.*its bytes are not those that were written"):
            load(file)
