"""Programs that learn: their gradient against that of the enumerated evidence, and where EM ends."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from conftest import kl
from peft.tuners.tuners_utils import BaseTunerLayer
from pyro.infer import ELBO, SVI, RenyiELBO, ReweightedWakeSleep, Trace_ELBO
from torch import Tensor
from torch.distributions import constraints

from llmppl import LM, Behaviour, Evaluation, Regularisation, exact_posterior, fit, importance, simulate
from llmppl.guides import GFlowNetGuide, PromptGuide
from llmppl.objectives import LeaveOneOutELBO, SubTrajectoryBalance, TrajectoryBalance, WakeSleep
from llmppl.objectives.particle_objective import ParticleObjective
from llmppl.programs.observation_keys import rows_of
from llmppl.programs.observations import observing
from llmppl.programs.relaxation import sensitivity
from llmppl.programs.structure import Program, structure
from llmppl.testing import tiny_lm
from llmppl.training.history import History

DATA = [("a", "bc."), ("b", "cb."), ("ab", "bb.")]
HELD_OUT = [("ba", "bc."), ("bb", "cb.")]


def learned(seed: int = 1) -> tuple[LM, LM, Program]:
    """A model, the same with parameters away from the identity, and a program of the latter."""
    lm = tiny_lm(vocabulary=4, seed=0, dtype=torch.float64)
    theta = lm.adapt(rank=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theta.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return lm, theta, program_of(theta)


def program_of(theta: LM) -> Program:
    def program(beginning: Any, ending: Any) -> None:
        middle = pyro.sample("middle", theta(beginning, max_tokens=2, stop="."))
        pyro.sample("ending", theta(beginning, middle), obs=theta.encode(ending))

    return program


def texts_of(theta: LM) -> Tensor:
    return theta("a", max_tokens=2, stop=".").enumerate_support()


def joint(theta: LM, beginning: str, ending: str) -> tuple[Tensor, Tensor]:
    """log p(z) + log p(x|z) of every text, with gradients, by the distributions alone."""
    texts = texts_of(theta)
    log_prior = theta(beginning, max_tokens=2, stop=".").log_prob(texts)
    return texts, log_prior + theta(beginning, texts).log_prob(theta.encode(ending))


def gradient(loss: Tensor, theta: LM) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(theta.parameters()))])


def exact_gradient(theta: LM, beginning: str, ending: str) -> Tensor:
    """Of −log p(x), by enumeration."""
    return gradient(-joint(theta, beginning, ending)[1].logsumexp(0), theta)


def log_p(theta: LM, rows: list[tuple[str, str]]) -> float:
    with torch.no_grad():
        return sum(float(joint(theta, *row)[1].logsumexp(0)) for row in rows) / len(rows)


class Every(pyro.distributions.TorchDistribution):
    """The uniform law over the enumerated texts, whose draws, as many as there are texts, are each of them once."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.integer_interval(-1, 100), 1)

    def __init__(self, texts: Tensor, batch_shape: Any = torch.Size()) -> None:
        self.texts = texts
        super().__init__(batch_shape, texts.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: object = None) -> Every:
        return Every(self.texts, torch.Size(batch_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        assert torch.Size(sample_shape) + self.batch_shape == (len(self.texts),)
        return self.texts

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.full(value.shape[:-1], -math.log(len(self.texts)), dtype=torch.float64, requires_grad=True)


# --- the M-step --------------------------------------------------------------------------------

COUNT = 13
"""Texts of at most two tokens over four."""


@pytest.mark.parametrize(
    "objective", [TrajectoryBalance(COUNT), WakeSleep(COUNT, insomnia=1.0)], ids=lambda o: type(o).__name__
)
def test_the_m_step_has_the_gradient_of_the_enumerated_evidence(objective: ELBO) -> None:
    """With every text as a particle the self-normalised weights are the posterior."""
    _, theta, program = learned()

    def guide(beginning: str, ending: str) -> None:
        pyro.sample("middle", Every(texts_of(theta)))

    assert len(texts_of(theta)) == COUNT
    loss = objective.differentiable_loss(program, guide, *DATA[0])
    expected = exact_gradient(theta, *DATA[0])
    assert expected.abs().max() > 0.1
    np.testing.assert_allclose(gradient(loss, theta), expected, rtol=1e-5, atol=1e-6)


OBJECTIVES: dict[str, Callable[[], ParticleObjective]] = {
    "vargrad": lambda: TrajectoryBalance(6),
    "learned partition": lambda: TrajectoryBalance(6, log_partition="learned"),
    "subtrajectory": lambda: SubTrajectoryBalance(6),
    "wake-sleep": lambda: WakeSleep(6, insomnia=0.3),
    "sleep and wake-theta": lambda: WakeSleep(6, insomnia=0.0),
    "leave-one-out": lambda: LeaveOneOutELBO(6),
}


@pytest.mark.parametrize("name", [*OBJECTIVES])
def test_the_program_learns_from_the_weighted_particles_and_nothing_else(name: str) -> None:
    lm, theta, program = learned()
    guide = GFlowNetGuide(program, lm, rank=2, seed=3)
    drawn: list[Tensor] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        values = guide(*args, **kwargs)
        drawn.append(values["middle"])
        return values

    spy.log_partition = guide.log_partition  # type: ignore[attr-defined]
    loss = OBJECTIVES[name]().differentiable_loss(program, spy, *DATA[0])
    texts = drawn[0].reshape(6, 2)
    log_p = theta("a", max_tokens=2, stop=".").log_prob(texts) + theta("a", texts).log_prob(theta.encode("bc."))
    with torch.no_grad():
        log_q = structure(guide, DATA[0], {}).nodes["middle"]["fn"].log_prob(texts)
    weights = (log_p.detach() - log_q).softmax(0)
    if name == "leave-one-out":  # the ELBO's own gradient
        weights = torch.full_like(weights, 1 / 6)
    else:
        assert weights.max() > 2 * weights.min()
    np.testing.assert_allclose(gradient(loss, theta), gradient(-(weights * log_p).sum(), theta), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "leave-one-out"])
def test_the_guides_gradient_is_that_of_a_frozen_program(name: str) -> None:
    lm, theta, program = learned()
    guide = GFlowNetGuide(program, lm, rank=2, seed=3)

    def guide_gradient() -> Tensor:
        pyro.set_rng_seed(5)
        loss = OBJECTIVES[name]().differentiable_loss(program, guide, *DATA[0])
        grads = torch.autograd.grad(loss, list(guide.weights.parameters()))
        return torch.cat([g.flatten() for g in grads])

    learning = guide_gradient()
    theta.requires_grad_(False)
    if name == "sleep and wake-theta":  # a frozen program needs no wake phase, so the random numbers are others
        return
    np.testing.assert_allclose(learning, guide_gradient(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", [TrajectoryBalance, SubTrajectoryBalance])
def test_only_draws_of_the_guide_as_it_is_teach_the_program(objective: Any) -> None:
    """Hotter, replayed and simulated particles have weights of another proposal."""
    lm, theta, program = learned()
    guide = GFlowNetGuide(program, lm, rank=2, seed=3)
    for behaviour in (Behaviour(tempered=1.0), Behaviour(sleep=1.0)):
        loss = objective(6, behaviour=behaviour).differentiable_loss(program, guide, *DATA[0])
        grads = torch.autograd.grad(loss, list(theta.parameters()), allow_unused=True)
        assert all(g is None or not g.any() for g in grads), behaviour
    replaying = objective(6, behaviour=Behaviour(replayed=0.5))
    for _ in range(2):
        loss = replaying.differentiable_loss(program, guide, *DATA[0])
    # What was replayed is scored anew: its program was another.
    (name,) = rows_of(program, DATA[0], {}, False)
    assert all(entry.log_p is None for entry in replaying.behaviour.buffer.draw(name, 6))


def test_the_m_step_is_skipped_where_the_observations_are_simulated() -> None:
    lm, theta, program = learned()
    guide = GFlowNetGuide(program, lm, rank=2, seed=3)
    model, told = observing(program, guide, {"ending": theta.encode("bb.")})
    loss = TrajectoryBalance(6).differentiable_loss(model, told, *DATA[0])
    grads = torch.autograd.grad(loss, list(theta.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


# --- EM ----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "objective",
    [TrajectoryBalance(8), SubTrajectoryBalance(8), WakeSleep(8), LeaveOneOutELBO(8)],
    ids=lambda o: type(o).__name__,
)
def test_em_raises_the_evidence_of_held_out_rows(objective: ELBO) -> None:
    lm = tiny_lm(vocabulary=4, seed=0, dtype=torch.float64)
    theta = lm.adapt(rank=2, seed=1)
    program = program_of(theta)
    guide = GFlowNetGuide(program, lm, rank=2, seed=3)
    before, untouched = log_p(theta, HELD_OUT), log_p(lm, HELD_OUT)
    assert before == pytest.approx(untouched, abs=1e-12)  # an adapter starts as the identity
    history = fit(program, guide, DATA, objective, 40, learning_rate=1e-2, seed=0, progress=False)
    assert log_p(theta, HELD_OUT) > before + 2.0
    assert log_p(theta, DATA) > log_p(lm, DATA) + 2.0
    assert log_p(lm, HELD_OUT) == untouched
    assert len(history.learned) == 2 * 7 * 2
    assert np.mean(history.log_evidence[-5:]) > np.mean(history.log_evidence[:5]) + 2.0
    assert "the program learned, too" in repr(history)


@pytest.mark.long
def test_the_guide_follows_the_program_that_learns() -> None:
    """After EM the guide is near the posterior of the program as it is by then, and far from that of before."""
    lm, theta, program = learned()
    guide = GFlowNetGuide(program, lm, rank=4, seed=3)
    with torch.no_grad():
        before = joint(theta, *DATA[0])[1].log_softmax(0)
    schedule = {"learning_rate": 1e-2, "model_learning_rate": 2e-3, "progress": False, "seed": 0}
    fit(program, guide, DATA, TrajectoryBalance(8), 150, **schedule)
    with torch.no_grad():
        texts, log_joint = joint(theta, *DATA[0])
        after = log_joint.log_softmax(0)
        log_q = structure(guide, DATA[0], {}).nodes["middle"]["fn"].log_prob(texts)
    assert kl(after, log_q) < 0.1 < 0.3 < kl(before, log_q)


@pytest.mark.long
@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0),
        RenyiELBO(alpha=0.5, num_particles=8, vectorize_particles=True, max_plate_nesting=0),
        ReweightedWakeSleep(num_particles=8, vectorize_particles=True, insomnia=1.0, max_plate_nesting=0),
        TrajectoryBalance(8),
    ],
    ids=lambda elbo: type(elbo).__name__,
)
def test_svi_trains_guide_and_program(elbo: ELBO) -> None:
    lm, theta, program = learned()
    guide = GFlowNetGuide(program, lm, rank=2, seed=3)
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 1e-2}), loss=elbo)
    before, proposal = log_p(theta, DATA), [p.clone() for p in guide.weights.parameters()]
    for step in range(30):
        svi.step(*DATA[step % 3])
    assert log_p(theta, DATA) > before + 1.0
    assert all(not torch.equal(a, b) for a, b in zip(proposal, guide.weights.parameters(), strict=True))


def test_supervised_learning_is_em_without_latents() -> None:
    _, theta, program = learned()
    complete = pyro.poutine.condition(program, data={"middle": theta.encode("c.")})
    before = log_p(theta, DATA[:1])
    history = fit(complete, lambda *args: None, DATA[:1], Trace_ELBO(), 20, learning_rate=1e-2, progress=False)
    assert history.loss[-1] < history.loss[0] - 2.0
    assert log_p(theta, DATA[:1]) > before + 1.0


# --- what is frozen, what is refused -------------------------------------------------------------


def test_a_frozen_prior_stays_frozen() -> None:
    lm, theta, program = learned()
    weights = [p.clone() for p in theta.parameters()]
    theta.requires_grad_(False)
    guide = GFlowNetGuide(program, lm, rank=2, seed=3)
    history = fit(program, guide, DATA, TrajectoryBalance(6), 3, learning_rate=1e-2, progress=False)
    assert history.learned == ()
    assert "learned" not in repr(history)
    assert all(torch.equal(a, b) for a, b in zip(weights, theta.parameters(), strict=True))
    theta.requires_grad_(True)
    fit(program, guide, DATA, TrajectoryBalance(6), 3, learning_rate=1e-2, progress=False)
    assert not any(torch.equal(a, b) for a, b in zip(weights, theta.parameters(), strict=True))


def test_the_learning_rates_are_each_its_own() -> None:
    lm, theta, program = learned()
    guide = GFlowNetGuide(program, lm, rank=2, seed=3)
    weights = [p.clone() for p in theta.parameters()]
    rates = {"learning_rate": 1e-2, "model_learning_rate": 1e-5, "warmup_steps": 1}
    fit(program, guide, DATA, TrajectoryBalance(6), 1, progress=False, **rates)
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(weights, theta.parameters(), strict=True))
    assert 5e-6 < moved < 2e-5  # AdamW's first step is the rate


def test_what_belongs_to_a_frozen_program_is_refused() -> None:
    lm, theta, program = learned()
    guide = GFlowNetGuide(program, lm, rank=2, seed=3)
    pairs = simulate(program, DATA, num_pairs=4, progress=False)
    with pytest.raises(ValueError, match="data= are simulated pairs"):
        fit(program, guide, pairs, WakeSleep(4, insomnia=0.0), 2, progress=False)
    for evaluation in (Evaluation(DATA, references=[0.0] * 3), Evaluation(DATA, pairs=pairs)):
        with pytest.raises(ValueError, match="belongs to the program as it is"):
            fit(program, guide, DATA, TrajectoryBalance(4), 2, evaluation=evaluation, progress=False)
    with pytest.raises(ValueError, match="Regularisation"):
        fit(
            program,
            guide,
            DATA,
            TrajectoryBalance(4),
            2,
            regularisation=Regularisation(simulated=0.5),
            progress=False,
        )
    with pytest.raises(ValueError, match="adapted already"):
        theta.adapt()
    with pytest.raises(ValueError, match="rank"):
        lm.adapt(rank=0)
    with pytest.raises(ValueError, match="nothing to save"):
        lm.save("x")


def test_evaluations_of_a_program_that_learns_have_each_their_own_evidence() -> None:
    lm, _, program = learned()
    guide = GFlowNetGuide(program, lm, rank=2, seed=3)
    evaluation = Evaluation(HELD_OUT, every=10, num_samples=64, simulations=0, patience=1)
    rates = {"learning_rate": 1e-2, "model_learning_rate": 1e-2}
    history = fit(program, guide, DATA, TrajectoryBalance(8), 30, evaluation=evaluation, progress=False, **rates)
    for found in history.evaluations:
        assert found.gap == pytest.approx(found.log_evidence - found.elbo, abs=1e-9)
    assert history.evaluations[1].log_evidence > history.evaluations[0].log_evidence + 1.0
    assert history.restored is None or history.restored > 0


# --- files and copies ----------------------------------------------------------------------------


def test_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(steps: int, folder: Path, resume: bool = False, **other: float) -> tuple[list[Tensor], History]:
        lm, theta, program = learned()
        guide = GFlowNetGuide(program, lm, rank=2, seed=3)
        settings = {"learning_rate": 1e-2, "seed": 0, "progress": False, "checkpoint_every": 3, **other}
        history = fit(program, guide, DATA, SubTrajectoryBalance(4), steps, folder=folder, resume=resume, **settings)
        return [p.detach() for p in (*theta.parameters(), *guide.parameters())], history

    whole, first = run(6, tmp_path / "whole")
    run(3, tmp_path / "halves")
    parts, second = run(6, tmp_path / "halves", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert first.loss == second.loss
    assert first.log_evidence == second.log_evidence
    with pytest.raises(ValueError, match="model_learning_rate"):
        run(9, tmp_path / "halves", resume=True, model_learning_rate=5.0)


def test_parameters_are_saved_and_loaded(tmp_path: Path) -> None:
    _, theta, _ = learned()
    theta.save(tmp_path / "theta.safetensors")
    other = tiny_lm(vocabulary=4, seed=0, dtype=torch.float64).adapt(rank=2, seed=9)
    assert log_p(other, DATA) != pytest.approx(log_p(theta, DATA), abs=0.01)
    assert other.load(tmp_path / "theta.safetensors") is other
    assert log_p(other, DATA) == pytest.approx(log_p(theta, DATA), abs=1e-5)  # in float32
    with pytest.raises(ValueError, match="rank"):
        other.base.adapt(rank=3).load(tmp_path / "theta.safetensors")


def test_copies_learn_apart() -> None:
    lm, theta, _ = learned()
    for twin in (copy.deepcopy(theta), pickle.loads(pickle.dumps(theta))):
        assert twin.adapter == theta.adapter
        assert twin.base is not lm
        assert log_p(twin, DATA) == log_p(theta, DATA)
        with torch.no_grad():
            next(iter(twin.parameters())).add_(1.0)
        assert log_p(twin, DATA) != log_p(theta, DATA)
    both = copy.deepcopy((lm, theta))
    assert both[1].base is both[0]
    assert both[1].transformer is both[0].transformer


def test_posteriors_of_a_learned_program_are_exact() -> None:
    lm, theta, program = learned()
    exact = exact_posterior(program)(*DATA[0])
    guide = GFlowNetGuide(program, lm, rank=2, seed=3)
    pyro.set_rng_seed(0)
    posterior = importance(program, guide, 4000)(*DATA[0])
    assert posterior.exactness == "marginal"
    assert abs(posterior.log_evidence - exact.log_evidence) < 5 * posterior.log_evidence_error
    assert exact.log_evidence == pytest.approx(log_p(theta, DATA[:1]), abs=1e-9)


def test_a_prompt_guide_of_the_learned_model_proposes_by_it() -> None:
    lm, theta, program = learned()
    texts = texts_of(theta)
    own = structure(PromptGuide(program, theta), DATA[0], {}).nodes["middle"]["fn"]
    base = structure(PromptGuide(program, lm), DATA[0], {}).nodes["middle"]["fn"]
    told = theta("bc.", "a", max_tokens=2, stop=".").log_prob(texts)
    assert torch.allclose(own.log_prob(texts), told)
    assert not torch.allclose(base.log_prob(texts), told, atol=0.1)
    assert "rank=2" in repr(theta)
    assert "rank" not in repr(lm)


def test_sensitivities_are_those_of_the_learned_program() -> None:
    """As of a model whose weights have the adapter merged into them."""
    lm, theta, program = learned()
    merged = copy.deepcopy(lm)
    with torch.no_grad():
        for layer in merged.transformer.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.get_base_layer().weight.add_(layer.get_delta_weight(theta.adapter))
    texts = {"middle": torch.tensor([[1, 0], [2, 3]])}
    own = sensitivity(lm, program, DATA[0], {}, texts)["middle"]
    expected = sensitivity(merged, program_of(merged), DATA[0], {}, texts)["middle"]
    base = sensitivity(lm, program_of(lm), DATA[0], {}, texts)["middle"]
    for part in ("own", "others"):
        torch.testing.assert_close(getattr(own, part), getattr(expected, part), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(getattr(own, part), getattr(base, part), atol=0.01)


def test_a_guide_of_the_learned_model_starts_as_that_and_goes_its_own_way() -> None:
    _, theta, program = learned()
    texts = texts_of(theta)
    guide = GFlowNetGuide(program, theta, rank=16, seed=3)
    assert guide.rank == 2  # its adapter is a copy

    def log_q(guide: Any) -> Tensor:
        with torch.no_grad():
            return structure(guide, DATA[0], {}).nodes["middle"]["fn"].log_prob(texts)

    assert torch.equal(log_q(guide), log_q(PromptGuide(program, theta)))
    weights = [p.clone() for p in theta.parameters()]
    theta.requires_grad_(False)
    fit(program, guide, DATA, TrajectoryBalance(6), 2, learning_rate=1e-2, progress=False)
    assert not torch.allclose(log_q(guide), log_q(PromptGuide(program, theta)), atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(weights, theta.parameters(), strict=True))
    guide.reset_parameters()
    assert torch.equal(log_q(guide), log_q(PromptGuide(program, theta)))
    assert torch.equal(log_q(copy.deepcopy(guide)), log_q(guide))
