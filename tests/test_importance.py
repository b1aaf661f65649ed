"""Importance sampling and enumeration: unbiased, exact, per observation."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story
from pyro import poutine
from test_objectives import perturbed

from llmppl import LM, exact_posterior, fit, importance, inference_gap
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.objectives import TrajectoryBalance


def test_the_enumerated_evidence_is_the_sum_of_the_joint(story: Story) -> None:
    _, log_joint = story.joint()
    posterior = exact_posterior(story.program, *story.args)
    assert posterior.log_evidence == pytest.approx(log_joint.logsumexp(0).item(), abs=1e-12)
    assert posterior.log_evidence_error == 0
    assert posterior.weights.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(posterior.weights, log_joint.softmax(0).numpy(), atol=1e-12)


def test_expected_weight_is_the_evidence_by_enumeration(story: Story) -> None:
    """Σ q(z) w(z) = Z to 1e-9 in float64, for an adapted guide."""
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2))
    texts, log_joint = story.joint()
    from llmppl.tracing import structure

    log_q = structure(guide, story.args, {}).nodes["middle"]["fn"].log_prob(texts).detach()
    posterior = importance(story.program, guide, num_samples=400)(*story.args)
    index = (torch.as_tensor(posterior.samples["middle"])[:, None] == texts).all(-1).long().argmax(-1)
    weight = log_joint - log_q
    # Each reported weight is the exact one of its text, and those average to Z exactly.
    np.testing.assert_allclose(posterior.log_weights, weight[index].numpy(), atol=1e-9)
    assert (log_q + weight).logsumexp(0).item() == pytest.approx(log_joint.logsumexp(0).item(), abs=1e-9)


# The prior as a proposal: on a random model it is closer to the posterior than a prompt is.
FROM_PRIOR = {"middle": lambda beginning: [beginning]}


@pytest.mark.parametrize("kind", ["prompt", "adapted"])
def test_the_evidence_estimate_is_unbiased_over_many_seeds(story: Story, kind: str) -> None:
    guide = (
        PromptGuide(story.program, story.lm, FROM_PRIOR)
        if kind == "prompt"
        else perturbed(AutoregressiveGuide(story.program, story.lm, FROM_PRIOR, rank=2), 0.05)
    )
    exact = exact_posterior(story.program, *story.args).log_evidence
    ratios = []
    for seed in range(100):
        pyro.set_rng_seed(seed)
        ratios.append(math.exp(importance(story.program, guide, 16)(*story.args).log_evidence - exact))
    error = np.std(ratios, ddof=1) / math.sqrt(len(ratios))
    # Within 3 standard errors, and the error small enough to notice 15 %.
    assert error < 0.15
    assert abs(np.mean(ratios) - 1) < 3 * error
    assert np.mean(np.log(ratios)) <= 3 * error, "log of the estimate lies below log Z in expectation"


def test_rows_of_a_plate_are_observations_of_their_own(story: Story) -> None:
    beginnings, endings = ["ab", "d", "ceb"], ["cd", "ea", "b"]
    guide = PromptGuide(story.program, story.lm)
    exact = np.array(
        [exact_posterior(story.program, b, e).log_evidence for b, e in zip(beginnings, endings, strict=True)]
    )

    def rows(beginnings: list[str], endings: list[str]) -> None:
        with pyro.plate("rows", len(beginnings)):
            story.program(beginnings, endings)

    enumerated = exact_posterior(rows, beginnings, endings)
    np.testing.assert_allclose(enumerated.log_evidence, exact, atol=1e-9)
    in_plate = importance(rows, PromptGuide(rows, story.lm), 3000)(beginnings, endings)
    vectorized = importance(story.program, guide, 3000, vectorize_data=True)(beginnings, endings)
    for posterior in (in_plate, vectorized):
        assert posterior.batch_shape == (3,)
        assert posterior.samples["middle"].shape == (3000, 3, 3)
        assert np.all(np.abs(posterior.log_evidence - exact) < 4 * posterior.log_evidence_error + 0.02)


def test_a_global_latent_makes_the_whole_plate_one_observation(lm: LM) -> None:
    def model(endings: list[str]) -> None:
        theme = pyro.sample("theme", lm("ab", max_tokens=2, stop="."))
        with pyro.plate("rows", len(endings)):
            pyro.sample("ending", lm(theme, "c"), obs=lm.encode(endings))

    endings = ["de", "a", "ccc"]
    posterior = importance(model, PromptGuide(model, lm), 500)(endings)
    assert posterior.batch_shape == ()
    assert posterior.samples["theme"].shape == (500, 2)
    exact = exact_posterior(model, endings)
    texts = lm("ab", max_tokens=2, stop=".").enumerate_support()
    by_hand = lm("ab", max_tokens=2, stop=".").log_prob(texts)
    for ending in endings:
        by_hand = by_hand + lm(texts, "c").log_prob(lm.encode(ending))
    assert exact.log_evidence == pytest.approx(by_hand.logsumexp(0).item(), abs=1e-9)
    assert abs(posterior.log_evidence - exact.log_evidence) < 4 * posterior.log_evidence_error
    # The guide is told all three endings: its context holds their tokens one after another.
    from llmppl.tracing import structure

    fn = structure(PromptGuide(model, lm), (endings,), {}).nodes["theme"]["fn"]
    assert lm.codec.decode([t for t in fn.context.tolist() if t >= 0]) == "deacccab"


def test_two_latent_texts_and_a_latent_inside_a_plate_only_partly_shared(lm: LM) -> None:
    def model(ending: str) -> None:
        first = pyro.sample("first", lm("ab", max_tokens=2, stop="."))
        second = pyro.sample("second", lm("ab", first, max_tokens=2, stop="."))
        pyro.sample("ending", lm("ab", first, second), obs=lm.encode(ending))

    exact = exact_posterior(model, "cd")
    assert exact.num_samples == 31**2
    prompts = {"first": lambda: ["ab"], "second": lambda first: ["ab", first]}
    posterior = importance(model, PromptGuide(model, lm, prompts), 2000)("cd")
    assert abs(posterior.log_evidence - exact.log_evidence) < 4 * posterior.log_evidence_error

    def inner(endings: list[str]) -> None:
        with pyro.plate("stories", 2, dim=-1):
            with pyro.plate("sentences", 3, dim=-2):
                middle = pyro.sample("middle", lm(["a", "b"], max_tokens=2, stop="."))
            # Kept dimensions of size one leave the particles' own dimension where it is.
            sentences = [middle[..., n : n + 1, :, :] for n in range(3)]
            pyro.sample("ending", lm(*sentences), obs=lm.encode(endings))

    posterior = importance(inner, PromptGuide(inner, lm), 70)(["cd", "e"])
    assert posterior.batch_shape == (2,)
    assert posterior.samples["middle"].shape == (70, 2, 3, 2)
    middles = torch.as_tensor(posterior.samples["middle"])
    prior = lm(["a", "b"], max_tokens=2, stop=".")
    log_joint = prior.log_prob(middles.movedim(2, 1)).sum(1)
    log_joint = log_joint + lm(middles[:, :, 0], middles[:, :, 1], middles[:, :, 2]).log_prob(lm.encode(["cd", "e"]))
    np.testing.assert_allclose(posterior.log_joint, log_joint.numpy(), atol=1e-9)


def test_mixed_programs_take_another_guide_for_other_latents(lm: LM) -> None:
    def model(ending: str) -> None:
        rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
        pyro.factor("rate_prior", 3 * rate)
        plan = pyro.sample("plan", dist.Categorical(torch.tensor([0.3, 0.7])))
        starts = lm.encode(["ab", "cd"])
        middle = pyro.sample("middle", lm(starts[plan], max_tokens=2, stop="."))
        pyro.sample("ending", lm(starts[plan], middle), obs=lm.encode(ending))

    def others(ending: str) -> None:
        pyro.sample("rate", dist.Beta(2.0, 1.0))
        pyro.sample("plan", dist.Categorical(torch.tensor([0.5, 0.5])))

    posterior = importance(model, PromptGuide(model, lm, others=others), 4000)("ed")
    assert posterior.samples["rate"].shape == (4000,)
    assert posterior.samples["plan"].shape == (4000,)
    conditioned = poutine.block(poutine.condition(model, data={"rate": torch.tensor(0.5)}), hide=["rate", "rate_prior"])
    text_part = exact_posterior(conditioned, "ed").log_evidence
    grid = torch.linspace(0.00005, 0.99995, 10_000, dtype=torch.float64)
    rate_part = (dist.Beta(2.0, 2.0).log_prob(grid) + 3 * grid).exp().mean().log().item()
    assert abs(posterior.log_evidence - (text_part + rate_part)) < 4 * posterior.log_evidence_error


def test_a_choice_and_a_text_are_guided_together(lm: LM) -> None:
    def model(ending: str) -> None:
        plan = pyro.sample("plan", lm.choice("ab", options=["c", "de", "."]))
        middle = pyro.sample("middle", lm("ab", plan, max_tokens=2, stop="."))
        pyro.sample("ending", lm("ab", plan, middle), obs=lm.encode(ending))

    guide = perturbed(AutoregressiveGuide(model, lm, rank=2), 0.05)
    exact = exact_posterior(model, "cd")
    assert exact.num_samples == 3 * 31
    prior = {"plan": lambda: ["ab"], "middle": lambda plan: ["ab", plan]}
    posterior = importance(model, PromptGuide(model, lm, prior), 3000)("cd")
    assert abs(posterior.log_evidence - exact.log_evidence) < 4 * posterior.log_evidence_error
    before = [p.detach().clone() for p in guide.parameters()]
    fit(model, guide, [("cd",)], TrajectoryBalance(8), steps=2, seed=0, progress=False)
    assert any(not torch.equal(b, p) for b, p in zip(before, guide.parameters(), strict=True))


def test_a_hard_condition_gives_zero_weights_and_none_positive_is_an_error(story: Story) -> None:
    lm = story.lm

    def model(ending: str, letter: int) -> None:
        middle = pyro.sample("middle", lm("ab", max_tokens=3, stop="."))
        hit = (middle == letter).any(-1)
        pyro.factor("has_letter", torch.where(hit, 0.0, -torch.inf))
        pyro.sample("ending", lm("ab", middle), obs=lm.encode(ending))

    guide = PromptGuide(model, lm, {"middle": lambda: ["ab"]})
    posterior = importance(model, guide, 2000)("cd", 1)
    assert np.isneginf(posterior.log_weights).any()
    exact = exact_posterior(model, "cd", 1)
    assert abs(posterior.log_evidence - exact.log_evidence) < 4 * posterior.log_evidence_error
    with pytest.raises(ValueError, match="none of the 50 samples has positive weight"):
        importance(model, guide, 50)("cd", 99)


def test_scaled_sites_are_refused(story: Story) -> None:
    scaled = poutine.scale(story.program, 2.0)
    with pytest.raises(ValueError, match="'middle' is scaled"):
        importance(scaled, PromptGuide(story.program, story.lm), 4)(*story.args)


def test_samples_and_weights_reproduce_from_a_seed(story: Story) -> None:
    runs = []
    for _ in range(2):
        pyro.set_rng_seed(11)
        runs.append(importance(story.program, PromptGuide(story.program, story.lm), 20)(*story.args))
    assert np.array_equal(runs[0].samples["middle"], runs[1].samples["middle"])
    assert np.array_equal(runs[0].log_weights, runs[1].log_weights)


def test_the_inference_gap_is_the_reverse_kl(story: Story) -> None:
    guide = PromptGuide(story.program, story.lm)
    posterior = importance(story.program, guide, 4000)(*story.args)
    exact = exact_posterior(story.program, *story.args)
    gap = inference_gap(posterior, exact)
    assert gap.certified
    assert gap.source == "enumeration"
    texts, log_joint = story.joint()
    from llmppl.tracing import structure

    log_q = structure(guide, story.args, {}).nodes["middle"]["fn"].log_prob(texts)
    reverse = (log_q.exp() * (log_q - log_joint.log_softmax(0))).sum().item()
    assert abs(gap.gap - reverse) < 4 * gap.error
    suggested = inference_gap(posterior)
    assert not suggested.certified
    assert "lower bound" in suggested.source
    assert "at least" in repr(suggested)


def test_infinite_supports_cannot_be_enumerated(story: Story) -> None:
    def long(ending: str) -> None:
        middle = pyro.sample("middle", story.lm("ab", max_tokens=40))
        pyro.sample("ending", story.lm(middle), obs=story.lm.encode(ending))

    with pytest.raises(ValueError, match="latent site 'middle': the support holds"):
        exact_posterior(long, "cd")

    def continuous() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'x' \(Normal\) cannot be enumerated"):
        exact_posterior(continuous)
