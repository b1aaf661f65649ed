"""Importance sampling and enumeration: unbiased, exact, per observation."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story
from pyro import poutine
from scipy import stats
from test_objectives import perturbed

from llmppl import LM, exact_posterior, fit, importance, inference_gap
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.inference import blocks
from llmppl.inference import importance as module
from llmppl.models import infilling
from llmppl.objectives import TrajectoryBalance
from llmppl.posterior import running_error as running
from llmppl.programs.plates import in_data_plate
from llmppl.programs.structure import structure


def test_the_enumerated_evidence_is_the_sum_of_the_joint(story: Story) -> None:
    _, log_joint = story.joint()
    posterior = exact_posterior(story.program)(*story.args)
    assert posterior.log_evidence == pytest.approx(log_joint.logsumexp(0).item(), abs=1e-12)
    assert posterior.log_evidence_error == 0
    assert posterior.weights.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(posterior.weights, log_joint.softmax(0).numpy(), atol=1e-12)


def test_expected_weight_is_the_evidence_by_enumeration(story: Story) -> None:
    """Σ q(z) w(z) = Z to 1e-9 in float64, for an adapted guide."""
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2))
    texts, log_joint = story.joint()
    log_q = structure(guide, story.args, {}).nodes["middle"]["fn"].log_prob(texts).detach()
    posterior = importance(story.program, guide, num_samples=400)(*story.args)
    index = (torch.as_tensor(posterior.samples["middle"])[:, None] == texts).all(-1).long().argmax(-1)
    weight = log_joint - log_q
    # Each reported weight is the exact one of its text, and those average to Z exactly.
    np.testing.assert_allclose(posterior.log_weights, weight[index].numpy(), atol=1e-9)
    assert (log_q + weight).logsumexp(0).item() == pytest.approx(log_joint.logsumexp(0).item(), abs=1e-9)


# The prior as a proposal: on a random model it is closer to the posterior than a prompt is.
FROM_PRIOR = {"middle": lambda beginning: [beginning]}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["prompt", "adapted"])
def test_the_evidence_estimate_is_unbiased_over_many_seeds(story: Story, kind: str) -> None:
    guide = (
        PromptGuide(story.program, story.lm, FROM_PRIOR)
        if kind == "prompt"
        else perturbed(AutoregressiveGuide(story.program, story.lm, FROM_PRIOR, rank=2), 0.05)
    )
    exact = exact_posterior(story.program)(*story.args).log_evidence
    ratios = []
    for seed in range(100):
        pyro.set_rng_seed(seed)
        ratios.append(math.exp(importance(story.program, guide, 16)(*story.args).log_evidence - exact))
    error = np.std(ratios, ddof=1) / math.sqrt(len(ratios))
    # Within 3 standard errors, and the error small enough to notice 15 %.
    assert error < 0.15
    assert abs(np.mean(ratios) - 1) < 3 * error
    assert np.mean(np.log(ratios)) <= 3 * error, "log of the estimate lies below log Z in expectation"


@pytest.mark.long
def test_rows_of_a_plate_are_observations_of_their_own(story: Story) -> None:
    beginnings, endings = ["ab", "d", "ceb"], ["cd", "ea", "b"]
    guide = PromptGuide(story.program, story.lm)
    exact = np.array(
        [exact_posterior(story.program)(b, e).log_evidence for b, e in zip(beginnings, endings, strict=True)]
    )

    def rows(beginnings: list[str], endings: list[str]) -> None:
        with pyro.plate("rows", len(beginnings)):
            story.program(beginnings, endings)

    enumerated = exact_posterior(rows)(beginnings, endings)
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
    exact = exact_posterior(model)(endings)
    texts = lm("ab", max_tokens=2, stop=".").enumerate_support()
    by_hand = lm("ab", max_tokens=2, stop=".").log_prob(texts)
    for ending in endings:
        by_hand = by_hand + lm(texts, "c").log_prob(lm.encode(ending))
    assert exact.log_evidence == pytest.approx(by_hand.logsumexp(0).item(), abs=1e-9)
    assert abs(posterior.log_evidence - exact.log_evidence) < 4 * posterior.log_evidence_error
    # The guide is told all three endings: its context holds their tokens one after another.
    fn = structure(PromptGuide(model, lm), (endings,), {}).nodes["theme"]["fn"]
    assert lm.codec.decode([t for t in fn.context.tolist() if t >= 0]) == "deacccab"


@pytest.mark.long
def test_two_latent_texts_and_a_latent_inside_a_plate_only_partly_shared(lm: LM) -> None:
    def model(ending: str) -> None:
        first = pyro.sample("first", lm("ab", max_tokens=2, stop="."))
        second = pyro.sample("second", lm("ab", first, max_tokens=2, stop="."))
        pyro.sample("ending", lm("ab", first, second), obs=lm.encode(ending))

    exact = exact_posterior(model)("cd")
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


@pytest.mark.long
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
    text_part = exact_posterior(conditioned)("ed").log_evidence
    grid = torch.linspace(0.00005, 0.99995, 10_000, dtype=torch.float64)
    rate_part = (dist.Beta(2.0, 2.0).log_prob(grid) + 3 * grid).exp().mean().log().item()
    assert abs(posterior.log_evidence - (text_part + rate_part)) < 4 * posterior.log_evidence_error


@pytest.mark.long
def test_a_choice_and_a_text_are_guided_together(lm: LM) -> None:
    def model(ending: str) -> None:
        plan = pyro.sample("plan", lm.choice("ab", options=["c", "de", "."]))
        middle = pyro.sample("middle", lm("ab", plan, max_tokens=2, stop="."))
        pyro.sample("ending", lm("ab", plan, middle), obs=lm.encode(ending))

    guide = perturbed(AutoregressiveGuide(model, lm, rank=2), 0.05)
    exact = exact_posterior(model)("cd")
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
    exact = exact_posterior(model)("cd", 1)
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
    exact = exact_posterior(story.program)(*story.args)
    gap = inference_gap(posterior, exact)
    assert gap.certified
    assert gap.source == "enumeration"
    texts, log_joint = story.joint()
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
        exact_posterior(long)("cd")

    def continuous() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'x' \(Normal\) cannot be enumerated"):
        exact_posterior(continuous)()


# --- blocks under a memory bound, and early stopping ----------------------------------------------


def test_particles_are_let_go_block_by_block(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither particles nor their traces outlive the block after theirs; what is kept is a few numbers a token."""
    run_particles, drawn = module.run_particles, []

    def watched(*args: object, **kwargs: object) -> object:
        assert not [ref for ref in drawn if ref() is not None]
        particles = run_particles(*args, **kwargs)
        drawn.extend(weakref.ref(thing) for thing in (particles, particles.model_trace, particles.guide_trace))
        return particles

    monkeypatch.setattr(module, "run_particles", watched)
    posterior = importance(story.program, PromptGuide(story.program, story.lm), 500)(*story.args)
    assert len(drawn) == 3 * 8
    arrays = [posterior.log_weights, posterior.log_joint]
    for column in (posterior.samples, posterior.token_log_p, posterior.token_log_q, posterior.log_likelihood):
        arrays += column.values()
    # three tokens, each with its id, log p and log q; log p and log q of the whole; one observed site
    assert sum(a.nbytes for a in arrays) == 500 * 8 * (3 * 3 + 2 + 1)
    # nor is any of them a view of a larger array
    assert all(a.base is None or a.base.nbytes == a.nbytes for a in arrays)


@pytest.mark.long
def test_blocks_shrink_with_the_rows_and_the_law_of_the_samples_does_not_change(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frequencies of 3000 texts at each block size by chi-square against q itself, at the 0.1 % level."""
    guide = PromptGuide(story.program, story.lm)
    texts, log_joint = story.joint()
    log_q = structure(guide, story.args, {}).nodes["middle"]["fn"].log_prob(texts)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", blocks.TOKEN_BYTES * 400)
    tokens = (2 + 3) + (2 + 3 + 2)  # middle and ending with their contexts
    assert blocks.block_size(story.program, story.args, {}) == 400 // tokens
    in_rows = in_data_plate(story.program)
    assert blocks.block_size(in_rows, (["ab"] * 10, ["cd"] * 10), {}) == 400 // (10 * tokens)
    assert blocks.block_size(in_rows, (["ab"] * 99, ["cd"] * 99), {}) == 1
    for size in (400, 40_000):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", blocks.TOKEN_BYTES * size)
        posterior = importance(story.program, guide, 3000)(*story.args)
        index = (torch.as_tensor(posterior.samples["middle"])[:, None] == texts).all(-1).long().argmax(-1)
        # each sample has its own score, whichever block it was drawn in
        np.testing.assert_allclose(posterior.log_weights, (log_joint - log_q)[index].numpy(), atol=1e-9)
        np.testing.assert_allclose(posterior.token_log_q["middle"].sum(-1), log_q[index].numpy(), atol=1e-9)
        expected = 3000 * log_q.exp().numpy()
        counts = np.bincount(index.numpy(), minlength=len(texts))
        frequent = expected >= 5
        seen = np.append(counts[frequent], counts[~frequent].sum())
        due = np.append(expected[frequent], expected[~frequent].sum())
        assert stats.chisquare(seen, due * seen.sum() / due.sum()).pvalue > 1e-3


def test_sampling_stops_at_the_target_error_of_every_row(story: Story) -> None:
    guide = PromptGuide(story.program, story.lm, FROM_PRIOR)
    run = importance(story.program, guide, 4000, vectorize_data=True, target_error=0.1)
    posterior = run(["ab", "d"], ["cd", "ea"])
    assert posterior.num_samples < 4000
    assert posterior.num_samples % 64 == 0
    assert posterior.log_evidence_error.max() <= 0.1
    before = posterior.log_weights[:-64]
    error = running.RunningError()
    error.add(before[:100])
    error.add(before[100:])
    assert error.largest() > 0.1
    # the running error is the posterior's own
    error.add(posterior.log_weights[-64:])
    assert error.largest() == pytest.approx(posterior.log_evidence_error.max(), rel=1e-9)
    unreached = importance(story.program, guide, 150, target_error=1e-6)(*story.args)
    assert unreached.num_samples == 150


def test_the_bias_of_stopping_early_is_the_one_stated(story: Story) -> None:
    """−ε²(γ/c − 2), within 4 standard errors of 20 000 runs, less than itself; it is a small part of the error ε.
    Weights and proposal are those of all texts, the proposal half way between prior and posterior."""
    texts, log_joint = story.joint()
    log_q = (0.4 * story.prior().log_prob(texts) + 0.6 * log_joint).log_softmax(0)
    q = log_q.exp().numpy()
    weight = (log_joint - log_q - log_joint.logsumexp(0)).exp().numpy()  # of mean one
    deviation = math.sqrt(q @ (weight - 1) ** 2)
    skewness = q @ (weight - 1) ** 3 / deviation**3
    runs, target = 20_000, deviation / math.sqrt(400)
    generator = np.random.default_rng(0)
    error, total = running.RunningError(), np.zeros(runs)
    found = np.full(runs, np.nan)
    for count, decides in running.plan(100_000, 64):
        drawn = generator.choice(weight, p=q, size=(count, runs))
        error.add(np.log(drawn))
        total += drawn.sum(0)
        if decides:
            stops = np.isnan(found) & (error.of_rows() <= target)
            found[stops] = total[stops] / error.count - 1
            if not np.isnan(found).any():
                break
    bias, noise = found.mean(), found.std() / math.sqrt(runs)
    predicted = -(target**2) * (skewness / deviation - 2)
    assert found.std() == pytest.approx(target, rel=0.1)
    assert 4 * noise < abs(predicted)
    assert bias == pytest.approx(predicted, abs=4 * noise)
    assert abs(bias) < target / 10


@pytest.mark.parametrize("target", [0.0, -0.1, math.inf, math.nan, True])
def test_a_target_error_that_is_no_error_is_refused(story: Story, target: float) -> None:
    with pytest.raises((TypeError, ValueError), match="target_error.* must be a (positive )?number"):
        importance(story.program, PromptGuide(story.program, story.lm), 1000, target_error=target)


def test_a_target_error_that_few_samples_cannot_decide_is_refused(story: Story) -> None:
    with pytest.raises(ValueError, match="decided on from 128 samples on, and num_samples=100"):
        importance(story.program, PromptGuide(story.program, story.lm), 100, target_error=0.1)


def test_a_real_model_stops_early(smollm2: LM) -> None:
    """The prior as proposal of a short middle, to half a nat."""
    story = infilling(smollm2, max_tokens=2)
    guide = PromptGuide(story, smollm2, FROM_PRIOR)
    posterior = importance(story, guide, 1000, target_error=0.5)("Tom lost his key", " home.")
    assert posterior.num_samples < 1000
    assert posterior.log_evidence_error <= 0.5
