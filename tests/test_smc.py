"""Sequential Monte Carlo: unbiased under every target and resampling, and not fooled by ended particles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story
from test_objectives import perturbed

from llmppl import LM, exact_posterior, smc
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.inference.resampling import effective_size, resample, without_replacement
from llmppl.inference.writing import Writing
from llmppl.posterior.smc_runs import SCHEMES
from llmppl.programs.structure import structure
from llmppl.testing import tiny_lm

FROM_PRIOR = {"middle": lambda beginning: [beginning]}
ROWS = 1000


def near_prior(story: Story) -> AutoregressiveGuide:
    """On a random model closer to the posterior than a prompt is, and not the prior."""
    return perturbed(AutoregressiveGuide(story.program, story.lm, FROM_PRIOR, rank=2), 0.05)


# --- resampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_draws_in_proportion_to_the_weights(scheme: str) -> None:
    """Mean offspring of 4000 resamplings within 4 standard errors of K w."""
    weights = torch.tensor([0.5, 0.2, 0.2, 0.07, 0.03, 0.0], dtype=torch.float64)
    counts = torch.stack([torch.bincount(resample(weights.log(), scheme), minlength=6) for _ in range(4000)]).double()
    assert (counts.sum(1) == 6).all()
    error = counts.std(0) / 4000**0.5
    assert ((counts.mean(0) - 6 * weights).abs() <= 4 * error + 1e-9).all()
    if scheme != "multinomial":
        assert (counts[:, 0] == 3).all(), "an exact multiple is never left to chance"
    retained = torch.stack([resample(weights.log(), "multinomial", retained=True) for _ in range(20)])
    assert (retained[:, 0] == 0).all()


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 5, 9])
def test_selection_without_replacement_is_unbiased_and_of_different_particles(count: int) -> None:
    weights = torch.tensor([5.0, 2.0, 1.0, 1.0, 0.5, 0.3, 0.15, 0.05, 0.0, 0.1], dtype=torch.float64)
    total = torch.zeros(10, dtype=torch.float64)
    squares = torch.zeros(10, dtype=torch.float64)
    for _ in range(4000):
        index, kept = without_replacement(weights.log(), count)
        assert len(index) == count
        assert len(index.unique()) == count
        new = torch.zeros(10, dtype=torch.float64)
        new[index] = kept.exp()
        total += new
        squares += new**2
    mean = total / 4000
    error = ((squares / 4000 - mean**2).clamp(min=0) / 4000).sqrt()
    assert ((mean - weights).abs() <= 4 * error + 1e-9).all()
    if count > 2:
        assert error[0] < 1e-6, "the heaviest is kept as it is where there is room"


def test_few_weights_are_left_alone() -> None:
    log_weights = torch.tensor([0.0, -torch.inf, -3.0])
    index, kept = without_replacement(log_weights, 2)
    assert index.tolist() == [0, 2]
    assert kept.tolist() == [0.0, -3.0]


def test_the_effective_size_is_that_of_kish_and_zero_without_weight() -> None:
    log_weights = torch.tensor([[0.0, -torch.inf], [math.log(3.0), -torch.inf]])
    assert effective_size(log_weights).tolist() == pytest.approx([16 / 10, 0.0])


# --- unbiased ------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("resampling", [*SCHEMES, "optimal"])
@pytest.mark.parametrize("targets", ["prefixes", "flows"])
def test_the_evidence_estimate_is_unbiased(story: Story, targets: str, resampling: str) -> None:
    """1000 rows of one observation are 1000 runs; the mean of Ẑ/Z within 3 standard errors, each below 12 %."""
    exact = float(exact_posterior(story.program)(*story.args).log_evidence)
    guide = near_prior(story)
    run = smc(
        story.program, guide, 6, targets, resampling, ess_threshold=1.0, check_every=1, vectorize_data=True, seed=3
    )
    posterior = run([story.beginning] * ROWS, [story.ending] * ROWS)
    ratio = np.exp(posterior.log_evidence - exact)
    error = ratio.std(ddof=1) / ROWS**0.5
    assert error < 0.12
    assert abs(ratio.mean() - 1) < 3 * error
    if resampling != "optimal":
        assert (posterior.distinct_ancestors < 6).any(), "nothing was resampled: the test tests nothing"


@pytest.mark.parametrize("targets", ["prefixes", "flows"])
def test_a_defensive_share_is_the_mixture_of_both_laws(story: Story, targets: str) -> None:
    """Without resampling every weight is p(x, z) / (.7 q(z) + .3 p(z)); with it the evidence stays unbiased."""
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, FROM_PRIOR, rank=2), 0.3)
    settings = {"targets": targets, "check_every": 1, "seed": 7, "defensive": 0.3, "progress": False}
    posterior = smc(story.program, guide, 200, ess_threshold=0.0, **settings)(*story.args)
    texts, log_joint = story.joint()
    index = (torch.as_tensor(posterior.samples["middle"])[:, None] == texts).all(-1).long().argmax(-1)
    log_q = structure(guide, story.args, {}).nodes["middle"]["fn"].log_prob(texts).detach()
    mixture = torch.logaddexp(math.log(0.7) + log_q, math.log(0.3) + story.prior().log_prob(texts))
    assert len(index.unique()) > 10
    np.testing.assert_allclose(posterior.log_weights, (log_joint - mixture)[index].numpy(), atol=1e-9)

    exact = float(log_joint.logsumexp(0))
    run = smc(story.program, near_prior(story), 6, ess_threshold=1.0, vectorize_data=True, **settings)
    rows = run([story.beginning] * ROWS, [story.ending] * ROWS)
    ratio = np.exp(rows.log_evidence - exact)
    error = ratio.std(ddof=1) / ROWS**0.5
    assert error < 0.12
    assert abs(ratio.mean() - 1) < 3 * error
    assert (rows.distinct_ancestors < 6).any(), "nothing was resampled: the test tests nothing"


def test_a_mixed_text_keeps_its_own_odds_through_resampling(story: Story) -> None:
    """The next token is mixed by what both laws have made of the text that is now there."""
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, FROM_PRIOR, rank=2), 0.5)
    q = structure(guide, story.args, {}).nodes["middle"]["fn"].expand((3,))
    writing = Writing(q, story.prior().expand((3,)), False, None, 0.3)
    own_q, own_p = writing.own_q[0], writing.next_p[0]
    tokens = torch.tensor([0, 1, 2])
    writing.write(tokens)
    source = torch.tensor([2, 2, 1])
    writing.reorder(source)
    writing._last = tokens[source]
    writing.advance()
    log_q, log_p = own_q[tokens[source], None] + writing.own_q, own_p[tokens[source], None] + writing.next_p
    begun = torch.logaddexp(math.log(0.7) + own_q, math.log(0.3) + own_p)[tokens[source], None]
    expected = torch.logaddexp(math.log(0.7) + log_q, math.log(0.3) + log_p) - begun
    torch.testing.assert_close(writing.next_q, expected)


@pytest.mark.parametrize("targets", ["prefixes", "flows"])
def test_weighted_particles_follow_the_posterior(story: Story, targets: str) -> None:
    """Weighted frequencies of texts over 1000 runs, Ẑ-weighted, within 4 standard errors of p(z|x)."""
    run = smc(story.program, None, 6, targets, ess_threshold=1.0, check_every=1, vectorize_data=True, seed=5)
    posterior = run([story.beginning] * ROWS, [story.ending] * ROWS)
    texts, log_joint = story.joint()
    exact = log_joint.softmax(0).numpy()
    samples = torch.as_tensor(posterior.samples["middle"])  # (K, rows, T)
    weights = torch.as_tensor(posterior.log_weights).exp() / log_joint.logsumexp(0).exp() / 6
    checked = 0
    for n in exact.argsort()[::-1][:10]:
        hits = ((samples == texts[int(n)]).all(-1) * weights).sum(0).numpy()  # one estimate of p(z|x) a run
        if (hits > 0).sum() < 200:
            continue  # too seldom for its standard error to be known
        checked += exact[n]
        assert hits.mean() == pytest.approx(exact[n], abs=4 * hits.std(ddof=1) / ROWS**0.5)
    assert checked > 0.5


def test_reported_joint_and_token_scores_are_those_of_the_texts(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = near_prior(story)
    scored = []
    original = LM.score
    monkeypatch.setattr(LM, "score", lambda self, r, adapter=None: scored.append(adapter) or original(self, r, adapter))
    run = smc(story.program, guide, 20, resampling="multinomial", ess_threshold=1.0, check_every=1, seed=0)
    posterior = run(*story.args)
    monkeypatch.undo()
    assert guide.adapter not in scored, "log q is recorded while writing, not asked for again"
    texts, log_joint = story.joint()
    index = (torch.as_tensor(posterior.samples["middle"])[:, None] == texts).all(-1).long().argmax(-1)
    np.testing.assert_allclose(posterior.log_joint, log_joint[index].numpy(), atol=1e-9)
    log_q = structure(guide, story.args, {}).nodes["middle"]["fn"].token_log_prob(texts).detach()
    np.testing.assert_allclose(posterior.token_log_q["middle"], log_q[index].numpy(), atol=1e-9)
    likelihood = posterior.log_joint - posterior.token_log_p["middle"].sum(-1)
    np.testing.assert_allclose(posterior.log_likelihood["ending"], likelihood, atol=1e-9)


def two_texts(lm: LM, plated: bool) -> Any:
    """Two latent texts, an observation between them, a number, and one behind; or two texts side by side."""

    def chain(first_seen: str, second_seen: str) -> None:
        first = pyro.sample("first", lm("ab", max_tokens=2, stop="."))
        pyro.sample("between", lm(first), obs=lm.encode(first_seen))
        mood = pyro.sample("mood", dist.Bernoulli(0.3))
        second = pyro.sample("second", lm(first, "c", max_tokens=2, stop="."))
        pyro.factor("liking", mood * (second == 2).any(-1))
        pyro.sample("behind", lm(second, first), obs=lm.encode(second_seen))

    def side_by_side(first_seen: str, second_seen: str) -> None:
        theme = pyro.sample("theme", lm("ab", max_tokens=1))
        with pyro.plate("pair", 2):
            text = pyro.sample("text", lm(theme, max_tokens=2, stop="."))
            pyro.sample("seen", lm(text), obs=lm.encode([first_seen, second_seen]))

    return side_by_side if plated else chain


@pytest.mark.long
@pytest.mark.parametrize("resampling", ["systematic", "residual"])
@pytest.mark.parametrize("targets", ["prefixes", "flows"])
def test_programs_of_several_texts_and_other_latents_are_unbiased(lm: LM, targets: str, resampling: str) -> None:
    """300 runs of 8 particles from the prior; Z by enumeration. 3 standard errors, each below 12 %."""
    model = two_texts(lm, plated=False)
    log_z = float(exact_posterior(model)("d", "e").log_evidence)
    run = smc(model, None, 8, targets, resampling, ess_threshold=1.0, check_every=1, vectorize_data=True, seed=2)
    ratio = np.exp(run(["d"] * 300, ["e"] * 300).log_evidence - log_z)
    error = ratio.std(ddof=1) / 300**0.5
    assert error < 0.12
    assert abs(ratio.mean() - 1) < 3 * error


def test_texts_of_an_inner_plate_advance_together(lm: LM) -> None:
    model = two_texts(lm, plated=True)
    themes = lm("ab", max_tokens=1).enumerate_support()
    parts = []
    for theme in themes:
        total = lm("ab", max_tokens=1).log_prob(theme)
        for seen in ("d", "e"):
            own = lm(theme, max_tokens=2, stop=".")
            texts = own.enumerate_support()
            total = total + (own.log_prob(texts) + lm(texts).log_prob(lm.encode(seen))).logsumexp(0)
        parts.append(total)
    log_z = float(torch.stack(parts).logsumexp(0))
    ratio = []
    for seed in range(30):
        posterior = smc(model, None, 32, "prefixes", ess_threshold=1.0, seed=seed)("d", "e")
        ratio.append(math.exp(float(posterior.log_evidence) - log_z))
    assert posterior.samples["text"].shape == (32, 2, 2)
    error = np.std(ratio, ddof=1) / 30**0.5
    assert error < 0.15
    assert abs(np.mean(ratio) - 1) < 3 * error


# --- not fooled ----------------------------------------------------------------------------------


@pytest.fixture
def geometric() -> tuple[LM, Any]:
    """Each token ends the text with probability one half; whatever the text, it then costs 10 nats. log Z = −10."""
    lm = tiny_lm(vocabulary=2, dtype=torch.float64)
    with torch.no_grad():
        lm.transformer.get_output_embeddings().weight.zero_()

    def program() -> None:
        pyro.sample("text", lm("a", max_tokens=60, stop="."))
        pyro.factor("cost", torch.tensor(-10.0, dtype=torch.float64))

    return lm, program


def competing_at_once(count: int, seed: int) -> tuple[float, float, float]:
    """The wrong way: an ended particle pays at once, and competes with those that have not paid.

    Returns log Ẑ, the mean number of tokens before the end, and the effective size after resampling.
    """
    generator = np.random.default_rng(seed)
    log_weights, length, ended = np.zeros(count), np.zeros(count), np.zeros(count, dtype=bool)
    while not ended.all():
        stops = ~ended & (generator.random(count) < 0.5)
        length += ~ended & ~stops
        log_weights[stops] -= 10.0
        ended |= stops
        weights = np.exp(log_weights - log_weights.max())
        if weights.sum() ** 2 / np.square(weights).sum() < count / 2:
            index = generator.choice(count, count, p=weights / weights.sum())
            log_weights = np.full(count, np.log(np.exp(log_weights).mean()))
            length, ended = length[index], ended[index]
    weights = np.exp(log_weights - log_weights.max())
    return np.log(np.exp(log_weights).mean()), length.mean(), weights.sum() ** 2 / np.square(weights).sum()


def test_ended_particles_do_not_compete_with_those_that_have_not_paid(geometric: tuple[LM, Any]) -> None:
    """The naive way gives about −23 nats, texts of 17 tokens and an effective size of 9.6 of 10."""
    naive = np.array([competing_at_once(10, seed) for seed in range(200)])
    assert naive[:, 0].mean() < -18
    assert naive[:, 1].mean() > 10
    assert naive[:, 2].mean() > 9
    _, program = geometric
    for targets in ("prefixes", "flows"):
        for resampling in SCHEMES:
            posteriors = [smc(program, None, 10, targets, resampling, seed=seed)() for seed in range(5)]
            np.testing.assert_allclose([p.log_evidence for p in posteriors], -10.0, atol=1e-9)
            lengths = np.concatenate([(p.samples["text"] > 0).sum(-1) for p in posteriors])
            # 50 geometric draws of standard deviation √2
            assert lengths.mean() == pytest.approx(1.0, abs=4 * (2 / 50) ** 0.5)
            assert all(p.ess == pytest.approx(10) for p in posteriors)


def test_flows_of_a_guide_that_is_the_posterior_are_constant(story: Story) -> None:
    """The ending does not depend on the middle, so the prior is the posterior and every prefix has one flow."""

    def program(beginning: str, ending: str) -> None:
        pyro.sample("middle", story.lm(beginning, max_tokens=3, stop="."))
        pyro.sample("ending", story.lm(beginning), obs=story.lm.encode(ending))

    guide = PromptGuide(program, story.lm, FROM_PRIOR)
    posterior = smc(program, guide, 16, "flows", check_every=1, seed=0)(*story.args)
    assert posterior.ess_history is not None
    assert len(posterior.ess_history) > 2
    np.testing.assert_allclose(posterior.ess_history, 16.0, rtol=1e-9)
    np.testing.assert_allclose(posterior.log_weights, exact_posterior(program)(*story.args).log_evidence, atol=1e-9)


def test_optimal_resampling_with_room_for_all_is_the_exact_posterior(story: Story) -> None:
    exact = exact_posterior(story.program)(*story.args)
    texts, _ = story.joint()
    posterior = smc(story.program, None, len(texts), resampling="optimal")(*story.args)
    assert posterior.complete
    assert posterior.log_evidence == pytest.approx(float(exact.log_evidence), abs=1e-9)
    assert posterior.log_evidence_error == 0
    top = dict(exact.top("middle", 5))
    for text, weight in posterior.top("middle", 5):
        assert weight == pytest.approx(top[text], abs=1e-9)
    fewer = smc(story.program, None, 8, resampling="optimal", num_runs=3)(*story.args)
    assert not fewer.complete
    assert fewer.num_samples == 24
    assert 0 < fewer.log_evidence_error < 1


def test_the_standard_error_of_resampled_particles_covers_the_evidence(story: Story) -> None:
    """95 % nominal over 200 runs; the prior's skewed weights lose some."""
    exact = float(exact_posterior(story.program)(*story.args).log_evidence)
    run = smc(story.program, None, 100, "prefixes", "multinomial", ess_threshold=1.0, vectorize_data=True, seed=1)
    posterior = run([story.beginning] * 200, [story.ending] * 200)
    hits = np.abs(np.exp(posterior.log_evidence - exact) - 1) < 2 * posterior.log_evidence_error
    assert 0.85 < hits.mean() <= 1.0


# --- reports and errors --------------------------------------------------------------------------


def test_it_says_what_resampling_has_left(story: Story) -> None:
    posterior = smc(story.program, None, 12, "flows", "multinomial", 1.0, check_every=1, seed=0)(*story.args)
    text = repr(posterior)
    assert "smallest ESS" in text
    assert "before resampling" in text
    assert f"{posterior.distinct_ancestors} distinct ancestors" in text
    assert "distinct middle texts" in text
    assert posterior.ess_history is not None
    assert posterior.ess == pytest.approx(posterior.ess_history.min())
    assert np.isnan(posterior.khat)
    assert np.isnan(posterior.elbo)
    # Who descends from one ancestor begins as it did.
    assert posterior.ancestors is not None
    firsts = {n: set(posterior.samples["middle"][posterior.ancestors == n][:, 0]) for n in posterior.ancestors}
    assert len(firsts) < 12
    assert all(len(first) == 1 for first in firsts.values())


def test_a_seed_reproduces_and_leaves_the_generators_alone(story: Story) -> None:
    before = torch.get_rng_state()
    first, second = (smc(story.program, None, 8, seed=4)(*story.args) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(first.samples["middle"], second.samples["middle"])
    np.testing.assert_array_equal(first.log_weights, second.log_weights)


def test_bad_input_is_named(story: Story) -> None:
    for keywords, message in (
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"targets": "lookahead"}, "targets='lookahead' must be one of"),
        ({"resampling": "stratified"}, "resampling='stratified' must be one of"),
        ({"ess_threshold": 1.5}, "ess_threshold=1.5 must be a share"),
        ({"num_runs": 0}, "num_runs must be at least 1"),
        ({"check_every": 0}, "check_every must be at least 1"),
        ({"defensive": 1.0}, "defensive=1.0 is a share"),
        ({"defensive": 0.1}, "give a guide"),
        ({"defensive": 0.1, "guide": near_prior(story), "resampling": "optimal"}, "another resampling"),
    ):
        with pytest.raises(ValueError, match=message):
            smc(story.program, **keywords)

    def endless(beginning: str) -> None:
        pyro.sample("middle", story.lm(beginning, max_tokens=3))

    with pytest.raises(ValueError, match="'middle' has no stop token"):
        smc(endless, None, 4, "flows")("ab")

    def longer(beginning: str, ending: str) -> None:
        pyro.sample("middle", story.lm(beginning, max_tokens=4, stop="."))

    with pytest.raises(ValueError, match="Give both the same max_tokens"):
        smc(story.program, longer, 4)(*story.args)

    def impossible(beginning: str, ending: str) -> None:
        story.program(beginning, ending)
        pyro.factor("never", torch.tensor(-torch.inf))

    with pytest.raises(ValueError, match="none of the 4 particles has positive weight"):
        smc(impossible, None, 4)(*story.args)
    with pytest.raises(ValueError, match="does not contain every site"):
        smc(two_texts(story.lm, plated=True), None, 4, resampling="optimal")("d", "e")
    with pytest.raises(ValueError, match="'mood' is a latent of another kind"):
        smc(two_texts(story.lm, plated=False), None, 4, resampling="optimal")("d", "e")


def test_a_masked_guide_is_distrusted_and_optimal_resampling_finds_what_it_misses(lm: LM) -> None:
    """Masked decoding must write 'a' or 'b' first; nearly all of the mass is behind the one it seldom writes."""
    from llmppl import Grammar, importance

    grammar = Grammar.regex("ac|bd")
    end = lm.tokenizer.eos_token_id
    wanted = [lm.encode("ac").tolist() + [end], lm.encode("bd").tolist() + [end]]

    def program() -> None:
        text = pyro.sample("text", lm("e", max_tokens=3, stop=[end]))
        matches = torch.stack([(text == torch.tensor(row)).all(-1) for row in wanted]).any(0)
        pyro.factor("form", torch.where(matches, 0.0, -torch.inf))

    def masked() -> None:
        pyro.sample("text", lm("e", max_tokens=3, grammar=grammar))

    exact = float(exact_posterior(program)().log_evidence)
    found = smc(program, masked, 4)()
    assert found.complete
    assert "exactly over the guide's support, 2 text texts" in repr(found)
    assert found.log_evidence == pytest.approx(exact, abs=1e-9)
    assert "NOT TO BE TRUSTED" not in repr(found)
    for posterior in (importance(program, masked, 20)(), smc(program, masked, 20, resampling="systematic", seed=0)()):
        assert posterior.masked == ("text",)
        assert "NOT TO BE TRUSTED: the guide writes 'text' under a mask" in repr(posterior)


def test_masked_latents_are_refused_where_they_would_count() -> None:
    lm = tiny_lm(vocabulary=6)

    def program(mask: torch.Tensor) -> None:
        with pyro.plate("rows", 2), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", lm(["a", "b"], max_tokens=2, stop="."))
            pyro.sample("y", lm(["a", "b"], z), obs=lm.encode(["c", "d"]))

    whole, part = torch.tensor([True, True]), torch.tensor([True, False])
    assert np.isfinite(smc(program, num_samples=8, progress=False)(whole).log_evidence).all()
    assert np.isfinite(exact_posterior(program)(whole).log_evidence).all()
    for run in (smc(program, num_samples=8, progress=False), exact_posterior(program)):
        with pytest.raises(ValueError, match=r"latent site 'z' is masked.*importance"):
            run(part)


@pytest.mark.parametrize("targets", ["prefixes", "flows"])
def test_a_stop_that_may_not_occur_is_not_what_ends_a_text(targets: str) -> None:
    lm = tiny_lm(vocabulary=6)

    def program(ending: str) -> None:
        z = pyro.sample("z", lm("ab", max_tokens=5, stop=[0, 1], allowed=[1, 2, 3]))
        pyro.sample("ending", lm("ab", z), obs=lm.encode(ending))

    exact = float(exact_posterior(program)("c").log_evidence)
    guide = PromptGuide(program, lm)
    runs = [smc(program, guide, 256, targets=targets, check_every=1, progress=False, seed=n)("c") for n in range(20)]
    ratio = np.exp([float(own.log_evidence) - exact for own in runs])
    assert ratio.mean() == pytest.approx(1.0, abs=0.47), "four standard errors"
