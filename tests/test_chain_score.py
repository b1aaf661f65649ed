"""TRICE: the score along Markov chains, against the enumerated evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from test_learned_program import DATA, exact_gradient, gradient, joint, learned, log_p, texts_of
from torch import Tensor

from llmppl import fit
from llmppl.guides import PromptGuide
from llmppl.objectives import ChainScore
from llmppl.programs.observation_keys import key
from llmppl.programs.observations import observing
from llmppl.programs.plates import in_data_plate
from llmppl.programs.structure import Program

COLUMNS = tuple(list(column) for column in zip(*DATA, strict=True))


def asks_nothing(*args: Any) -> None:
    raise AssertionError("the guide is not asked")


def at_posterior(objective: ChainScore, theta: Any, seed: int) -> None:
    """Put every chain at an exact draw."""
    torch.manual_seed(seed)
    for row in DATA:
        texts, log_joint = joint(theta, *row)
        drawn = torch.distributions.Categorical(logits=log_joint.detach()).sample((objective.num_particles,))
        objective.chains[key(row)] = {"middle": texts[drawn]}


def estimate(program: Program, theta: Any, objective: ChainScore, rows: bool) -> Tensor:
    if rows:
        return gradient(objective.differentiable_loss(in_data_plate(program), asks_nothing, *COLUMNS), theta)
    return torch.stack(
        [gradient(objective.differentiable_loss(program, asks_nothing, *row), theta) for row in DATA]
    ).sum(0)


@pytest.mark.long
@pytest.mark.parametrize("rows", [False, True])
def test_from_the_posterior_it_is_the_gradient_of_the_evidence(rows: bool) -> None:
    _, theta, program = learned()
    exact = torch.stack([exact_gradient(theta, *row) for row in DATA]).sum(0)
    for with_variate in (True, False):
        found = []
        for seed in range(12):
            objective = ChainScore(400, control_variate=with_variate)
            at_posterior(objective, theta, seed)
            found.append(estimate(program, theta, objective, rows))
            assert 0 < objective.acceptance < 1
        off = torch.stack(found) - exact
        # Twelve independent means: within four standard errors of their mean, in norm.
        error = float(off.std(0).norm()) / 12**0.5
        assert float(off.mean(0).norm()) < 2 * error
        assert error < 0.1 * float(exact.norm())


def test_the_control_variate_takes_away_all_that_says_nothing_of_the_observation() -> None:
    """Where the text is independent of what is observed, every proposal is taken and the gradient is zero."""
    lm, theta, _ = learned()

    def program(beginning: str, ending: str) -> None:
        pyro.sample("middle", theta(beginning, max_tokens=2, stop="."))
        pyro.sample("ending", lm(beginning), obs=lm.encode(ending))

    norms = []
    for with_variate in (True, False):
        objective = ChainScore(8, control_variate=with_variate)
        norms.append(float(gradient(objective.differentiable_loss(program, asks_nothing, *DATA[0]), theta).norm()))
        assert objective.acceptance == pytest.approx(1.0)
    assert norms[0] < 1e-9
    assert norms[1] > 0.01


def test_chains_that_begin_anywhere_come_to_the_posterior() -> None:
    _, theta, program = learned()
    objective = ChainScore(2000)
    row = DATA[2]
    texts, log_joint = joint(theta, *row)
    posterior = log_joint.detach().softmax(0)
    far = int(posterior.argmin())
    objective.chains[key(row)] = {"middle": texts[far].expand(2000, -1)}
    distances = []
    for _ in range(25):
        with torch.no_grad():
            objective.differentiable_loss(program, asks_nothing, *row)
        chains = objective.chains[key(row)]["middle"]
        found = (chains[:, None] == texts).all(-1).double().mean(0)
        distances.append(float((found - posterior).abs().sum()) / 2)
    # Total variation of 2000 exact draws over 13 texts is about 0.02.
    assert distances[0] > 0.07
    assert distances[-1] < 0.04


def test_rows_and_single_calls_follow_the_same_chains() -> None:
    _, theta, program = learned()
    objective = ChainScore(4)
    objective.loss(in_data_plate(program), asks_nothing, *COLUMNS)
    assert set(objective.chains) == {key(row) for row in DATA}
    before = {name: chain["middle"].clone() for name, chain in objective.chains.items()}
    assert all(chain.shape == (4, texts_of(theta).shape[-1]) for chain in before.values())
    objective.loss(program, asks_nothing, *DATA[1])
    assert torch.equal(objective.chains[key(DATA[0])]["middle"], before[key(DATA[0])])
    # A chain moves only to what was proposed: whole texts of its own row.
    prior = {tuple(text) for text in texts_of(theta).tolist()}
    assert {tuple(text) for text in objective.chains[key(DATA[1])]["middle"].tolist()} <= prior


@pytest.mark.long
def test_it_learns_as_exact_em_does_and_resumes_to_the_bit(tmp_path: Path) -> None:
    def run(folder: Path | None, steps: int, **more: Any) -> tuple[float, list[Tensor]]:
        _, theta, program = learned()
        guide = PromptGuide(program, theta, prompt={"middle": lambda beginning: [beginning]})
        history = fit(
            program, guide, DATA, ChainScore(8), steps, 3, vectorize_data=True, learning_rate=0.02, seed=0,
            progress=False, folder=folder, checkpoint_every=20, **more,
        )  # fmt: skip
        assert len(history.loss) == steps
        return log_p(theta, DATA), [p.detach().clone() for p in theta.parameters()]

    _, theta, _ = learned()
    before, _ = log_p(theta, DATA), None
    optimizer = torch.optim.AdamW(theta.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        sum(-joint(theta, *row)[1].logsumexp(0) for row in DATA).backward()  # type: ignore[union-attr]
        optimizer.step()
    best = log_p(theta, DATA)
    found, parameters = run(None, 60)
    assert best > before + 0.5
    assert found > before + 0.8 * (best - before)
    run(tmp_path, 40)
    again, resumed = run(tmp_path, 60, resume=True)
    assert again == found
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))


def test_impossible_latents_are_left_and_impossible_rows_skipped() -> None:
    _, theta, _ = learned()

    def program(beginning: str, wanted: str) -> None:
        middle = pyro.sample("middle", theta(beginning, max_tokens=2, stop="."))
        right = theta.map(lambda text: float(text.startswith(wanted)), middle, returns=float)
        pyro.factor("condition", right.log())

    objective = ChainScore(64)
    for _ in range(20):
        loss = objective.differentiable_loss(program, asks_nothing, "b", "b")
        assert bool(torch.isfinite(gradient(loss, theta)).all())
    assert all(text.startswith("b") for text in theta.decode(objective.chains[key(("b", "b"))]["middle"]))
    assert objective.loss(program, asks_nothing, "b", "zz") == 0.0
    assert objective.diagnostics["skipped"] == 1


def test_what_it_cannot_learn_is_said() -> None:
    lm, theta, program = learned()

    def frozen(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", lm(beginning, max_tokens=2, stop="."))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    guide = PromptGuide(program, theta, prompt={"middle": lambda beginning: [beginning]})
    with pytest.raises(ValueError, match=r"the program has no parameters.*lm.adapt"):
        ChainScore(4).differentiable_loss(frozen, guide, *DATA[0])
    with pytest.raises(ValueError, match="needs at least 2"):
        ChainScore(1)
    simulated, told = observing(program, guide, {"ending": lm.encode("bc.")})
    with pytest.raises(ValueError, match="these are simulated"):
        ChainScore(4).differentiable_loss(simulated, told, *DATA[0])
