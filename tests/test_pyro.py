"""Pyro's own machinery works on these distributions and guides unmodified."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story
from pyro import poutine
from pyro.infer import (
    SVI,
    Importance,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceGraph_ELBO,
)
from pyro.infer.autoguide import AutoNormal

from llmppl import LM, Behaviour, exact_posterior
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.objectives import LeaveOneOutELBO, SubTrajectoryBalance, TrajectoryBalance

ELBOS = {
    "trace": Trace_ELBO(num_particles=4),
    "trace, vectorized": Trace_ELBO(num_particles=4, vectorize_particles=True),
    "graph": TraceGraph_ELBO(num_particles=4, vectorize_particles=True),
    "renyi": RenyiELBO(alpha=0.5, num_particles=4, vectorize_particles=True),
    "wake": ReweightedWakeSleep(num_particles=4),
}


@pytest.mark.parametrize("elbo", ELBOS)
def test_pyros_elbos_train_a_text_guide(story: Story, elbo: str) -> None:
    guide = AutoregressiveGuide(story.program, story.lm, rank=2)
    before = [p.detach().clone() for p in guide.parameters()]
    svi = SVI(story.program, guide, pyro.optim.Adam({"lr": 0.01}), loss=ELBOS[elbo])
    for _ in range(2):
        svi.step(*story.args)
    assert any(not torch.equal(b, p) for b, p in zip(before, guide.parameters(), strict=True))
    assert all(p.isfinite().all() for p in guide.parameters())


@pytest.mark.parametrize("vectorize", [False, True])
def test_trace_elbo_estimates_the_exact_elbo(story: Story, vectorize: bool) -> None:
    guide = PromptGuide(story.program, story.lm)
    loss = Trace_ELBO(num_particles=2000 if vectorize else 300, vectorize_particles=vectorize).loss(
        story.program, guide, *story.args
    )
    texts, log_joint = story.joint()
    from llmppl.programs.structure import structure

    log_q = structure(guide, story.args, {}).nodes["middle"]["fn"].log_prob(texts)
    exact = (log_q.exp() * (log_q - log_joint)).sum().item()
    deviation = (log_q.exp() * (log_q - log_joint - exact).square()).sum().sqrt().item()
    assert abs(loss - exact) < 4 * deviation / (2000 if vectorize else 300) ** 0.5


def test_renyi_elbo_approaches_the_evidence(story: Story) -> None:
    exact = exact_posterior(story.program)(*story.args).log_evidence.item()
    bound = -RenyiELBO(alpha=0.0, num_particles=5000, vectorize_particles=True).loss(
        story.program, PromptGuide(story.program, story.lm), *story.args
    )
    assert bound == pytest.approx(exact, abs=0.2)


def test_predictive_of_the_prior_and_of_a_guide(story: Story) -> None:
    prior = Predictive(lambda b: pyro.sample("middle", story.lm(b, max_tokens=3, stop=".")), num_samples=20)
    assert prior("ab")["middle"].shape == (20, 3)
    guide = PromptGuide(story.program, story.lm)
    for parallel in (False, True):
        samples = Predictive(story.program, guide=guide, num_samples=7, parallel=parallel)(*story.args)
        assert samples["middle"].shape == (7, 3)


@pytest.mark.long
def test_pyros_importance_agrees_with_enumeration(story: Story) -> None:
    guide = PromptGuide(story.program, story.lm)
    run = Importance(story.program, guide, num_samples=300).run(*story.args)
    exact = exact_posterior(story.program)(*story.args).log_evidence.item()
    assert torch.stack([torch.as_tensor(w) for w in run.log_weights]).logsumexp(0).item() - torch.tensor(
        300.0
    ).log().item() == pytest.approx(exact, abs=0.5)


def test_condition_replay_block_and_uncondition(story: Story) -> None:
    value = story.lm.encode("de.")
    trace = poutine.trace(poutine.condition(story.program, data={"middle": value})).get_trace(*story.args)
    by_hand = story.prior().log_prob(value) + story.lm("ab", value).log_prob(story.lm.encode("cd"))
    assert trace.log_prob_sum().item() == pytest.approx(by_hand.item())
    guided = poutine.trace(PromptGuide(story.program, story.lm)).get_trace(*story.args)
    replayed = poutine.trace(poutine.replay(story.program, guided)).get_trace(*story.args)
    assert torch.equal(replayed.nodes["middle"]["value"], guided.nodes["middle"]["value"])
    assert list(guided.stochastic_nodes) == ["middle"]
    hidden = poutine.trace(poutine.block(story.program, hide=["middle"])).get_trace(*story.args)
    assert "middle" not in hidden.nodes


def test_plates_expand_and_subsample(lm: LM) -> None:
    endings = lm.encode(["cd", "e", "ab", "dd"])

    def model(subsample: int | None) -> torch.Tensor:
        with pyro.plate("rows", 4, subsample_size=subsample) as index:
            middle = pyro.sample("middle", lm("ab", max_tokens=3, stop="."))
            pyro.sample("ending", lm("ab", middle), obs=endings[index])
        return middle

    assert model(None).shape == (4, 3)
    assert model(2).shape == (2, 3)
    guide = AutoregressiveGuide(model, lm, rank=2)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=TrajectoryBalance(6))
    assert svi.step(2) >= 0
    assert svi.step(None) >= 0


@pytest.mark.long
def test_a_mixed_program_trains_text_and_continuous_latents_together() -> None:
    from llmppl.testing import tiny_lm

    lm = tiny_lm()

    def model(ending: str) -> None:
        rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        pyro.sample("measured", dist.Normal(rate, 0.5), obs=torch.tensor(1.0))
        middle = pyro.sample("middle", lm("ab", max_tokens=2, stop="."))
        pyro.sample("ending", lm("ab", middle), obs=lm.encode(ending))

    others = AutoNormal(poutine.block(model, expose=["rate", "measured"]), init_scale=0.3)
    guide = AutoregressiveGuide(model, lm, others=others, rank=4, seed=0)
    rates = pyro.optim.Adam(lambda name: {"lr": 1e-3 if "lora" in name else 2e-2})
    svi = SVI(model, guide, rates, loss=LeaveOneOutELBO(16))
    for _ in range(250):
        svi.step("cd")
    # The posterior of the normal part is N(0.8, 0.447²).
    assert others.median()["rate"].item() == pytest.approx(0.8, abs=0.12)
    text_part = exact_posterior(
        poutine.block(poutine.condition(model, data={"rate": torch.tensor(0.0)}), hide=["rate", "measured"])
    )(
        "cd",
    ).log_evidence
    evidence = text_part + dist.Normal(0.0, 1.25**0.5).log_prob(torch.tensor(1.0)).item()
    gap = evidence + LeaveOneOutELBO(2000).loss(model, guide, "cd")
    assert -0.05 < gap < 0.25


def test_the_guide_has_no_observed_sites_and_keeps_the_frozen_model_out(story: Story) -> None:
    guide = AutoregressiveGuide(story.program, story.lm, rank=2)
    trace = poutine.trace(guide).get_trace(*story.args)
    assert not trace.observation_nodes
    assert all("lora" in name for name, _ in guide.named_parameters())
    assert not any(p.requires_grad for n, p in story.lm.transformer.named_parameters() if "lora" not in n)
    assert all(name.startswith(guide.adapter) for name in pyro.get_param_store())


def test_the_sleep_phase_of_pyros_wake_sleep_works_on_a_bounded_observation(lm: LM) -> None:
    def model(ending: str) -> None:
        middle = pyro.sample("middle", lm("ab", max_tokens=2, stop="."))
        pyro.sample("ending", lm("ab", middle, max_tokens=2), obs=lm.encode(ending))

    guide = AutoregressiveGuide(model, lm, rank=2)
    loss = ReweightedWakeSleep(num_particles=4, insomnia=0.5, model_has_params=False)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=loss)
    svi.step("cd")


def test_in_a_subsampled_plate_each_text_is_told_its_own_row(lm: LM) -> None:
    endings = ["a", "b", "c", "d", "e", "ab"]

    def program(endings: list[str]) -> None:
        with pyro.plate("data", len(endings), subsample_size=2) as rows:
            middle = pyro.sample("middle", lm("a", max_tokens=2, stop="."))
            pyro.sample("ending", lm("a", middle), obs=lm.encode([endings[n] for n in rows.tolist()]))

    guide = PromptGuide(program, lm)
    for _ in range(20):
        nodes = poutine.trace(guide).get_trace(endings).nodes
        told = [lm.decode(row[row >= 0]) for row in nodes["middle"]["fn"].context]
        assert told == [endings[n] + "a" for n in nodes["data"]["value"].tolist()]
    with pytest.raises(ValueError, match=r"plate 'data' takes 2 of 6 rows.*batch_size="):
        SubTrajectoryBalance(2).loss(program, AutoregressiveGuide(program, lm, rank=2), endings)
    replaying = TrajectoryBalance(4, behaviour=Behaviour(0.5, replayed=0.5))
    with pytest.raises(ValueError, match=r"plate 'data'.*a replay buffer needs to know which"):
        replaying.loss(program, AutoregressiveGuide(program, lm, rank=2), endings)
