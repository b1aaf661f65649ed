"""fit(): minibatches, vectorised data, reproducibility, history."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch
from conftest import Story
from pyro.infer import TraceGraph_ELBO

from llmppl import Behaviour, fit
from llmppl.guides import AutoregressiveGuide, GFlowNetGuide, PromptGuide, RefinementGuide
from llmppl.masked_lm import MaskedLM
from llmppl.objectives import Denoising, LeaveOneOutELBO, ParticleObjective, TrajectoryBalance, WakeSleep

DATA = [("ab", "cd"), ("cde", "a"), ("d", "eb"), ("aa", "bbb")]


@pytest.mark.long
def test_training_lowers_the_gap_on_its_data(story: Story) -> None:
    from llmppl import exact_posterior, importance

    guide = AutoregressiveGuide(story.program, story.lm, seed=0)
    exact = np.mean([exact_posterior(story.program)(*x).log_evidence for x in DATA])

    def gap() -> float:
        run = importance(story.program, guide, 500, vectorize_data=True)
        return float(exact - run([b for b, _ in DATA], [e for _, e in DATA]).elbo.mean())

    before = gap()
    objective = TrajectoryBalance(12, behaviour=Behaviour(tempered=0.5, temperatures=(2.0, 2.0)))
    history = fit(
        story.program,
        guide,
        DATA,
        objective,
        steps=100,
        batch_size=4,
        vectorize_data=True,
        learning_rate=3e-3,
        seed=0,
        progress=False,
    )
    assert gap() < 0.25 * before
    assert len(history.loss) == len(history.elbo) == len(history.ess) == 100
    assert np.mean(history.elbo[-10:]) > np.mean(history.elbo[:10])
    assert "100 steps" in repr(history)
    assert history.plot().get_xlabel() == "step"


@pytest.mark.parametrize("objective", [WakeSleep(4, insomnia=0.0), Denoising(4)], ids=["sleep", "denoising"])
def test_simulated_pairs_report_no_elbo_of_the_data(
    story: Story, objective: ParticleObjective, capsys: pytest.CaptureFixture[str]
) -> None:
    network = MaskedLM.from_scratch(story.lm, max_tokens=3, width=8, layers=1, heads=2, seed=0)
    guide = RefinementGuide(story.program, story.lm, network=network)
    history = fit(story.program, guide, DATA, objective, steps=3, seed=0)
    assert np.isfinite(history.loss).all()
    assert np.isnan(history.elbo).all()
    assert np.isnan(history.ess).all()
    assert "ELBO" not in repr(history) + capsys.readouterr().err


@pytest.mark.parametrize("objective", [TrajectoryBalance(8), LeaveOneOutELBO(8), WakeSleep(8), TraceGraph_ELBO(8)])
def test_vectorised_data_and_tuples_one_by_one_train_the_same_objectives(story: Story, objective: object) -> None:
    for vectorize in (False, True):
        if vectorize and isinstance(objective, TraceGraph_ELBO):
            continue  # loops over its particles, each with the data plate
        guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
        history = fit(
            story.program,
            guide,
            DATA,
            objective,
            steps=3,
            batch_size=2,
            vectorize_data=vectorize,
            seed=0,
            progress=False,
        )
        assert np.isfinite(history.loss).all()


def test_the_vectorised_loss_is_the_mean_of_the_single_ones(story: Story) -> None:
    """In expectation, hence over many particles."""
    from llmppl.programs.plates import in_data_plate

    guide = GFlowNetGuide(story.program, story.lm, rank=2)
    objective = TrajectoryBalance(4000)
    single = sum(objective.loss(story.program, guide, *x) for x in DATA)
    columns = tuple(map(list, zip(*DATA, strict=True)))
    together = objective.loss(in_data_plate(story.program), in_data_plate(guide), *columns)
    assert together == pytest.approx(single, rel=0.1)
    learned = TrajectoryBalance(4000, log_partition="learned")
    single = sum(learned.loss(story.program, guide, *x) for x in DATA)
    together = learned.loss(in_data_plate(story.program), in_data_plate(guide), *columns)
    assert together == pytest.approx(single, rel=0.1)


def test_seeds_reproduce_a_run(story: Story) -> None:
    runs = []
    for _ in range(2):
        guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
        runs.append(fit(story.program, guide, DATA, TrajectoryBalance(4), steps=4, seed=9, progress=False).loss)
    assert runs[0] == runs[1]


def test_gradients_left_behind_by_an_earlier_run_do_not_count(story: Story) -> None:
    norms = []
    for left in (0.0, 1e3):
        guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
        for parameter in guide.parameters():
            parameter.grad = torch.full_like(parameter, left)
        run = fit(story.program, guide, DATA, TrajectoryBalance(4), steps=1, seed=9, progress=False)
        norms.append(run.gradient_norm[0])
    assert norms[0] == norms[1]


def test_every_observation_is_drawn_once_before_any_is_drawn_again(story: Story) -> None:
    seen: list[tuple[str, str]] = []

    def program(beginning: str, ending: str) -> None:
        seen.append((beginning, ending))
        story.program(beginning, ending)

    guide = AutoregressiveGuide(program, story.lm, rank=2)
    counts = []

    def count(step: int, history: object) -> None:
        counts.append(list(dict.fromkeys(seen)))
        seen.clear()

    fit(program, guide, DATA, TrajectoryBalance(2), steps=4, progress=False, seed=0, callback=count)
    assert all(len(batch) == 1 for batch in counts)
    assert sorted(batch[0] for batch in counts) == sorted(DATA)


def test_the_gradient_norm_is_clipped_and_warm_up_is_linear(story: Story) -> None:
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    start = [p.detach().clone() for p in guide.parameters()]
    fit(
        story.program,
        guide,
        DATA,
        TrajectoryBalance(4),
        steps=1,
        learning_rate=0.1,
        warmup_steps=10,
        weight_decay=0.0,
        seed=0,
        progress=False,
    )
    moved = max(float((p.detach() - s).abs().max()) for p, s in zip(guide.parameters(), start, strict=True))
    # Adam's first step is the learning rate, of which a tenth is left.
    assert moved == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": []}, ValueError, "data is empty"),
        ({"data": ["text"]}, TypeError, r"data\[0\] is a str; it must be a tuple"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"objective": "elbo"}, TypeError, "objective must be an ELBO"),
        ({"data": [("ab", None)], "vectorize_data": True}, TypeError, "cannot batch argument 1"),
    ],
)
def test_bad_arguments_are_named(story: Story, change: dict, error: type[Exception], message: str) -> None:
    arguments = {"data": DATA, "objective": TrajectoryBalance(2), "steps": 1, "progress": False, **change}
    guide = AutoregressiveGuide(story.program, story.lm, rank=2)
    with pytest.raises(error, match=message):
        fit(story.program, guide, **arguments)


def test_a_guide_without_parameters_has_nothing_to_train(story: Story) -> None:
    # No gradient reaches anything, so the objective's own backward is what would fail first.
    with pytest.raises(ValueError, match="nothing to train"):
        fit(
            story.program,
            PromptGuide(story.program, story.lm),
            DATA,
            TrajectoryBalance(2),
            steps=1,
            progress=False,
        )


def test_parameters_of_the_model_are_trained_too(story: Story) -> None:
    def program(beginning: str, ending: str) -> None:
        weight = pyro.param("weight", torch.tensor(0.0))
        middle = pyro.sample("middle", story.lm(beginning, max_tokens=2, stop="."))
        pyro.factor("taste", weight - weight**2)
        pyro.sample("ending", story.lm(beginning, middle), obs=story.lm.encode(ending))

    guide = AutoregressiveGuide(program, story.lm, rank=2)
    fit(program, guide, DATA, LeaveOneOutELBO(2), steps=20, learning_rate=0.05, seed=0, progress=False)
    assert pyro.param("weight").item() > 0.2
