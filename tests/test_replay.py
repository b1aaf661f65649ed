"""Behaviour policies and the replay buffer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story

from llmppl import LM, Behaviour, ReplayBuffer, exact_posterior, fit, importance, mcmc, smc
from llmppl.guides import AutoregressiveGuide, GFlowNetGuide, PromptGuide
from llmppl.objectives import SubTrajectoryBalance, TrajectoryBalance, WakeSleep
from llmppl.programs.observation_keys import key, rows_of
from llmppl.programs.particles import propose, run_particles
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
        buffer.put("x", config(n, 0), joint, 0.0)
    buffer.put("x", config(2, 0), -3.5, 0.0)
    own = buffer._ranked("x")
    assert [e.log_joint for e in own] == [-1.0, -2.0, -3.5]
    assert len(buffer) == 3
    buffer.put("y", config(1), 0.0, 0.0)
    buffer.put("x", config(1, 0), -1.0, 0.0)
    buffer.put("z", config(1), 0.0, 0.0)
    assert buffer.draw("y", 3) == []  # the observation seen least recently
    assert len(buffer.draw("x", 9)) == 3


def test_priorities_rank_what_is_drawn() -> None:
    counts = {}
    for priority in ("log_joint", "log_weight", "uniform"):
        buffer = ReplayBuffer(priority=priority)
        buffer.put("x", config(1), -1.0, -9.0)
        buffer.put("x", config(2), -5.0, 3.0)
        drawn = [int(buffer.draw("x", 1)[0].values["middle"]) for _ in range(3000)]
        counts[priority] = drawn.count(1) / 3000
    # By rank: two thirds for the first; standard error 0.009.
    assert counts["log_joint"] == pytest.approx(2 / 3, abs=0.035)
    assert counts["log_weight"] == pytest.approx(1 / 3, abs=0.035)
    assert counts["uniform"] == pytest.approx(1 / 2, abs=0.035)


def test_a_buffer_survives_its_state(tmp_path) -> None:
    buffer = ReplayBuffer(capacity=4)
    for n in range(6):
        buffer.put(f"x{n % 2}", config(n, 1), -float(n), float(n))
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    other = ReplayBuffer(capacity=4)
    other.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert repr(other) == repr(buffer)
    pyro.set_rng_seed(0)
    first = buffer.draw("x1", 2)
    pyro.set_rng_seed(0)
    second = other.draw("x1", 2)
    assert [e.values["middle"].tolist() for e in first] == [e.values["middle"].tolist() for e in second]


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


@pytest.mark.parametrize("data_plate", [False, True])
def test_the_programs_own_draws_stand_behind_the_replayed_ones(story: Story, data_plate: bool) -> None:
    buffer = ReplayBuffer()
    for x in DATA:
        buffer.seed(story.program, x, middle=["e."])
    behaviour = Behaviour(tempered=0.25, replayed=0.25, prior=0.25, buffer=buffer)
    assert behaviour.on_policy == pytest.approx(0.25)
    assert "prior=0.25" in repr(behaviour)
    count, replayed, of_prior = 1000, 250, 250
    objective = TrajectoryBalance(count, behaviour=behaviour)
    law = {"max_tokens": 3, "stop": "."}

    def guide(beginning: object, ending: object) -> None:
        pyro.sample("middle", story.lm(beginning, **law, allowed=[0, 1]))

    model, proposal, args = story.program, guide, DATA[0]
    if data_plate:
        model, proposal = in_data_plate(model), in_data_plate(guide)
        args = tuple(map(list, zip(*DATA, strict=True)))
    call = objective.prepare(model, proposal, args, {})
    assert call.on_policy.tolist() == [0 < n < 250 or n >= 750 for n in range(count)]  # one replayed text is known
    trace, _, _ = propose(model, proposal, args, {}, count, call.handler)
    middles = trace.nodes["middle"]["value"]
    middles = middles[:, 0] if data_plate else middles
    # What it leaves the guide draws.
    assert story.lm.decode(middles[0]) == "e."
    prior = story.lm(DATA[0][0], **law)
    texts = prior.enumerate_support()
    found = (middles[replayed : replayed + of_prior, None] == texts).all(-1).double().mean(0)
    # 250 draws over some dozen likely texts: about a tenth in total variation.
    assert float((found - prior.log_prob(texts).exp()).abs().sum()) / 2 < 0.25
    of_guide = torch.cat([middles[1:replayed], middles[replayed + of_prior :]])
    assert bool((of_guide <= 1).all())
    assert not bool((middles[replayed : replayed + of_prior] <= 1).all())


def test_shares_that_leave_nothing_or_cannot_be_weighed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tempered=0.5, replayed=0.25 and prior=0.5 are together more"):
        Behaviour(tempered=0.5, replayed=0.25, prior=0.5)
    with pytest.raises(ValueError, match="prior=-0.1 is a share"):
        Behaviour(prior=-0.1)
    for behaviour in (Behaviour(tempered=0.5), Behaviour(replayed=0.5), Behaviour(sleep=0.5, prior=0.5)):
        with pytest.raises(ValueError, match=r"Pass Behaviour\(prior=...\) alone"):
            WakeSleep(8, behaviour=behaviour)
    assert WakeSleep(8, behaviour=Behaviour(prior=0.5)).settings()["prior"] == 0.5


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


@pytest.mark.long
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


OBJECTIVES = {
    "trajectory": lambda behaviour: TrajectoryBalance(6, behaviour=behaviour),
    "subtrajectory": lambda behaviour: SubTrajectoryBalance(6, behaviour=behaviour),
}


def spied(story: Story, counts: list[int]) -> Callable[..., torch.Tensor]:
    """The story, which notes for how many texts it is asked."""

    def program(beginning: object, ending: object) -> torch.Tensor:
        middle = story.program(beginning, ending)
        counts.append(middle[..., 0].numel())
        return middle

    return program


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("data_plate", [False, True])
def test_replayed_particles_are_not_scored_again_by_the_frozen_program(
    story: Story, kind: str, data_plate: bool
) -> None:
    """A step with the buffer's log p has the loss and the gradient of one that computes it, and asks the program for
    fewer texts. A wrong log p in the buffer is a wrong loss: it is read."""
    counts: list[int] = []
    program = spied(story, counts)
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    model, proposal, args = program, guide, DATA[0]
    if data_plate:
        model, proposal = in_data_plate(program), in_data_plate(guide)
        args = tuple(map(list, zip(*DATA, strict=True)))
    behaviour = Behaviour(replayed=0.5, buffer=ReplayBuffer())
    objective = OBJECTIVES[kind](behaviour)
    objective.loss_and_grads(model, proposal, *args)  # fills the buffer
    state = behaviour.buffer.state_dict()
    results = []
    for forget in ("nothing", "log p", "right"):
        behaviour.buffer.load_state_dict(state)
        for own in behaviour.buffer._entries.values():
            for entry in own.values():
                assert entry.log_p is not None
                entry.log_p = {"nothing": entry.log_p, "log p": None, "right": entry.log_p * 1.1}[forget]
        guide.zero_grad()
        pyro.set_rng_seed(5)
        counts.clear()
        loss = objective.loss_and_grads(model, proposal, *args)
        gradient = torch.cat([p.grad.flatten() for p in guide.parameters()])
        results.append((loss, gradient, counts[-1]))
    known, computed, wrong = results
    assert known[0] == pytest.approx(computed[0], rel=1e-9)
    torch.testing.assert_close(known[1], computed[1], rtol=1e-7, atol=1e-9)
    assert known[2] == computed[2] // 2
    assert abs(wrong[0] - computed[0]) > 1e-3


def test_a_program_that_is_learned_is_scored_anew(story: Story) -> None:
    """Its log p of yesterday is another program's."""

    def program(beginning: str, ending: str) -> None:
        story.program(beginning, ending)
        pyro.factor("learned", pyro.param("bias", torch.tensor(0.0)))

    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    behaviour = Behaviour(replayed=0.5)
    objective = TrajectoryBalance(6, behaviour=behaviour)
    objective.loss_and_grads(program, guide, *story.args)
    assert all(entry.log_p is None for entry in behaviour.buffer.of(*story.args))
    for entry in behaviour.buffer.of(*story.args):
        entry.log_p = torch.tensor([-1000.0])
    assert objective.loss_and_grads(program, guide, *story.args) < 1000.0


SEARCHES = {
    "exact": lambda model, guide: exact_posterior(model),
    "importance": lambda model, guide: importance(model, guide, 200, progress=False),
    "smc": lambda model, guide: smc(model, guide, 200, seed=0, progress=False),
    "mcmc": lambda model, guide: mcmc(model, guide, num_samples=50, num_chains=2, seed=0, progress=False),
}


@pytest.mark.parametrize("search", SEARCHES)
def test_draws_of_a_search_go_into_the_buffer_with_their_joint(story: Story, search: str) -> None:
    posterior = SEARCHES[search](story.program, PromptGuide(story.program, story.lm))(*story.args)
    buffer = ReplayBuffer(capacity=8, priority="log_joint")
    taken = buffer.add(posterior)
    entries = buffer.of(*story.args)
    assert 1 <= taken == len(entries) <= 8
    texts, log_joint = story.joint()
    joint = {tuple(text): float(p) for text, p in zip(texts.tolist(), log_joint, strict=True)}
    for entry in entries:
        assert entry.log_joint == pytest.approx(joint[tuple(entry.values["middle"].tolist())], abs=1e-5)
        assert entry.log_p.tolist() == [pytest.approx(entry.log_joint)]
    found = {tuple(text) for text in posterior.samples["middle"].tolist()}
    best = sorted((joint[text] for text in found), reverse=True)[: len(entries)]
    assert [entry.log_joint for entry in entries] == pytest.approx(best, abs=1e-5)
    assert buffer.add(posterior) == taken
    assert len(buffer.of(*story.args)) == taken, "nothing twice"


def test_rows_of_a_posterior_are_filed_under_their_own_observations_and_replayed(story: Story) -> None:
    run = importance(story.program, PromptGuide(story.program, story.lm), 64, vectorize_data=True, progress=False)
    posterior = run(*map(list, zip(*DATA, strict=True)))
    buffer = ReplayBuffer(capacity=4)
    buffer.add(posterior)
    for n, x in enumerate(DATA):
        own = {tuple(text) for text in posterior.samples["middle"][:, n].tolist()}
        assert {tuple(entry.values["middle"].tolist()) for entry in buffer.of(*x)} <= own
        texts, log_joint = story.joint(*x)
        for entry in buffer.of(*x):
            place = (texts == entry.values["middle"]).all(-1).nonzero().item()
            assert entry.log_joint == pytest.approx(float(log_joint[place]), abs=1e-5)
    other = ReplayBuffer(capacity=4)
    other.add(posterior.row(1))
    assert other.of(*DATA[1])[0].values["middle"].tolist() == buffer.of(*DATA[1])[0].values["middle"].tolist()
    # Training takes them: the particles replayed are these, one by one and in a plate.
    for vectorize in (False, True):
        behaviour = Behaviour(replayed=0.5, buffer=buffer)
        guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
        history = fit(
            story.program, guide, DATA, TrajectoryBalance(4, behaviour=behaviour), steps=2, batch_size=3,
            vectorize_data=vectorize, seed=0, progress=False,
        )  # fmt: skip
        assert all(math.isfinite(loss) for loss in history.loss)


def test_impossible_draws_stay_out_and_unknown_posteriors_are_refused(story: Story) -> None:
    def hard(beginning: str, ending: str) -> None:
        middle = story.program(beginning, ending)
        pyro.factor("condition", torch.where((middle == 2).any(-1), 0.0, -math.inf))

    posterior = importance(hard, PromptGuide(hard, story.lm), 300, progress=False)(*story.args)
    assert posterior.impossible > 0
    buffer = ReplayBuffer(capacity=1000)
    buffer.add(posterior)
    assert buffer.of(*story.args)
    assert all(2 in entry.values["middle"].tolist() for entry in buffer.of(*story.args))
    with pytest.raises(ValueError, match="does not say which observations"):
        buffer.add(replace(posterior, observations=""))


def test_rows_within_a_plate_of_the_program_are_filed_under_their_own_observation(story: Story) -> None:
    """Two copies of each row in a plate of the program's own: what a row's entry holds is of that row's law."""

    def program(beginning: object, ending: object) -> None:
        with pyro.plate("copies", 2, dim=-2):
            middle = pyro.sample("middle", story.lm(beginning, max_tokens=3, stop="."))
            pyro.sample("ending", story.lm(beginning, middle), obs=story.lm.encode(ending))

    guide = PromptGuide(program, story.lm, prompt={"middle": lambda beginning: [beginning]})
    behaviour = Behaviour(replayed=0.5)
    objective = TrajectoryBalance(6, behaviour=behaviour)
    objective.loss(in_data_plate(program), in_data_plate(guide), *map(list, zip(*DATA, strict=True)))
    for x in DATA:
        texts, log_joint = story.joint(*x)
        assert behaviour.buffer.of(*x)
        for entry in behaviour.buffer.of(*x):
            assert entry.values["middle"].shape == (2, 3)
            places = [(texts == text).all(-1).nonzero().item() for text in entry.values["middle"]]
            assert entry.log_joint == pytest.approx(float(log_joint[places].sum()), abs=1e-5)


def test_observations_have_names_of_their_own_by_all_that_they_are() -> None:
    """What a repr leaves out, and what is passed by name, is part of them; a number has the name that a batch gives."""
    image = np.zeros((40, 40))
    other = image.copy()
    other[20, 20] = 1.0
    assert key((image,)) != key((other,))
    assert key(([torch.tensor(0.1234561), 1],)) != key(([torch.tensor(0.1234569), 1],))
    assert key(({"image": torch.from_numpy(image)},)) != key(({"image": torch.from_numpy(other)},))
    assert key((0.1, 3)) == key((torch.tensor([0.1])[0], torch.tensor([3], dtype=torch.int32)[0]))
    assert rows_of(print, ("b",), {"ending": "a"}, False) != rows_of(print, ("b",), {"ending": "c"}, False)
    assert rows_of(print, (["b"],), {"ending": "a"}, True) != rows_of(print, (["b"],), {"ending": "c"}, True)


def test_what_is_passed_by_name_is_not_replayed_for_another(story: Story) -> None:
    """A stored log p of one ending would be taken for another's."""
    objective = TrajectoryBalance(8, behaviour=Behaviour(0.25, replayed=0.75))
    guide = AutoregressiveGuide(story.program, story.lm, rank=2)
    beginning, ending = story.args
    for _ in range(2):
        objective.loss(story.program, guide, beginning, ending=ending)
    call = objective.prepare(story.program, guide, (beginning,), {"ending": "ae"})
    assert call.handler is not None
    assert not call.handler.given, "nothing is known of this ending"
    assert objective.prepare(story.program, guide, (beginning,), {"ending": ending}).handler.given


@pytest.mark.parametrize("vectorized", [False, True])
def test_what_a_program_is_conditioned_on_names_the_observation_too(lm: LM, vectorized: bool) -> None:
    """Else a buffer gives one program the draws, and the joints, of another."""

    def program(beginning: Any) -> None:
        text = pyro.sample("text", lm(beginning, max_tokens=2, stop="."))
        pyro.sample("count", dist.Normal(lm.map(lambda text: float(len(text)), text), 0.5))

    first, again, second = (pyro.condition(program, {"count": torch.tensor(count)}) for count in (1.0, 1.0, 2.0))
    guide = PromptGuide(first, lm, {"text": lambda beginning: [beginning]})
    args = (["ab"],) if vectorized else ("ab",)
    found = [
        importance(own, guide, 4, vectorize_data=vectorized, progress=False)(*args).observations
        for own in (first, again, second)
    ]
    assert found[0] == found[1] != found[2]
    buffer = ReplayBuffer(capacity=20)
    buffer.add(exact_posterior(first)("ab"))
    objective = TrajectoryBalance(4, behaviour=Behaviour(replayed=0.5, buffer=buffer))
    for own, known in ((first, True), (second, False)):
        call = objective.prepare(own, guide, ("ab",), {})
        assert bool(call.on_policy.all()) != known
