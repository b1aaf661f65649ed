"""Hard conditions while training: weight zero to wake-φ, a floor to the balance objectives, both counted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pyro
import pytest
import torch
from conftest import Story, kl
from torch import Tensor

from llmppl import fit
from llmppl.guides import AutoregressiveGuide, GFlowNetGuide
from llmppl.objectives import DetailedBalance, SubTrajectoryBalance, TrajectoryBalance, WakeSleep

if TYPE_CHECKING:
    from collections.abc import Callable

FLOOR = -40.0
WANTED = 2
"""The token that a text must have."""


def has(text: Tensor) -> Tensor:
    return (text == WANTED).any(-1)


@pytest.fixture
def hard(story: Story) -> Callable[..., Any]:
    def program(beginning: str, ending: str, possible: bool = True) -> None:
        middle = story.program(beginning, ending)
        pyro.factor("condition", torch.where(has(middle) & possible, 0.0, -math.inf))

    return program


def conditioned(story: Story) -> tuple[Tensor, Tensor]:
    texts, log_joint = story.joint()
    return texts, torch.where(has(texts), log_joint, -math.inf)


def log_q(guide: Any, story: Story, texts: Tensor) -> Tensor:
    return pyro.poutine.trace(guide).get_trace(*story.args).nodes["middle"]["fn"].log_prob(texts)


def test_wake_gives_impossible_particles_weight_zero(story: Story, hard: Any) -> None:
    """The loss is −E log q under the exact posterior given the condition; 20 000 particles of the prior, of which a
    quarter is impossible and the rest worth 1400, tolerance 0.1 nats. Weighing all that are possible alike is off by
    more than 0.3."""
    guide = AutoregressiveGuide(hard, story.lm, {"middle": lambda beginning: [beginning]}, rank=2, seed=0)
    texts, log_joint = conditioned(story)
    wanted = -(log_joint.softmax(0) * log_q(guide, story, texts)).sum()
    objective = WakeSleep(20_000, insomnia=1.0)
    assert objective.loss(hard, guide, *story.args) == pytest.approx(wanted.item(), abs=0.1)
    assert objective.diagnostics["skipped"] == 0
    assert objective.diagnostics["elbo"] == -math.inf
    alike = torch.where(has(texts), log_q(guide, story, texts), -math.inf).softmax(0)
    assert abs(-(alike * log_q(guide, story, texts)).sum() - wanted) > 0.3


def test_a_row_without_a_possible_particle_is_skipped_and_counted(story: Story) -> None:
    def program(beginning: Any, ending: Any, possible: Tensor) -> None:
        middle = story.program(beginning, ending)
        pyro.factor("condition", torch.where(has(middle) & possible, 0.0, -math.inf))

    guide = AutoregressiveGuide(program, story.lm, rank=2, seed=0)
    data = [("ab", "cd", torch.tensor(True)), ("b", "e", torch.tensor(False))]
    history = fit(
        program, guide, data, WakeSleep(64, insomnia=1.0), steps=3, batch_size=2, vectorize_data=True, progress=False,
        seed=0,
    )  # fmt: skip
    assert history.skipped == [1, 1, 1]
    assert all(math.isfinite(loss) for loss in history.loss)
    assert "3 times no particle of an observation was possible" in repr(history)
    # What is skipped has no gradient.
    guide = AutoregressiveGuide(program, story.lm, rank=2, seed=0)
    assert WakeSleep(8, insomnia=1.0).loss_and_grads(program, guide, "b", "e", torch.tensor(False)) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in guide.parameters())


@pytest.mark.parametrize("learned", [False, True])
def test_a_floor_stands_for_the_joint_of_impossible_texts(story: Story, hard: Any, learned: bool) -> None:
    """The loss is that of enumeration with max(log p, floor): 20 000 particles, tolerance 4 standard errors."""
    guide = GFlowNetGuide(hard, story.lm, rank=2, seed=0)
    objective = TrajectoryBalance(20_000, "learned" if learned else "vargrad", floor=FLOOR)
    found = objective.loss(hard, guide, *story.args)
    texts, log_joint = conditioned(story)
    with torch.no_grad():
        q = log_q(guide, story, texts)
    excess = q - log_joint.clamp(min=FLOOR)
    centre = -guide.log_partition(*story.args).detach() if learned else (q.exp() * excess).sum()
    squares = (excess - centre).square()
    wanted = (q.exp() * squares).sum()
    error = (q.exp() * (squares - wanted).square()).sum().div(20_000).sqrt()
    assert abs(found - wanted) < 4 * error
    assert error < 0.05 * wanted
    share = objective.diagnostics["floored"] / 20_000
    assert share == pytest.approx(float(q.exp()[~has(texts)].sum()), abs=0.02)


@pytest.mark.parametrize("kind", [SubTrajectoryBalance, DetailedBalance])
def test_prefixes_of_probability_zero_count_as_the_floor(story: Story, hard: Any, kind: Any) -> None:
    """The same as a program whose condition makes those joints the floor."""

    def soft(beginning: str, ending: str) -> None:
        middle = story.program(beginning, ending)
        log_p = story.prior(beginning).log_prob(middle) + story.lm(beginning, middle).log_prob(story.lm.encode(ending))
        pyro.factor("condition", torch.where(has(middle), 0.0, FLOOR - log_p))

    guide = AutoregressiveGuide(hard, story.lm, rank=2, seed=0)
    losses = []
    for program, options in ((hard, {"floor": FLOOR}), (soft, {})):
        pyro.set_rng_seed(1)
        objective = kind(16, **options)
        losses.append(objective.loss(program, guide, *story.args))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    with pytest.raises(ValueError, match="floor="):
        kind(16).loss(hard, guide, *story.args)


@pytest.mark.long
def test_training_with_a_floor_reaches_the_posterior_and_history_counts(story: Story, hard: Any) -> None:
    """KL(q‖p) to the posterior with the floor below 0.2 nats, from more than 3."""
    guide = AutoregressiveGuide(hard, story.lm, seed=0)
    texts, log_joint = conditioned(story)
    log_p = log_joint.clamp(min=-20.0).log_softmax(0)
    with torch.no_grad():
        before = kl(log_q(guide, story, texts), log_p)
    history = fit(
        hard, guide, [story.args], TrajectoryBalance(32, floor=-20.0), steps=150, learning_rate=1e-2, clip_norm=10.0,
        schedule="cosine", seed=0, progress=False,
    )  # fmt: skip
    with torch.no_grad():
        after = kl(log_q(guide, story, texts), log_p)
    assert before > 3.0
    assert after < 0.2
    assert history.floored[0] > history.floored[-1]
    assert "joints a step counted as the floor" in repr(history)


@pytest.mark.parametrize("floor", [1.0, 0.0, -math.inf, math.nan])
def test_a_floor_is_a_negative_number(floor: float) -> None:
    from llmppl.numpyro import objectives

    for kind in (TrajectoryBalance, SubTrajectoryBalance, DetailedBalance, objectives.TrajectoryBalance):
        with pytest.raises(ValueError, match=r"floor=.* must be a negative number of nats"):
            kind(8, floor=floor)
