"""Plans for mazes: the simulator, the shortest plans, and the program's posterior, enumerated."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from conftest import character_lm

from llmppl import LM, exact_posterior, fit, importance
from llmppl.guides import AutoregressiveGuide, PromptGuide, SteeredGuide
from llmppl.models import plan, shortest_plans, walk
from llmppl.models.plan import BY_CHANCE, arriving, goal_told, maze_and_goal, toward_goal
from llmppl.objectives import WakeSleep

CORNER = "S..\n.#.\n..."
LETTERS = "updownleftrigh .:m"


@pytest.mark.parametrize(
    ("moves", "end"),
    [("right right down down", 8), ("down right", 3), ("up left", 0), ("Right, right; jump!", 2), ("", 0), ("dow", 0)],
)
def test_plans_are_walked(moves: str, end: int) -> None:
    assert walk(CORNER, moves) == end


def test_shortest_plans_are_all_of_them() -> None:
    assert sorted(shortest_plans(CORNER, 8)) == ["down down right right", "right right down down"]
    assert shortest_plans(CORNER, 0) == [""]
    assert shortest_plans("S#.\n##.", 2) == []
    open_floor = shortest_plans("S...\n....\n....", 11)
    assert len(set(open_floor)) == len(open_floor) == 10  # 5 choose 2
    assert all(walk("S...\n....\n....", moves) == 11 for moves in open_floor)


@pytest.mark.parametrize("maze", ["", "...", "SS", "S.\n...", "S?"])
def test_what_is_no_maze_is_refused(maze: str) -> None:
    with pytest.raises(ValueError, match="a maze has rows of one length"):
        walk(maze, "up")


def test_plans_have_the_posterior_of_prior_and_nearness() -> None:
    lm = character_lm(LETTERS, ".")
    program = plan(lm, (2, 2), max_moves=2, max_tokens=13, nearness=1.5, prompt="m:")
    posterior = exact_posterior(program)("S.\n..", torch.tensor(3))
    texts = posterior.decode("plan")
    ends = [walk("S.\n..", text) for text in texts]
    cells = np.array([[0, 1, 1, 2], [1, 0, 2, 1], [1, 2, 0, 1], [2, 1, 1, 0]])  # steps between cells
    likelihood = np.exp(-1.5 * cells)[ends]
    likelihood = (likelihood / likelihood.sum(1, keepdims=True))[:, 3]
    prior = exact_posterior(lambda: pyro.sample("p", program_law(lm)))()
    by_text = dict(zip(prior.decode("p"), prior.weights, strict=True))
    joint = np.array([by_text[text] for text in texts]) * likelihood
    assert posterior.log_evidence == pytest.approx(np.log(joint.sum()), abs=1e-6)
    np.testing.assert_allclose(posterior.weights, joint / joint.sum(), atol=1e-6)
    assert set(posterior.samples["end"].tolist()) == set(ends) == {0, 1, 2, 3}


def program_law(lm: LM) -> pyro.distributions.TorchDistribution:
    from llmppl import Grammar

    return lm("m:", grammar=Grammar.regex(r"( (up|down|left|right)){1,2}"), max_tokens=13)


@pytest.mark.long
def test_sleep_teaches_plans_for_goals_that_were_reached() -> None:
    """Trained on nothing but its own simulations, told the goal, the guide proposes near the posterior."""
    lm = character_lm(LETTERS + "0123456789Thegoalishr.Tw and", ".")
    program = plan(lm, (2, 2), max_moves=1, max_tokens=7, prompt="m:")
    guide = AutoregressiveGuide(program, lm, rank=4, seed=0, prompt={"plan": lambda goal: [_named(lm, goal), "m:"]})
    data = [("S.\n..", torch.tensor(1))]  # the goal only says that one is observed
    fit(program, guide, data, WakeSleep(16, insomnia=0.0), 60, learning_rate=1e-2, seed=0, progress=False)
    for goal, move in ((1, "right"), (2, "down")):
        exact = exact_posterior(program)("S.\n..", torch.tensor(goal))
        pyro.set_rng_seed(0)
        posterior = importance(program, guide, 200)("S.\n..", torch.tensor(goal))
        assert abs(posterior.log_evidence - exact.log_evidence) < 4 * posterior.log_evidence_error + 0.01
        assert np.mean([move in text for text in posterior.decode("plan")]) > 0.8
        assert posterior.ess > 100


def _named(lm: LM, goal: torch.Tensor) -> torch.Tensor:
    return lm.map(lambda cell: str(int(cell)), goal + 0.0)


def test_plans_on_the_real_model_in_rows(smollm2: LM) -> None:
    program = plan(smollm2, (3, 3), max_moves=4)
    guide = PromptGuide(program, smollm2, prompt={"plan": goal_told(smollm2, 3)})
    pyro.set_rng_seed(0)
    mazes = [CORNER, "..S\n...\n..."]
    posterior = importance(program, guide, 4, vectorize_data=True)(mazes, torch.tensor([8, 3]))
    assert posterior.batch_shape == (2,)
    assert np.isfinite(posterior.log_joint).all()
    told = pyro.poutine.trace(guide).get_trace(CORNER, torch.tensor(8)).nodes["plan"]["fn"].context
    assert smollm2.decode(told).startswith("The goal is 2 down and 2 right. There is a wall up, left. The moves")
    with pytest.raises(ValueError, match="another size"):
        program("S.\n..", torch.tensor(1))


@pytest.mark.parametrize("keywords", [{"max_moves": 0}, {"nearness": 0.0}])
def test_plans_that_make_no_sense(keywords: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, and nearness"):
        plan(character_lm(LETTERS, "."), (2, 2), **keywords)  # type: ignore[arg-type]


def test_numpyro_has_the_same_evidence(tmp_path: Path) -> None:
    from llmppl.numpyro import LM as Twin
    from llmppl.numpyro import exact_posterior as twin_posterior
    from llmppl.numpyro.models import plan as twin_plan

    lm = character_lm(LETTERS + "S\n", ".")  # of the maze, too, which is a text there
    lm.transformer.float().save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    form = {"size": (2, 2), "max_moves": 1, "max_tokens": 7, "prompt": "m:"}
    ours = exact_posterior(plan(lm, **form))("S.\n..", torch.tensor(1)).log_evidence  # type: ignore[arg-type]
    theirs = twin_posterior(twin_plan(Twin.from_pretrained(tmp_path), **form))("S.\n..", 1).log_evidence  # type: ignore[arg-type]
    assert theirs == pytest.approx(ours, abs=1e-3)


def test_the_chance_of_arriving() -> None:
    """Against every way of going on at random, move by move."""
    maze, size, goal, near, end = "S#.\n...", (2, 3), 2, 1.5, 0.2
    features = arriving(size, 3, near, end)

    def cost(moves: str) -> float:
        row, column = divmod(walk(maze, moves), 3)
        return near * (abs(row - goal // 3) + abs(column - goal % 3))

    def chance(moves: str) -> float:
        if len(moves.split()) == 3:
            return math.exp(-cost(moves))
        on = np.mean([chance(f"{moves} {word}") for word in ("up", "down", "left", "right")])
        return end * math.exp(-cost(moves)) + (1 - end) * on

    for moves in ("", " down", " right", " down right", " down right right", " down right right up"):
        expected = -math.log(chance(moves)) if len(moves.split()) < 4 else cost(moves)
        assert features(f"{maze}\n{goal}", moves) == pytest.approx([cost(moves), expected])
    assert features(f"{maze}\n{goal}", " down ri") == features(f"{maze}\n{goal}", " down right"), "half a word counts"
    assert features("", " up") == [0.0, 0.0]


def test_a_plan_that_starts_from_the_chance_of_arriving(smollm2: LM) -> None:
    """Untrained, on the real model: nearly every draw arrives and counts, and log Ẑ is what ``exact_posterior`` finds
    over all 589 spellings, −2.34."""
    program = plan(smollm2, (3, 3), max_moves=2, nearness=4.0)
    features, told = {"plan": arriving((3, 3), 2, 4.0)}, {"plan": maze_and_goal(smollm2)}
    guide = SteeredGuide(program, smollm2, features, told, start={"plan": BY_CHANCE}, seed=0)
    maze = "S..\n.#.\n..."
    pyro.set_rng_seed(0)
    posterior = importance(program, guide, 32, progress=False)(maze, torch.tensor(2))
    hits = np.mean([walk(maze, moves) == 2 for moves in posterior.decode("plan")])
    assert hits > 0.8
    assert posterior.ess > 24
    assert posterior.log_evidence == pytest.approx(-2.34, abs=4 * posterior.log_evidence_error + 0.01)


def test_features_say_where_moves_have_led() -> None:
    far, there, idle, again, stuck, nearer = range(6)
    maze = "S.#\n...\n2"
    assert toward_goal(maze, "") == [0.5, 0.0, 0.0, 0.0, 0.0, 0.5]
    assert toward_goal(maze, " right")[stuck] == 1.0, "a wall before the goal"
    assert toward_goal(maze, " right right")[idle] == 1.0
    assert toward_goal(maze, " down up")[again] == 1.0
    assert toward_goal(maze, " down ri") == toward_goal(maze, " down right"), "its first letter says which word it is"
    assert toward_goal(maze, " down x") == toward_goal(maze, " down"), "no beginning of a move is none"
    assert toward_goal(maze, " down right right up")[far] == 0.25
    assert toward_goal("S..\n...\n2", " right right")[there] == 1.0
    assert toward_goal(maze, " down")[nearer] == 1.0
    lm = character_lm(LETTERS + "S#\n0123456789", ".")
    told = maze_and_goal(lm)("S.\n..", torch.tensor([1, 3]))
    assert lm.decode(lm.context(*told)) == ["S.\n..\n1", "S.\n..\n3"]


@pytest.mark.long
def test_a_steered_plan_on_the_real_model(smollm2: LM) -> None:
    """Untrained it is the prior; with the distance favoured it reaches the goal more often."""
    program = plan(smollm2, (3, 3), max_moves=4)
    guide = SteeredGuide(program, smollm2, {"plan": toward_goal}, {"plan": maze_and_goal(smollm2)}, seed=0)
    maze, goal = "S..\n...\n...", torch.tensor(8)
    prior = PromptGuide(program, smollm2, prompt={"plan": lambda: ["The moves of the robot through the maze are:"]})
    drawn = {}
    for name, proposal in (("prior", prior), ("untrained", guide)):
        pyro.set_rng_seed(0)
        drawn[name] = importance(program, proposal, 6, progress=False)(maze, goal)
    assert drawn["untrained"].decode("plan") == drawn["prior"].decode("plan")
    np.testing.assert_allclose(drawn["untrained"].log_weights, drawn["prior"].log_weights, atol=1e-4)
    with torch.no_grad():
        guide.twist["plan"].linear.weight[0, [0, 6]] = -40.0  # how far the goal is, going on and ending
    pyro.set_rng_seed(0)
    steered = importance(program, guide, 6, progress=False)(maze, goal)
    assert {walk(maze, moves) for moves in steered.decode("plan")} == {8}
