"""Posterior: weights, k-hat, resampling, decoding, ArviZ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from arviz.stats.stats import psislw
from conftest import Story
from pyro.ops.stats import fit_generalized_pareto

from llmppl import exact_posterior, importance
from llmppl.diagnostics.findings import of_weights
from llmppl.guides import PromptGuide
from llmppl.posterior.pareto import _fit, pareto_k
from llmppl.posterior.posterior import Posterior


def weighted(log_weights: np.ndarray) -> Posterior:
    values = np.arange(len(log_weights))[:, None]
    return Posterior({"z": values}, log_weights, log_weights)


def test_evidence_ess_and_elbo_are_their_formulas() -> None:
    log_weights = np.log(np.array([1.0, 2.0, 3.0, 2.0]))
    posterior = weighted(log_weights)
    assert posterior.log_evidence == pytest.approx(np.log(2.0))
    assert posterior.ess == pytest.approx(64 / 18)
    assert posterior.elbo == pytest.approx(log_weights.mean())
    relative = np.array([0.5, 1.0, 1.5, 1.0])
    assert posterior.log_evidence_error == pytest.approx(relative.std(ddof=1) / 2)


def test_the_standard_error_covers_the_evidence() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        # log-normal weights of mean one
        posterior = weighted(generator.normal(-0.18, 0.6, size=200))
        hits += abs(posterior.log_evidence) < 2 * posterior.log_evidence_error
    # 95 % nominal; skewed weights lose a little.
    assert 0.90 < hits / 400 < 0.98


@pytest.mark.parametrize("shape", [0.2, 0.6, 1.1])
def test_khat_agrees_with_arviz_and_with_pyro(shape: float) -> None:
    generator = np.random.default_rng(1)
    weights = (generator.pareto(1 / shape, size=3000) + 1) if shape else generator.exponential(size=3000)
    log_weights = np.log(weights)
    ours = pareto_k(log_weights)
    _, theirs = psislw(log_weights.copy())
    assert ours == pytest.approx(float(theirs), abs=0.02)
    assert ours == pytest.approx(shape, abs=0.25)
    excess = np.sort(generator.pareto(1 / shape, size=400))
    k, sigma = fit_generalized_pareto(torch.tensor(excess))
    shape, scale = _fit(excess)
    # Pyro's has no prior on k; ours pulls it towards 0.5 with the weight of 10 of 410 points.
    assert (shape * 410 - 5) / 400 == pytest.approx(k, abs=0.02)
    assert scale == pytest.approx(sigma, rel=0.02)


def test_khat_of_equal_weights_is_minus_infinity_and_of_few_is_nan() -> None:
    assert pareto_k(np.full(100, -30.0)) == -np.inf
    assert pareto_k(np.full(100, -30.0) + 1e-6 * np.random.default_rng(0).normal(size=100)) == -np.inf
    assert np.isnan(pareto_k(np.array([0.0, 1.0, 2.0])))
    assert np.isnan(pareto_k(np.full(100, -np.inf)))


def long_texts(tokens: int, log_weights: np.ndarray) -> Posterior:
    """Two rows; the second's texts are half as long."""
    ids = np.full((len(log_weights), 2, tokens), 3)
    ids[:, 1, tokens // 2 :] = -1
    both = np.stack([log_weights, log_weights], 1)
    return Posterior({"z": ids, "x": np.zeros((len(both), 2))}, both, both, decoders={"z": str})


def test_the_tokens_of_latent_texts_are_counted_without_padding_and_over_inner_plates() -> None:
    posterior = long_texts(100, np.zeros(4))
    assert posterior.mean_tokens == 75
    made = replace(posterior, deterministic=("z",))
    assert made.mean_tokens == 0
    inner = Posterior({"z": np.ones((4, 3, 5), int)}, np.zeros(4), np.zeros(4), decoders={"z": str})
    assert inner.mean_tokens == 15


def test_weights_of_long_texts_that_degenerate_say_what_helps() -> None:
    bad = np.array([0.0, *[-40.0] * 63])
    (doubt,) = (text for text in long_texts(100, bad).doubts if "size" in text)
    assert doubt.startswith("the effective sample size is 1.0 of texts of 75 tokens")
    assert "check_every=" in doubt
    finding = of_weights([long_texts(100, bad)])
    assert "texts of 75 tokens" in finding.number
    assert "check_every=" in finding.advice
    short = long_texts(60, bad)
    assert "the effective sample size is 1.0" in short.doubts
    assert of_weights([short]).advice == "more samples, smc(), or more training"
    good = long_texts(100, np.linspace(-0.1, 0.1, 64))
    assert not good.doubts
    # Particles of smc are resampled already.
    walked = replace(long_texts(100, bad), method="smc", ancestors=np.arange(128).reshape(64, 2), num_ancestors=64)
    (doubt,) = (text for text in walked.doubts if "size" in text)
    assert doubt.startswith("the effective sample size is 1.0 at some token of 75: take more particles")
    assert "check_every=" not in doubt
    assert not of_weights([good]).advice


def test_resampling_keeps_evidence_and_follows_the_weights() -> None:
    weights = np.array([0.5, 0.25, 0.25, 0.0])
    with np.errstate(divide="ignore"):
        posterior = weighted(np.log(weights))
    drawn = posterior.resample(4000, seed=1)
    assert np.bincount(drawn.samples["z"][:, 0], minlength=4).tolist() == [2000, 1000, 1000, 0]
    assert drawn.log_evidence == pytest.approx(posterior.log_evidence)
    assert drawn.weights == pytest.approx(np.full(4000, 1 / 4000))
    assert drawn.ess == posterior.ess
    first = posterior.resample(50, seed=3).samples["z"]
    assert np.array_equal(first, posterior.resample(50, seed=3).samples["z"])
    # Shuffled: the order of draws says nothing.
    assert not np.array_equal(first, np.sort(first, 0))


def test_resampling_goes_row_by_row() -> None:
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.array([[1.0, 0.0], [0.0, 1.0]]))
    posterior = Posterior({"z": np.array([[[1], [2]], [[3], [4]]])}, log_weights, log_weights)
    assert posterior.resample(3).samples["z"].tolist() == [[[1], [4]]] * 3
    assert posterior.row(1).samples["z"].tolist() == [[2], [4]]


def test_copies_of_one_draw_are_not_many() -> None:
    """Resampled draws have equal weights, and the error, ESS and k̂ of those that they come from."""
    log_weights = np.concatenate([[0.0, 0.3], np.full(98, -20.0)])[:, None] + np.array([0.0, 1.0])
    samples = {"z": np.arange(200).reshape(100, 2, 1)}
    weighted = Posterior(samples, log_weights, log_weights)
    drawn = weighted.resample(50)
    for name in ("log_evidence", "log_evidence_error", "ess", "khat", "elbo", "elbo_error"):
        np.testing.assert_allclose(getattr(drawn, name), getattr(weighted, name), err_msg=name)
        np.testing.assert_allclose(getattr(drawn.row(1), name), getattr(weighted.row(1), name), err_msg=name)
        np.testing.assert_allclose(getattr(drawn.resample(9), name), getattr(weighted, name), err_msg=name)
    assert (drawn.ess < 2).all()
    assert drawn.row(0).doubts == weighted.row(0).doubts
    assert weighted.resample(1).ess == pytest.approx([1, 1])
    exact = replace(weighted, method="enumeration").resample(50)
    assert exact.ess == pytest.approx([50, 50])
    assert exact.log_evidence_error == pytest.approx([0, 0], abs=1e-6)


def test_a_guide_without_exact_density_has_no_weights(story: Story) -> None:
    with pytest.raises(ValueError, match="exactness 'none'"):
        Posterior({}, np.zeros(3), np.zeros(3), exactness="none")
    guide = PromptGuide(story.program, story.lm)
    guide.exactness = "none"
    with pytest.raises(ValueError, match="no exact density"):
        importance(story.program, guide, 4)


def test_decode_top_and_reprs(story: Story) -> None:
    posterior = importance(story.program, PromptGuide(story.program, story.lm), 64)(*story.args)
    texts = posterior.decode("middle")
    assert len(texts) == 64
    assert all(isinstance(text, str) and 1 <= len(text) <= 3 for text in texts)
    top = posterior.top("middle", 3)
    assert [w for _, w in top] == sorted([w for _, w in top], reverse=True)
    assert "log evidence" in repr(posterior)
    assert "of 64" in repr(posterior)
    assert repr(top[0][0]) in posterior.summary()
    assert "<table" in posterior._repr_html_()
    with pytest.raises(KeyError, match="no site 'nothing'"):
        posterior.decode("nothing")
    exact = exact_posterior(story.program)(*story.args)
    assert exact.top("middle", 1)[0][1] == pytest.approx(exact.weights.max())


def test_a_programs_posterior_goes_to_arviz(story: Story) -> None:
    """What tests/test_arviz.py shows without torch, from a program's own traces."""
    posterior = importance(story.program, PromptGuide(story.program, story.lm), 64)(*story.args)
    data = posterior.to_arviz(200, seed=1)
    assert data.posterior["middle_length"].shape == (1, 200)
    assert data.observed_data["ending"].values.tolist() == [3, 4]
    assert data.observed_text["ending"].item() == "cd"
    assert float(data.sample_stats["ess"]) == pytest.approx(float(posterior.ess))
    stats = posterior.to_arviz(weighted=True).sample_stats
    np.testing.assert_allclose(stats["log_q"][0], posterior.token_log_q["middle"].sum(-1), atol=1e-9)
    joint = posterior.token_log_p["middle"].sum(-1) + posterior.log_likelihood["ending"]
    np.testing.assert_allclose(stats["log_p"][0], joint, atol=1e-9)


def test_rows_of_a_program_are_dimensions_in_arviz(story: Story) -> None:
    run = importance(story.program, PromptGuide(story.program, story.lm), 16, vectorize_data=True)
    data = run(["ab", "c"], ["cd", "e"]).to_arviz()
    assert data.posterior["middle_length"].dims == ("chain", "draw", "row_0")
    assert data.observed_text["ending"].values.tolist() == ["cd", "e"]


def test_a_text_that_all_rows_share_stays_whole_in_a_row(story: Story) -> None:
    """It has as many tokens as there are rows."""
    posterior = Posterior({}, np.zeros((4, 2)), np.zeros((4, 2)), observed={"title": np.array([1, 2])})
    assert posterior.row(0).observed["title"].tolist() == [1, 2]
