"""fit() over long runs: checkpoints, resumption, evaluation, early stopping, accumulation, metrics."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from conftest import Story
from long_run import DATA, HELD_OUT, STEPS, train

from llmppl import Behaviour, Evaluation, exact_posterior, fit
from llmppl.guides import AutoregressiveGuide, GFlowNetGuide
from llmppl.objectives import LeaveOneOutELBO, SubTrajectoryBalance, TrajectoryBalance
from llmppl.programs.structure import Program, structure
from llmppl.training.history import COLUMNS, History
from llmppl.training.run_folder import RunFolder

ROOT = Path(__file__).parent.parent


def same(first: Any, second: Any, place: str = "") -> None:
    """Equal bit for bit, whatever is inside, but for the seconds."""
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, place
        np.testing.assert_array_equal(first.detach().numpy(), second.detach().numpy(), err_msg=place)
    elif isinstance(first, dict):
        assert list(first) == list(second), place
        for key in first:
            if key != "seconds":
                same(first[key], second[key], f"{place}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), place
        for n, (one, other) in enumerate(zip(first, second, strict=True)):
            same(one, other, f"{place}/{n}")
    else:
        np.testing.assert_equal(first, second, err_msg=place)


def same_run(one: tuple[GFlowNetGuide, History], other: tuple[GFlowNetGuide, History]) -> None:
    same(one[0].tensors(), other[0].tensors())
    same(one[1].state_dict(), other[1].state_dict())


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]


# --- resumption ----------------------------------------------------------------------------------


def replaying() -> SubTrajectoryBalance:
    """A buffer, random temperatures and simulated observations: everything that a step may draw."""
    return SubTrajectoryBalance(3, behaviour=Behaviour(tempered=0.4, replayed=0.4, sleep=0.3))


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        {"vectorize_data": False, "objective": replaying},
        {"evaluation": None, "objective": lambda: LeaveOneOutELBO(3), "batch_size": 5},
    ],
    ids=["learned, accumulated, evaluated", "one by one, replayed", "plain"],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, changes: dict) -> None:
    straight = train(str(tmp_path / "a"), steps=8, checkpoint_every=100, **changes)
    train(str(tmp_path / "b"), steps=4, checkpoint_every=100, **changes)
    torch.rand(7), np.random.rand(7)  # noqa: NPY002
    resumed = train(str(tmp_path / "b"), steps=8, checkpoint_every=100, resume=True, **changes)
    same_run(straight, resumed)
    one, other = (RunFolder(tmp_path / name).load() for name in "ab")
    # Optimizer, schedule, order of the data, random states.
    same(one, other)
    assert [line["step"] for line in metrics(tmp_path / "b") if line["event"] == "step"] == list(range(1, 9))
    again = train(str(tmp_path / "b"), steps=8, resume=True, **changes)
    same_run(straight, again)


def test_the_cosine_schedule_resumes_too_but_for_other_steps(tmp_path: Path) -> None:
    run = {"schedule": "cosine", "evaluation": None, "checkpoint_every": 3, "warmup_steps": 2}
    straight = train(None, steps=8, **run)

    def stop(step: int, history: History) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(str(tmp_path), steps=8, callback=stop, **run)
    same_run(straight, train(str(tmp_path), steps=8, resume=True, **run))
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * n / 6)) for n in range(6)]
    assert straight[1].learning_rate == pytest.approx([1e-2 * factor for factor in expected])
    with pytest.raises(ValueError, match="its steps is 8, this one's is 9"):
        train(str(tmp_path), steps=9, resume=True, **run)


def test_parameters_of_the_model_and_of_numpy_samplers_resume(tmp_path: Path, story: Story) -> None:
    def program(beginning: str, ending: str) -> None:
        weight = pyro.param("weight", torch.tensor(0.5), constraint=pyro.distributions.constraints.positive)
        middle = pyro.sample("middle", story.lm(beginning, max_tokens=2, stop="."))
        pyro.factor("taste", weight * float(np.random.rand()))  # noqa: NPY002
        pyro.sample("ending", story.lm(beginning, middle), obs=story.lm.encode(ending))

    def run(folder: str, steps: int) -> float:
        pyro.clear_param_store()
        guide = AutoregressiveGuide(program, story.lm, rank=1, seed=0)
        options = {"learning_rate": 0.05, "seed": 0, "progress": False, "resume": True}
        fit(program, guide, DATA, LeaveOneOutELBO(2), steps, folder=tmp_path / folder, **options)
        return pyro.param("weight").item()

    straight = run("a", 4)
    assert run("b", 2) != straight
    assert run("b", 4) == straight > 0.51


@pytest.mark.long
def test_killed_at_random_moments_it_ends_as_the_uninterrupted_run(tmp_path: Path) -> None:
    """SIGKILL, twice at any time and twice while a checkpoint is being written, then to the end."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    script = [sys.executable, str(Path(__file__).parent / "long_run.py"), str(tmp_path), "0"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed") >= 2, done.stdout
    guide, history = train(None)
    same(torch.load(tmp_path / "final", weights_only=True), guide.tensors())
    steps = [line for line in metrics(tmp_path) if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in steps] == history.loss
    evaluated = [line["step"] for line in metrics(tmp_path) if line["event"] == "evaluation"]
    assert evaluated == list(range(0, STEPS + 1, 4))
    assert not list(tmp_path.glob("*.tmp-*"))


# --- damage --------------------------------------------------------------------------------------


def test_half_written_and_damaged_checkpoints_give_way_to_the_one_before(tmp_path: Path) -> None:
    options = {"checkpoint_every": 2, "evaluation": None}
    straight = train(None, steps=8, **options)
    train(str(tmp_path), steps=6, **options)
    newest, before = RunFolder(tmp_path).checkpoints()
    assert newest.name.startswith("step-00000006-")
    assert before.name.startswith("step-00000004-")
    (tmp_path / (newest.name + ".tmp-abc")).write_bytes(b"half")
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=rf"{newest.name} is damaged.*{before.name} is used"):
        resumed = train(str(tmp_path), steps=8, resume=True, **options)
    same_run(straight, resumed)
    assert not list(tmp_path.glob("*.tmp-*"))
    assert (tmp_path / (newest.name + ".damaged")).exists()
    assert len(RunFolder(tmp_path).checkpoints()) == 2
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 9))


def test_a_single_flipped_bit_is_damage_and_all_damaged_is_an_error(tmp_path: Path) -> None:
    options = {"checkpoint_every": 1, "evaluation": None}
    train(str(tmp_path), steps=2, **options)
    for file in RunFolder(tmp_path).checkpoints():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    for _ in range(2):  # and stays one
        with pytest.raises(ValueError, match="every checkpoint in .* is damaged"):
            train(str(tmp_path), steps=3, resume=True, **options)


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_on_a_full_disk_training_goes_on_and_the_old_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"checkpoint_every": 2, "evaluation": None}
    straight = train(None, steps=8, **options)
    train(str(tmp_path), steps=2, **options)

    def between(step: int, history: History) -> None:
        if step == 3:
            monkeypatch.setattr(os, "fsync", full_disk)
        if step == 7:
            monkeypatch.undo()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        full = train(str(tmp_path), steps=6, resume=True, callback=between, **options)
    for step, warning in zip((4, 6), caught, strict=True):
        assert f"no checkpoint could be written to {tmp_path} at step {step}" in str(warning.message)
        assert "No space left on device" in str(warning.message)
    same(full[1].loss, straight[1].loss[:6])
    state = RunFolder(tmp_path).load()
    assert state is not None
    assert state["step"] == 2
    assert not list(tmp_path.glob("*.tmp-*"))
    # The run is resumed from there, and the disk has room again after a step.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = train(str(tmp_path), steps=8, resume=True, callback=between, **options)
    # Where the metrics cannot be cut they are as they were.
    assert [str(w.message)[:10] for w in caught] == ["metrics of", "no checkpo", "no checkpo"]
    same_run(straight, resumed)
    state = RunFolder(tmp_path).load()
    assert state is not None
    assert state["step"] == 8


def test_metrics_that_cannot_be_written_warn_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.warns(UserWarning, match="metrics of .* cannot be written") as caught:
        train(str(tmp_path), steps=3, evaluation=None)
    assert len(caught) == 1


def test_a_state_that_cannot_be_read_back_is_refused_when_written(tmp_path: Path) -> None:
    class Stateful(LeaveOneOutELBO):
        value: Any = 1

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

    objective = Stateful(2)
    train(str(tmp_path / "a"), steps=1, evaluation=None, objective=objective)
    objective.value = 2
    train(str(tmp_path / "a"), steps=2, evaluation=None, objective=objective, resume=True)
    assert objective.value == 1
    objective.value = Path()
    with pytest.raises(TypeError, match=r"Change what objective.state_dict\(\) returns"):
        train(str(tmp_path / "b"), steps=1, evaluation=None, objective=objective)


# --- another run ---------------------------------------------------------------------------------

OTHERS = {
    "rank": ({"rank": 3}, "guide's rank is 2, this one's is 3"),
    "model": ({"lm_seed": 1}, "language model's weights is"),
    "objective": ({"objective": LeaveOneOutELBO(3)}, "objective is 'TrajectoryBalance', this one's is 'Leave"),
    "particles": (
        {"objective": TrajectoryBalance(4, log_partition="learned")},
        "objective's num_particles is 3, this one's is 4",
    ),
    "data": ({"data": [*DATA[:-1], ("ab", "cc")]}, "its data is"),
    "number of data": ({"data": DATA[:-1]}, "its number of data is 5, this one's is 4"),
    "learning rate": ({"learning_rate": 0.1}, "its learning_rate is 0.01, this one's is 0.1"),
    "batch size": ({"batch_size": 3}, "its batch_size is 2, this one's is 3"),
    "accumulate": ({"accumulate": 2}, "its accumulate is 1, this one's is 2"),
    "schedule": ({"schedule": "cosine"}, "its schedule is 'constant', this one's is 'cosine'"),
    "evaluation": ({"evaluation": Evaluation(HELD_OUT, every=2)}, "its evaluation is None"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(str(folder), steps=1, evaluation=None)
    return folder


@pytest.mark.parametrize("case", OTHERS)
def test_a_folder_of_another_run_is_refused_by_name(finished: Path, case: str) -> None:
    changes, message = OTHERS[case]
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    with pytest.raises(ValueError, match=f"belongs to another run: .*{message}"):
        train(str(finished), **{"steps": 2, "evaluation": None, "resume": True, **changes})
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_bad_arguments_are_named(finished: Path) -> None:
    with pytest.raises(ValueError, match="holds the checkpoints of a run already. Pass resume=True"):
        train(str(finished), steps=2, evaluation=None)
    for changes, error, message in [
        ({"resume": True}, ValueError, "resume=True needs folder="),
        ({"schedule": "linear"}, ValueError, "schedule='linear' must be one of"),
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1"),
        ({"target_temperature": 2.0}, TypeError, "LeaveOneOutELBO cannot"),
    ]:
        with pytest.raises(error, match=message):
            train(None, **{"steps": 1, "objective": LeaveOneOutELBO(2), "evaluation": None, **changes})
    for settings, message in [
        ({"data": []}, "Evaluation.data is empty"),
        ({"every": 0}, "every must be at least 1"),
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"patience": 0}, "patience must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Evaluation(**{"data": HELD_OUT, **settings})
    with pytest.raises(ValueError, match="references= has 1 values of log Z, but there are 2"):
        train(None, steps=1, evaluation=Evaluation(HELD_OUT, references=[0.0]))


# --- evaluation ----------------------------------------------------------------------------------


def test_evaluation_changes_nothing_of_the_training(tmp_path: Path) -> None:
    plain = train(None, steps=6, evaluation=None)
    evaluated = train(None, steps=6, evaluation=Evaluation(HELD_OUT, every=2, num_samples=5, simulations=2))
    same(plain[0].tensors(), evaluated[0].tensors())
    same([getattr(plain[1], name) for name in COLUMNS[:-1]], [getattr(evaluated[1], name) for name in COLUMNS[:-1]])
    assert [item.step for item in evaluated[1].evaluations] == [0, 2, 4, 6]


def test_the_held_out_gap_is_that_of_enumeration_and_falls(story: Story) -> None:
    """With 100 samples each the gap is exact to 4 of its standard errors; training closes most of it."""
    guide = AutoregressiveGuide(story.program, story.lm, rank=4, seed=0)
    truth = [float(exact_posterior(story.program)(*x).log_evidence) for x in DATA]

    def exact_gap() -> float:
        gaps = []
        for x, log_z in zip(DATA, truth, strict=True):
            texts, log_joint = story.joint(*x)
            log_q = structure(guide, x, {}).nodes["middle"]["fn"].log_prob(texts).detach()
            gaps.append(log_z - float((log_q.exp() * (log_joint - log_q)).sum()))
        return float(np.mean(gaps))

    before = exact_gap()
    evaluation = Evaluation(DATA, every=20, num_samples=100, references=truth)
    run = {"batch_size": 5, "vectorize_data": True, "learning_rate": 3e-3, "seed": 0, "progress": False}
    history = fit(story.program, guide, DATA, TrajectoryBalance(8), 40, evaluation=evaluation, **run)
    first, _, last = history.evaluations
    for found, expected in ((first, before), (last, exact_gap())):
        assert found.gap == pytest.approx(expected, abs=4 * found.gap_error)
        assert found.kl_q_p[0] < found.kl_q_p[1]
    assert last.gap < 0.5 * first.gap
    assert f"held-out gap {first.gap:.2f} at step 0, {last.gap:.2f} at step 40" in repr(history)
    ax = history.plot()
    assert [other.get_ylabel() for other in ax.figure.axes] == ["ELBO (nats)", "gap (nats)"]


def test_earlier_gaps_are_taken_again_with_the_better_log_evidence() -> None:
    _, history = train(None, steps=8, evaluation=Evaluation(HELD_OUT, every=2, num_samples=16))
    found = history.evaluations
    log_z = [item.gap + item.elbo for item in found]
    assert log_z == pytest.approx([log_z[0]] * len(found))
    assert log_z[0] >= max(item.log_evidence for item in found)


def test_training_stops_on_the_gap_and_puts_the_best_parameters_back(tmp_path: Path) -> None:
    # A learning rate that grows until it destroys the guide.
    options = {
        "data": HELD_OUT,
        "objective": TrajectoryBalance(6),
        "steps": 60,
        "learning_rate": 2.0,
        "warmup_steps": 200,
        "evaluation": Evaluation(HELD_OUT, every=3, num_samples=64, patience=2),
    }
    guide, history = train(str(tmp_path), **options)
    gaps = {item.step: item.gap for item in history.evaluations}
    best = history.restored
    assert best == min(gaps, key=lambda step: gaps[step])
    assert 0 < best < len(history.loss) == best + 6
    assert list(gaps) == list(range(0, best + 7, 3))
    assert f"stopped early, the parameters are those of step {best}" in repr(history)
    # What was put back is what a run of so many steps ends with.
    shorter, _ = train(None, **{**options, "steps": best, "evaluation": None})
    same(guide.tensors(), shorter.tensors())
    # A stopped run stays stopped; with more patience it goes on from where it stopped, not from the best.
    again = train(str(tmp_path), **options, resume=True)
    same_run((guide, history), again)
    assert again[1].restored == best
    patient = {**options, "evaluation": Evaluation(HELD_OUT, every=3, num_samples=64, patience=3)}
    more = train(str(tmp_path), **patient, resume=True)
    straight = train(None, **patient)
    same_run(straight, more)
    assert len(more[1].loss) > len(history.loss)


def test_programs_with_factors_are_evaluated_without_simulations(story: Story) -> None:
    def program(beginning: str, ending: str) -> None:
        story.program(beginning, ending)
        pyro.factor("verifier", torch.tensor(0.5))

    def run(evaluation: Evaluation) -> History:
        guide = AutoregressiveGuide(program, story.lm, rank=1)
        return fit(program, guide, DATA, TrajectoryBalance(2), 1, progress=False, evaluation=evaluation)

    with pytest.raises(ValueError, match=r"Evaluation\(simulations=0\)"):
        run(Evaluation(HELD_OUT, num_samples=2))
    history = run(Evaluation(HELD_OUT, num_samples=2, simulations=0))
    assert all(math.isnan(bound) for bound in history.evaluations[0].kl_q_p)


# --- steps ---------------------------------------------------------------------------------------


class Exact(TrajectoryBalance):
    """KL(q‖p) by enumeration: a loss without chance."""

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.diagnostics = {}
        fn = structure(guide, args, kwargs).nodes["middle"]["fn"]
        texts = fn.enumerate_support(expand=False) if fn.batch_shape == () else fn.enumerate_support()
        log_q = fn.log_prob(texts)
        return (log_q.exp() * log_q).sum()


@pytest.mark.parametrize("vectorize_data", [False, True])
def test_accumulated_gradients_are_those_of_one_large_batch(vectorize_data: bool) -> None:
    """To rounding: the sums are taken in another order."""
    common = {"steps": 3, "objective": Exact(2), "evaluation": None, "vectorize_data": vectorize_data}
    large = train(None, batch_size=4, accumulate=1, **common)
    small = train(None, batch_size=1, accumulate=4, **common)
    assert large[1].gradient_norm == pytest.approx(small[1].gradient_norm, rel=1e-9)
    assert large[1].loss == pytest.approx(small[1].loss, rel=1e-9)
    assert large[1].gradient_norm[0] > 0.01
    for one, other in zip(large[0].tensors().values(), small[0].tensors().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_every_step_and_evaluation_has_one_line_of_metrics(tmp_path: Path) -> None:
    _, history = train(str(tmp_path), steps=5, evaluation=Evaluation(HELD_OUT, every=2, num_samples=4))
    lines = metrics(tmp_path)
    assert [(line["event"], line["step"]) for line in lines] == [
        ("evaluation", 0),
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("step", 3),
        ("step", 4),
        ("evaluation", 4),
        ("step", 5),
    ]
    steps = [line for line in lines if line["event"] == "step"]
    for name in COLUMNS:
        assert [line[name] for line in steps] == getattr(history, name)
    assert {"gap", "gap_error", "elbo", "ess", "kl_q_p", "kl_p_q"} <= set(lines[0])


def test_tensorboard_gets_the_numbers_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert purge_step == 1
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step))

        def close(self) -> None:
            written.append(("closed", 0))

    module = type(sys)("tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(str(tmp_path), steps=2)
    assert ("evaluation/gap", 0) in written
    assert [name for name, step in written if step == 2] == [f"step/{name}" for name in COLUMNS]
    assert written[-1] == ("closed", 0)


def test_the_target_temperature_follows_the_step_and_is_one_in_the_end() -> None:
    class Tempered(TrajectoryBalance):
        target_temperature = 1.0

        def differentiable_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(self.target_temperature)
            return super().differentiable_loss(*args, **kwargs)

    seen: list[float] = []
    objective = Tempered(2)
    options = {"objective": objective, "evaluation": None}
    train(None, steps=3, target_temperature=lambda step: 2.0 - step / 2, **options)
    assert seen == [2.0, 1.5, 1.0]
    train(None, steps=1, target_temperature=3.0, **options)
    assert seen[-1] == 3.0
    assert objective.target_temperature == 1.0
    with pytest.raises(ValueError, match="target_temperature must be positive, got 0.0 at step 1"):
        train(None, steps=3, target_temperature=lambda step: 1.0 - step, **{**options})
    assert objective.target_temperature == 1.0
