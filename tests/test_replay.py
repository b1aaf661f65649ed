"""Behaviour policies and the replay buffer."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from conftest import Story

from llmppl import Behaviour, ReplayBuffer, fit
from llmppl.guides import AutoregressiveGuide, GFlowNetGuide
from llmppl.objectives import SubTrajectoryBalance, TrajectoryBalance
from llmppl.programs.observation_keys import key
from llmppl.programs.particles import run_particles
from llmppl.programs.plates import in_data_plate

DATA = [("ab", "cd"), ("cde", "a"), ("d", "eb")]


def config(*tokens: int) -> dict[str, torch.Tensor]:
    return {"middle": torch.tensor(tokens)}


def test_shares_hold_on_average_and_heat_lies_in_its_range() -> None:
    behaviour = Behaviour(tempered=0.3, replayed=0.25, temperatures=(0.5, 2.0))
    counts, heats = [], []
    for _ in range(2000):
        replayed, temperatures = behaviour.plan(6)
        hot = temperatures[temperatures != 1]
        counts.append((replayed, len(hot)))
        heats.append(hot)
    heat = torch.cat(heats)
    mean = torch.tensor(counts, dtype=torch.float64).mean(0) / 6
    # A count varies by at most one, so its mean over 2000 steps has a standard error below 0.002.
    assert mean.tolist() == pytest.approx([0.25, 0.3], abs=0.01)
    assert 0.5 <= float(heat.min()) < 0.52
    assert 1.95 < float(heat.max()) <= 2.0
    assert float(heat.log().mean()) == pytest.approx(0.0, abs=0.03)
    assert behaviour.on_policy == pytest.approx(0.45)


def test_the_buffer_holds_nothing_twice_and_no_more_than_its_bounds() -> None:
    buffer = ReplayBuffer(capacity=3, observations=2, priority="log_joint")
    for n, joint in enumerate([-5.0, -1.0, -3.0, -2.0, -9.0]):
        buffer.add("x", config(n, 0), joint, 0.0)
    buffer.add("x", config(2, 0), -3.5, 0.0)
    own = buffer._ranked("x")
    assert [e.log_joint for e in own] == [-1.0, -2.0, -3.5]
    assert len(buffer) == 3
    buffer.add("y", config(1), 0.0, 0.0)
    buffer.add("x", config(1, 0), -1.0, 0.0)
    buffer.add("z", config(1), 0.0, 0.0)
    assert buffer.draw("y", 3) == []  # the observation seen least recently
    assert len(buffer.draw("x", 9)) == 3


def test_priorities_rank_what_is_drawn() -> None:
    counts = {}
    for priority in ("log_joint", "log_weight", "uniform"):
        buffer = ReplayBuffer(priority=priority)
        buffer.add("x", config(1), -1.0, -9.0)
        buffer.add("x", config(2), -5.0, 3.0)
        drawn = [int(buffer.draw("x", 1)[0]["middle"]) for _ in range(3000)]
        counts[priority] = drawn.count(1) / 3000
    # By rank: two thirds for the first; standard error 0.009.
    assert counts["log_joint"] == pytest.approx(2 / 3, abs=0.035)
    assert counts["log_weight"] == pytest.approx(1 / 3, abs=0.035)
    assert counts["uniform"] == pytest.approx(1 / 2, abs=0.035)


def test_a_buffer_survives_its_state(tmp_path) -> None:
    buffer = ReplayBuffer(capacity=4)
    for n in range(6):
        buffer.add(f"x{n % 2}", config(n, 1), -float(n), float(n))
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    other = ReplayBuffer(capacity=4)
    other.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert repr(other) == repr(buffer)
    pyro.set_rng_seed(0)
    first = buffer.draw("x1", 2)
    pyro.set_rng_seed(0)
    second = other.draw("x1", 2)
    assert [v["middle"].tolist() for v in first] == [v["middle"].tolist() for v in second]


@pytest.mark.parametrize("data_plate", [False, True])
def test_replayed_particles_are_the_buffers_and_the_rest_the_guides(story: Story, data_plate: bool) -> None:
    buffer = ReplayBuffer()
    planted = {x: f"{'abcde'[n]}a." for n, x in enumerate(DATA)}
    for x, text in planted.items():
        buffer.seed(story.program, x, middle=[text])
    objective = TrajectoryBalance(4, behaviour=Behaviour(replayed=0.25, buffer=buffer))
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    model, proposal, args = story.program, guide, DATA[0]
    if data_plate:
        model, proposal = in_data_plate(model), in_data_plate(guide)
        args = tuple(map(list, zip(*DATA, strict=True)))
    call = objective.prepare(model, proposal, args, {})
    with torch.no_grad():
        particles = run_particles(model, proposal, args, {}, 4, call.handler)
    middles = particles.guide_trace.nodes["middle"]["value"]
    rows = DATA if data_plate else DATA[:1]
    first = middles[0] if data_plate else middles[:1]
    assert story.lm.decode(first) == [planted[x] for x in rows]
    assert middles.shape == (4, 3, 3) if data_plate else (4, 3)
    assert call.on_policy.tolist() == [False, True, True, True]
    # They are scored as any other: by the guide's own distribution.
    fn = particles.guide_trace.nodes["middle"]["fn"]
    torch.testing.assert_close(fn.with_context(fn.context, fn.adapter).log_prob(middles), particles.log_q)


def test_a_row_without_replays_draws_in_their_place(story: Story) -> None:
    buffer = ReplayBuffer()
    buffer.seed(story.program, DATA[0], middle=["aaa", "bbb"])
    objective = TrajectoryBalance(4, behaviour=Behaviour(replayed=0.5, buffer=buffer))
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    args = tuple(map(list, zip(*DATA, strict=True)))
    model, proposal = in_data_plate(story.program), in_data_plate(guide)
    call = objective.prepare(model, proposal, args, {})
    particles = run_particles(model, proposal, args, {}, 4, call.handler)
    middles = story.lm.decode(particles.guide_trace.nodes["middle"]["value"])
    assert {middles[0][0], middles[1][0]} == {"aaa", "bbb"}
    assert {row[1] for row in middles[:2]} != {"aaa", "bbb"}


def test_rows_with_different_numbers_of_replays_keep_all_of_theirs(story: Story) -> None:
    buffer = ReplayBuffer()
    buffer.seed(story.program, DATA[0], middle=["aaa", "bbb"])
    for x in DATA[1:]:
        buffer.seed(story.program, x, middle=["ccc"])
    objective = TrajectoryBalance(4, behaviour=Behaviour(replayed=0.5, buffer=buffer))
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    args = tuple(map(list, zip(*DATA, strict=True)))
    model, proposal = in_data_plate(story.program), in_data_plate(guide)
    call = objective.prepare(model, proposal, args, {})
    particles = run_particles(model, proposal, args, {}, 4, call.handler)
    middles = story.lm.decode(particles.guide_trace.nodes["middle"]["value"])
    assert {middles[0][0], middles[1][0]} == {"aaa", "bbb"}
    assert middles[0][1:] == ["ccc", "ccc"]
    assert middles[1][1:] != ["ccc", "ccc"]


def test_what_was_seen_is_remembered_under_its_own_observation(story: Story) -> None:
    behaviour = Behaviour(replayed=0.25)
    objective = TrajectoryBalance(8, behaviour=behaviour)
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    args = tuple(map(list, zip(*DATA, strict=True)))
    objective.loss(in_data_plate(story.program), in_data_plate(guide), *args)
    assert behaviour.buffer is not None
    for x in DATA:
        entries = behaviour.buffer.of(*x)
        assert 1 <= len(entries) <= 8
        for entry in entries:
            middle = entry.values["middle"]
            joint = story.prior(x[0]).log_prob(middle) + story.lm(x[0], middle).log_prob(story.lm.encode(x[1]))
            assert entry.log_joint == pytest.approx(float(joint), abs=1e-4)
    # One by one or in a plate: one observation has one name.
    names = set(behaviour.buffer.state_dict()["entries"])
    objective.loss(story.program, guide, *DATA[0])
    assert set(behaviour.buffer.state_dict()["entries"]) == names
    assert key(("a", 2, torch.tensor([1, -1]))) == key(["a", torch.tensor(2.0), torch.tensor([1])])


@pytest.mark.parametrize("log_partition", ["vargrad", "learned"])
@pytest.mark.parametrize("data_plate", [False, True])
def test_sleep_takes_a_simulated_observation_with_its_exact_draw(
    story: Story, log_partition: str, data_plate: bool
) -> None:
    objective = TrajectoryBalance(4, log_partition=log_partition, behaviour=Behaviour(tempered=0.5, sleep=1.0))
    guide = GFlowNetGuide(story.program, story.lm, rank=2, seed=0)
    model, proposal, args = story.program, guide, DATA[0]
    if data_plate:
        model, proposal = in_data_plate(model), in_data_plate(guide)
        args = tuple(map(list, zip(*DATA, strict=True)))
    endings = set()
    for seed in range(6):
        pyro.set_rng_seed(seed)
        call = objective.prepare(model, proposal, args, {})
        particles = run_particles(call.model, call.guide, args, {}, 4, call.handler)
        seen = particles.model_trace.nodes["ending"]["value"]
        told = particles.guide_trace.nodes["middle"]["fn"].context
        row = seen.reshape(-1, seen.shape[-1])[0]
        row = row[row >= 0]
        # The guide is told what was simulated, as the first piece of its context.
        assert told.reshape(-1, told.shape[-1])[0, : len(row)].tolist() == row.tolist()
        endings.add(tuple(row.tolist()))
        assert not bool(call.on_policy[0])
    assert len(endings) > 1
    assert math.isfinite(objective.loss_and_grads(model, proposal, *args))


def test_sleep_draws_are_exact_posterior_draws(story: Story) -> None:
    """The first particle given its simulated ending, over all endings, has the law of the program."""
    objective = TrajectoryBalance(2, behaviour=Behaviour(sleep=1.0))
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    texts, _ = story.joint()
    lookup = {tuple(t): n for n, t in enumerate(texts.tolist())}
    counts = torch.zeros(len(texts), dtype=torch.float64)
    for _ in range(400):
        handler = objective.prepare(story.program, guide, story.args, {}).handler
        assert handler is not None
        counts[lookup[tuple(handler.given["middle"][0].tolist())]] += 1
    expected = story.prior().log_prob(texts).exp() * 400
    top = expected.topk(8).indices  # the rest has too few for a chi-square
    rest = torch.tensor([counts.sum() - counts[top].sum(), expected.sum() - expected[top].sum()])
    chi = ((counts[top] - expected[top]).square() / expected[top]).sum() + (rest[0] - rest[1]).square() / rest[1]
    assert float(chi) < 26.1  # 0.999 quantile, 8 degrees of freedom


def test_a_tempered_target_is_the_joint_to_a_power(story: Story) -> None:
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    for objective in (TrajectoryBalance(6), SubTrajectoryBalance(6)):
        losses = {}
        for temperature in (1.0, 2.0, 1e9):
            pyro.set_rng_seed(0)
            objective.target_temperature = temperature
            losses[temperature] = objective.loss(story.program, guide, *story.args)
            elbo = objective.diagnostics["elbo"]
            losses.setdefault("elbo", elbo)
            assert elbo == losses["elbo"]  # reported at temperature 1
        objective.target_temperature = 1.0
        if isinstance(objective, TrajectoryBalance):
            pyro.set_rng_seed(0)
            with torch.no_grad():
                particles = run_particles(story.program, guide, story.args, {}, 6)
            for temperature in (1.0, 2.0, 1e9):
                expected = (particles.log_q - particles.log_p / temperature).var()
                assert losses[temperature] == pytest.approx(float(expected), rel=1e-6)


def test_replay_and_sleep_run_through_fit(story: Story) -> None:
    behaviour = Behaviour(tempered=0.25, replayed=0.25, sleep=0.3)
    guide = GFlowNetGuide(story.program, story.lm, rank=2, seed=0)
    objective = SubTrajectoryBalance(4, behaviour=behaviour)
    history = fit(
        story.program, guide, DATA, objective, steps=8, batch_size=2, vectorize_data=True, seed=0, progress=False
    )
    assert len(history.loss) == 8
    assert behaviour.buffer is not None
    assert len(behaviour.buffer) > 4
    assert "replayed=0.25" in repr(behaviour)


def test_settings_and_demonstrations_are_checked(story: Story) -> None:
    for settings, message in [
        ({"tempered": 1.5}, "tempered=1.5 is a share"),
        ({"tempered": 0.7, "replayed": 0.7}, "together more than all"),
        ({"tempered": 0.5, "temperatures": (2.0, 1.0)}, "must be a range"),
        ({"buffer": ReplayBuffer()}, "nothing would be replayed"),
    ]:
        with pytest.raises(ValueError, match=message):
            Behaviour(**settings)
    with pytest.raises(ValueError, match="capacity=0"):
        ReplayBuffer(capacity=0)
    with pytest.raises(ValueError, match="priority='best'"):
        ReplayBuffer(priority="best")
    with pytest.raises(TypeError, match="behaviour must be"):
        TrajectoryBalance(4, behaviour=0.5)
    with pytest.raises(ValueError, match="latent text sites are"):
        ReplayBuffer().seed(story.program, DATA[0], ending=["a."])
    with pytest.raises(ValueError, match="'ab' is outside the support of site 'middle'"):
        ReplayBuffer().seed(story.program, DATA[0], middle=["ab"])
    with pytest.raises(ValueError, match="a list of texts"):
        ReplayBuffer().seed(story.program, DATA[0], middle="ab.")
