"""Samplers in processes of their own: what they draw, how old it is, and what becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Story, kl
from pyro import poutine
from torch import Tensor

from llmppl import Behaviour, RaySamplers, ReplayBuffer, fit, simulate, smc
from llmppl.guides import AutoregressiveGuide
from llmppl.network import pickling
from llmppl.objectives import TrajectoryBalance, WakeSleep
from llmppl.programs.observation_keys import key
from llmppl.training.history import History
from llmppl.training.minibatches import Minibatches
from llmppl.training.optimization import trained_parameters

ray = pytest.importorskip("ray", reason="pip install 'pyro-llmppl[ray]'")

# Ray starts its processes by a fork that another program takes over at once; JAX, where it is loaded, warns of forks.
pytestmark = pytest.mark.filterwarnings(r"ignore:os.fork\(\) was called:RuntimeWarning")

DATA = [("ab", "cd"), ("cde", "a"), ("d", "eb")]
PATIENCE = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One start of Ray for all tests of this file."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def replaying(**options: Any) -> TrajectoryBalance:
    return TrajectoryBalance(6, behaviour=Behaviour(replayed=0.5, buffer=ReplayBuffer(**options)))


def make_guide(story: Story) -> AutoregressiveGuide:
    return AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)


def drawing(samplers: RaySamplers, story: Story, guide: Any, objective: Any, rows: int = 0) -> Any:
    """The samplers of a run without its learner; with ``rows`` that many at a time, in a data plate."""
    trained = trained_parameters(story.program, guide, guide, DATA[0])
    return samplers.drawing(
        story.program, guide, trained, [], Minibatches(DATA, rows or 1, 0), objective, bool(rows), seed=0
    )


def until(done: Callable[[], Any]) -> None:
    start = time.monotonic()
    while not done():
        assert time.monotonic() - start < PATIENCE, "samplers have drawn nothing"
        time.sleep(0.02)


def entries(objective: Any, row: tuple[str, str] = DATA[0]) -> list[Any]:
    return list(objective.behaviour.buffer.of(*row))


def log_q(story: Story, guide: Any, row: tuple[str, str], texts: Tensor) -> Tensor:
    with torch.no_grad():
        return poutine.trace(guide).get_trace(*row).nodes["middle"]["fn"].log_prob(texts)


def pids() -> set[int]:
    """Processes of samplers."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::_Sampler"):
                found.add(int(folder.name))
    return found


def test_large_tensors_leave_a_pickle_once_and_come_back_as_one_object(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickling, "LARGE", 2000)
    whole = pickling.packed((story.lm, story.lm))
    kept = story.lm.transformer.lm_head.weight
    with pickling.set_apart([kept]) as apart:
        content = pickling.packed((story.lm, story.lm))
    assert apart
    assert sum(tensor.nbytes for tensor in apart.values()) == len(whole) - len(content) or len(content) < len(whole) / 2
    assert all(tensor is not kept for tensor in apart.values())
    assert len({id(tensor) for tensor in apart.values()}) == len(apart)
    with pickling.put_back(apart):
        first, second = pickling.unpacked(content)
    assert first is second
    texts, expected = story.joint()
    found = first("ab", max_tokens=3, stop=".").log_prob(texts) + first("ab", texts).log_prob(first.encode("cd"))
    torch.testing.assert_close(found, expected)
    with pytest.raises(Exception, match="elsewhere"):
        pickling.unpacked(content)


@pytest.mark.long
@pytest.mark.parametrize("rows", [0, 2])
def test_draws_are_the_guides_of_their_step_with_exact_scores(story: Story, cluster: None, rows: int) -> None:
    guide, objective = make_guide(story), replaying(capacity=200)
    texts, joint = story.joint()
    index = {tuple(text): n for n, text in enumerate(texts.tolist())}
    densities = {}
    with drawing(RaySamplers(1, refresh_every=4, max_staleness=6), story, guide, objective, rows) as exchange:
        for step in (0, 4, 8):
            densities[step] = log_q(story, guide, DATA[0], texts).clone()
            until(lambda step=step: exchange(step) and any(entry.step == step for entry in entries(objective)))
            with torch.no_grad():
                for parameter in guide.parameters():
                    if parameter.requires_grad:
                        parameter += 0.3 * torch.randn_like(parameter)
            exchange(step + 1)  # no new weights yet
    found = entries(objective)
    assert {entry.step for entry in found} <= {0, 4, 8}
    assert not torch.allclose(densities[0], densities[8], atol=0.1)
    for entry in found:
        place = index[tuple(entry.values["middle"].tolist())]
        assert entry.log_joint == pytest.approx(float(joint[place]), abs=1e-9)
        assert entry.log_joint - entry.log_weight == pytest.approx(float(densities[entry.step][place]), abs=1e-6)
        torch.testing.assert_close(entry.log_p.sum(), joint[place])
    assert {row for row in DATA if entries(objective, row)} == set(DATA)


@pytest.mark.long
def test_draws_of_the_prior_are_taken_and_replayed_until_they_are_too_old(story: Story, cluster: None) -> None:
    guide, objective = make_guide(story), replaying(capacity=200)
    texts, _ = story.joint()
    prior = {tuple(text): float(p) for text, p in zip(texts.tolist(), story.prior().log_prob(texts), strict=True)}
    with drawing(
        RaySamplers(1, refresh_every=100, max_staleness=3, draws="prior"), story, guide, objective
    ) as exchange:
        until(lambda: exchange(0) and entries(objective))
        until(lambda: exchange(3))
        for _ in range(10):
            assert exchange(4) == 0
            time.sleep(0.02)
        buffer = objective.behaviour.buffer
        for step, replayed in ((3, True), (4, False)):
            buffer.step = step
            assert any(buffer.draw(key(row), 4) for row in DATA) == replayed
    for entry in entries(objective):
        known = prior[tuple(entry.values["middle"].tolist())]
        assert entry.log_joint - entry.log_weight == pytest.approx(known, abs=1e-6)


@pytest.mark.long
def test_a_sampler_that_is_killed_is_replaced_and_may_search(story: Story, cluster: None) -> None:
    def search(program: Any, guide: Any) -> Any:
        return smc(program, guide, 40, progress=False)

    guide, objective = make_guide(story), replaying(capacity=1000)
    with drawing(RaySamplers(1, draws=search), story, guide, objective) as exchange:
        until(lambda: exchange(0))
        before = pids()
        assert len(before) == 1
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        until(lambda: not before & pids())
        until(lambda: exchange(8) and any(entry.step == 8 for entry in entries(objective)))
        assert pids()
    until(lambda: not pids())
    texts, joint = story.joint()
    exact = {tuple(text): float(p) for text, p in zip(texts.tolist(), joint, strict=True)}
    for entry in entries(objective):
        assert entry.log_joint == pytest.approx(exact[tuple(entry.values["middle"].tolist())], abs=1e-9)


@pytest.mark.long
def test_an_error_of_the_program_reaches_the_learner(story: Story, cluster: None) -> None:
    import pyro

    def program(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", story.lm(beginning, max_tokens=3, stop="."))
        if os.environ.get("LLMPPL_LEARNER") != "1":
            raise KeyError("no such word")
        pyro.sample("ending", story.lm(beginning, middle), obs=story.lm.encode(ending))

    os.environ["LLMPPL_LEARNER"] = "1"
    try:
        guide = AutoregressiveGuide(program, story.lm, rank=2, seed=0)
        with pytest.raises((KeyError, RuntimeError), match="no such word"):
            fit(program, guide, DATA, replaying(), 400, samplers=RaySamplers(1), seed=0, progress=False,
                callback=lambda step, history: time.sleep(0.05))  # fmt: skip
    finally:
        del os.environ["LLMPPL_LEARNER"]
    until(lambda: not pids())


def fitted(story: Story, steps: int, samplers: RaySamplers | None, **options: Any) -> tuple[History, Any, Any]:
    guide = AutoregressiveGuide(story.program, story.lm, rank=8, seed=0)
    objective = TrajectoryBalance(32, behaviour=Behaviour(0.25, 0.5, temperatures=(1.5, 3.0)))
    history = fit(story.program, guide, DATA[:1], objective, steps, samplers=samplers, seed=0, progress=False,
                  learning_rate=5e-3, **options)  # fmt: skip
    return history, guide, objective


def test_no_samplers_are_none(story: Story) -> None:
    (_, first, _), (_, second, _) = (fitted(story, 6, samplers) for samplers in (None, RaySamplers(0)))
    for own, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.long
def test_a_learner_of_samplers_reaches_the_posterior_and_says_how_old_its_draws_were(
    story: Story, cluster: None, tmp_path: Path
) -> None:
    def waits(step: int, history: History) -> None:
        if not sum(history.sampled):
            time.sleep(0.3)

    folder = str(tmp_path / "run")
    fitted(story, 60, RaySamplers(2, refresh_every=4, max_staleness=40), callback=waits, folder=folder)
    # Another number of samplers goes on with the run: none, here.
    history, guide, objective = fitted(story, 130, None, callback=waits, folder=folder, resume=True)
    assert len(history.loss) == 130
    assert sum(history.sampled[:60])
    ages = torch.tensor(history.staleness[:60])
    assert not ages.isnan().all()
    assert float(ages[~ages.isnan()].max()) <= 40
    assert "texts of samplers, replayed" in repr(history)
    assert objective.behaviour.buffer.max_staleness is None
    texts, joint = story.joint()
    exact = joint - joint.logsumexp(0)
    found = log_q(story, guide, DATA[0], texts)
    # Untrained, it is 6.4 and 5.1 nats away.
    assert kl(found, exact) < 0.3
    assert kl(exact, found) < 0.3


def test_what_samplers_cannot_do_is_said(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = make_guide(story)
    with pytest.raises(ValueError, match="objective=TrajectoryBalance has none. Pass a balance objective"):
        fit(story.program, guide, DATA, TrajectoryBalance(4), 2, samplers=RaySamplers(1), progress=False)
    with pytest.raises(ValueError, match="objective=WakeSleep has none"):
        fit(story.program, guide, DATA, WakeSleep(4), 2, samplers=RaySamplers(1), progress=False)
    with pytest.raises(ValueError, match="data= is a stream"):
        fit(story.program, guide, simulate(story.program, DATA), replaying(), 2, samplers=RaySamplers(1),
            progress=False)  # fmt: skip
    for name in ("num", "max_staleness"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            RaySamplers(**{name: -1})
        for wrong in (1.5, True):
            with pytest.raises(TypeError, match=f"{name} must be a whole number, got {wrong}"):
                RaySamplers(**{name: wrong})
    for name in ("refresh_every", "num_samples", "threads"):
        with pytest.raises((TypeError, ValueError), match=name):
            RaySamplers(1, **{name: 0})
    with pytest.raises(ValueError, match=r"draws='guides' must be one of \('guide', 'prior'\)"):
        RaySamplers(1, draws="guides")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-llmppl\[ray\]'"):
        RaySamplers(1)
    assert RaySamplers(0).num == 0


INTERRUPTED = """
import time, pyro, torch
from llmppl import Behaviour, RaySamplers, fit
from llmppl.guides import AutoregressiveGuide
from llmppl.objectives import TrajectoryBalance
from llmppl.testing import tiny_lm

torch.set_num_threads(1)
lm = tiny_lm()

def story(beginning, ending):
    middle = pyro.sample("middle", lm(beginning, max_tokens=3, stop="."))
    pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

def told(step, history):
    time.sleep(0.05)
    if sum(history.sampled):
        print("sampled", flush=True)

guide = AutoregressiveGuide(story, lm, rank=2, seed=0)
fit(story, guide, [("ab", "cd")], TrajectoryBalance(4, behaviour=Behaviour(replayed=1.0)), 10**6,
    samplers=RaySamplers(1), progress=False, callback=told)
"""


@pytest.mark.long
def test_an_interrupt_leaves_no_process_behind(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    # What starts the tests in the background has its processes ignore interrupts.
    heeds = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script.write_text(heeds + INTERRUPTED)
    environment = {**os.environ, "LLMPPL_TEST_RUN": str(tmp_path)}
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env=environment, start_new_session=True)  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline() == "sampled\n", run.communicate()[1]
    assert len(descendants(tmp_path)) > 3  # Ray's own among them
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    _, errors = run.communicate(timeout=PATIENCE)
    assert "KeyboardInterrupt" in errors
    until(lambda: not descendants(tmp_path))


def descendants(marker: Path) -> set[int]:
    """Processes that have the environment of a test."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                own = (folder / "environ").read_bytes()
            except OSError:
                continue
            if f"LLMPPL_TEST_RUN={marker}".encode() in own:
                found.add(int(folder.name))
    return found
