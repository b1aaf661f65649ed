"""importance(), exact_posterior() and bounds() for NumPyro programs, against enumeration and against torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import pyro
import pytest
import torch
from jax import random
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from scipy import stats

from llmppl import LM as TorchLM
from llmppl import exact_posterior as torch_exact_posterior
from llmppl.numpyro import LM, bounds, exact_posterior, importance, inference_gap, smc
from llmppl.numpyro.guides import AutoregressiveGuide
from llmppl.numpyro.guides.prompt import PromptGuide
from llmppl.numpyro.testing import tiny_lm
from llmppl.testing import tiny_lm as torch_tiny_lm

ARGS = ("ab", "cd")


@pytest.fixture(scope="module")
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def twin(double: None) -> Any:
    """Story infilling on a model small enough to enumerate, its guide, and what importance sampling makes of both."""
    lm = tiny_lm(dtype=jnp.float64)

    def program(beginning: str, ending: str) -> None:
        middle = numpyro.sample("middle", lm(beginning, max_tokens=2, stop="."))
        numpyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    guide = PromptGuide(program, lm)
    run = importance(program, guide, 1000, progress=False)
    return SimpleNamespace(
        lm=lm,
        program=program,
        guide=guide,
        run=run,
        posterior=run(random.key(0), *ARGS),
        exact=exact_posterior(program)(*ARGS),
    )


def log_q_of(twin: Any, texts: np.ndarray, args: tuple[str, str] = ARGS) -> np.ndarray:
    """The guide's law by itself: the model told the ending, then the beginning."""
    fn = twin.lm(args[1], args[0], max_tokens=2, stop=".")
    return np.asarray(fn.log_prob(jnp.asarray(texts, jnp.int32)))


def test_weights_are_those_of_the_laws_and_their_mean_over_the_support_is_the_evidence(twin: Any) -> None:
    """Each recorded weight is p/q of its text to 1e-9; then Σ q w = Z over the support is to 1e-9 as well."""
    posterior, exact = twin.posterior, twin.exact
    joint = {tuple(text): value for text, value in zip(exact.samples["middle"], exact.log_joint, strict=True)}
    texts = posterior.samples["middle"]
    log_p = np.array([joint[tuple(text)] for text in texts])
    assert posterior.log_joint == pytest.approx(log_p, abs=1e-9)
    assert posterior.log_weights == pytest.approx(log_p - log_q_of(twin, texts), abs=1e-9)
    drawn = {tuple(text): weight for text, weight in zip(texts, posterior.log_weights, strict=True)}
    log_q = log_q_of(twin, exact.samples["middle"])
    whole = [
        math.exp(q + drawn.get(tuple(text), value - q))
        for text, q, value in zip(exact.samples["middle"], log_q, exact.log_joint, strict=True)
    ]
    assert len(drawn) > 10
    assert math.exp(log_q.max()) < 1
    assert np.exp(log_q).sum() == pytest.approx(1, abs=1e-9)
    assert sum(whole) == pytest.approx(math.exp(exact.log_evidence), rel=1e-9)


@pytest.mark.long
def test_the_evidence_is_unbiased_over_seeds(twin: Any) -> None:
    """Mean of Ẑ/Z over 20 seeds of 1000 samples, within 4 of its exact standard errors (below 2 %); the draws follow
    the law that they are weighted by, chi-square above 1e-3, without which the mean could be right by chance."""
    log_q = log_q_of(twin, twin.exact.samples["middle"])
    weight = np.exp(twin.exact.log_joint - log_q - twin.exact.log_evidence)
    error = math.sqrt(np.exp(log_q) @ (weight - 1) ** 2 / 20_000)
    assert error < 0.02
    posteriors = [twin.run(random.key(n), *ARGS) for n in range(20)]
    drawn = np.concatenate([posterior.samples["middle"] for posterior in posteriors])
    counts = (drawn[:, None] == twin.exact.samples["middle"]).all(-1).sum(0)
    expected = 20_000 * np.exp(log_q)
    often = expected >= 5
    observed, wanted = (np.append(c[often], c[~often].sum() + 1e-9) for c in (counts, expected))
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3
    ratios = [math.exp(posterior.log_evidence - twin.exact.log_evidence) for posterior in posteriors]
    assert np.mean(ratios) == pytest.approx(1, abs=4 * error)
    # One block of 64 and a later string of the same bucket: compiled once all in all.
    twin.run(random.key(0), "abc", "d")
    assert twin.run.compilations() == 1


def test_the_posterior_serves_arviz_plots_pages_and_gaps(twin: Any) -> None:
    posterior = twin.posterior
    assert posterior.samples["middle"].dtype == np.int64
    assert posterior.decode("ending") == "cd"
    assert posterior.decode("middle")[0] == twin.lm.decode(posterior.samples["middle"][0])
    assert posterior.token_log_q["middle"].sum(-1) == pytest.approx(posterior.log_joint - posterior.log_weights)
    assert posterior.token_log_p["middle"].sum(-1) + posterior.log_likelihood["ending"] == pytest.approx(
        posterior.log_joint
    )
    assert "importance: log evidence" in repr(posterior)
    assert "<" in posterior._repr_html_()
    assert posterior.to_arviz().posterior.sizes["draw"] == 1000
    posterior.plot()
    plt.close("all")
    gap = inference_gap(posterior, twin.exact)
    texts = twin.exact.samples["middle"]
    log_q = log_q_of(twin, texts)
    exact = float(np.exp(log_q) @ (log_q - twin.exact.log_joint) + twin.exact.log_evidence)
    assert gap.gap == pytest.approx(exact, abs=4 * gap.error)
    assert gap.error < 0.1


@pytest.mark.long
def test_rows_have_the_evidence_that_they_have_alone(twin: Any) -> None:
    """By enumeration to 1e-9, and each sample's weight that of its own row."""
    args = (["ab", "c"], ["cd", "e"])

    def rows(beginning: Any, ending: Any) -> None:
        with numpyro.plate("stories", 2):
            twin.program(beginning, ending)

    together = exact_posterior(rows)(*args)
    alone = [exact_posterior(twin.program)(*row) for row in zip(*args, strict=True)]
    assert together.log_evidence == pytest.approx([float(p.log_evidence) for p in alone], abs=1e-9)
    posterior = importance(twin.program, twin.guide, 40, vectorize_data=True, progress=False)(random.key(0), *args)
    assert posterior.batch_shape == (2,)
    for n, row in enumerate(zip(*args, strict=True)):
        texts = posterior.samples["middle"][:, n]
        joint = {tuple(t): v for t, v in zip(alone[n].samples["middle"], alone[n].log_joint, strict=True)}
        expected = [joint[tuple(text)] for text in texts] - log_q_of(twin, texts, row)
        assert posterior.log_weights[:, n] == pytest.approx(expected, abs=1e-9)


def test_torch_enumerates_the_same_posterior(tmp_path: Path, double: None) -> None:
    """The same weights in both: log-joints of a choice and a text to 2e-5, for transformers works in float32 in places
    (norms, turned positions, attention) whatever the weights' dtype."""
    saved = torch_tiny_lm(vocabulary=6, seed=0, dtype=torch.float64)
    saved.transformer.save_pretrained(tmp_path)
    saved.tokenizer.save_pretrained(tmp_path)
    ours, theirs = LM.from_pretrained(tmp_path, dtype=jnp.float64), TorchLM.from_pretrained(tmp_path, torch.float64)

    def program(lm: Any, sample: Any) -> Any:
        def story(beginning: str, ending: str) -> None:
            mood = sample("mood", lm.choice(beginning, options=["a.", "bc"]))
            middle = sample("middle", lm(beginning, mood, max_tokens=2, stop="."))
            sample("ending", lm(mood, middle), obs=lm.encode(ending))

        return story

    found = exact_posterior(program(ours, numpyro.sample))(*ARGS)
    expected = torch_exact_posterior(program(theirs, pyro.sample))(*ARGS)
    assert found.num_samples == expected.num_samples
    for site in ("mood", "middle"):
        assert (found.samples[site] == expected.samples[site]).all()
    assert found.log_joint == pytest.approx(expected.log_joint, abs=2e-5)
    assert found.token_log_p["middle"] == pytest.approx(expected.token_log_p["middle"], abs=2e-5)
    assert found.decode("mood") == expected.decode("mood")


@pytest.mark.long
def test_a_program_that_looks_at_its_values_is_run_for_each(twin: Any) -> None:
    lm = twin.lm

    def program(ending: str) -> None:
        if numpyro.sample("short", dist.Bernoulli(0.25)) == 1:
            middle = numpyro.sample("middle", lm("a", max_tokens=1))
        else:
            middle = numpyro.sample("mood", lm.choice("a", options=["b.", "c."]))
        numpyro.sample("ending", lm("a", middle), obs=lm.encode(ending))

    found = exact_posterior(program)("cd")
    assert found.num_samples == 6 + 2
    expected = 0.0
    for share, law in ((0.25, lm("a", max_tokens=1)), (0.75, lm.choice("a", options=["b.", "c."]))):
        texts = law.enumerate_support()
        expected += share * float(jnp.exp(law.log_prob(texts) + lm("a", texts).log_prob(lm.encode("cd"))).sum())
    assert math.exp(found.log_evidence) == pytest.approx(expected, rel=1e-9)
    assert (found.samples["mood"][found.samples["short"] == 1] == -1).all()


@pytest.mark.long
def test_bounds_bracket_the_enumerated_values(twin: Any) -> None:
    """In expectation, so up to 3 standard errors over 600 simulated endings of one token (0.1 nats each at most)."""
    lm, total = twin.lm, np.zeros(3)
    prior = lm("ab", max_tokens=2, stop=".")
    texts = prior.enumerate_support()
    for ending in "." + "abcde":
        joint = np.asarray(prior.log_prob(texts) + lm("ab", texts).log_prob(lm.encode(ending)))
        log_z = np.logaddexp.reduce(joint)
        log_q, log_p = log_q_of(twin, texts, ("ab", ending)), joint - log_z
        total += np.exp(log_z) * np.array([log_z, np.exp(log_q) @ (log_q - log_p), np.exp(log_p) @ (log_p - log_q)])
    log_z, kl_q_p, kl_p_q = total
    run = bounds(twin.program, twin.guide, 4, vectorize_data=True)
    found = run(random.key(0), ["ab"] * 600, ["c"] * 600)
    for (low, high), truth in zip((found.log_evidence, found.kl_q_p, found.kl_p_q), total, strict=True):
        assert max(low.error, high.error) < 0.1
        assert low.value - 3 * low.error < truth < high.value + 3 * high.error
    assert found.kl_sum.value == pytest.approx(kl_q_p + kl_p_q, abs=3 * found.kl_sum.error)
    # With four samples the bracket is wide: nothing above holds by accident.
    assert found.log_evidence[1].value - found.log_evidence[0].value > 6 * found.log_evidence[0].error
    assert "600 simulated observations" in repr(found)


@pytest.mark.long
def test_a_hand_written_guide_and_a_continuous_latent_agree_with_nuts(twin: Any) -> None:
    """Posterior mean of the latent: weighted samples against NUTS against the integral, each within 4 of its errors."""
    lm = twin.lm

    def program(ending: str) -> None:
        heat = numpyro.sample("heat", dist.LogNormal(0.0, 0.5))
        numpyro.sample("ending", lm("ab", temperature=heat), obs=lm.encode(ending))

    def guide(ending: str) -> None:
        scale = numpyro.param("scale", 0.1)
        numpyro.sample("heat", dist.LogNormal(0.0, scale))

    run = importance(program, guide, 2048, params={"scale": jnp.asarray(0.7)}, progress=False)
    posterior = run(random.key(0), "cd")
    grid = jnp.linspace(-2.5, 2.5, 400)
    heats = jnp.exp(grid)
    log_joint = dist.Normal(0.0, 0.5).log_prob(grid) + jax.vmap(
        lambda heat: lm("ab", temperature=heat).log_prob(lm.encode("cd"))
    )(heats)
    density = np.exp(np.asarray(log_joint))
    mean = float((density * heats).sum() / density.sum())
    log_z = math.log(float(density.sum() * (grid[1] - grid[0])))
    assert posterior.log_evidence == pytest.approx(log_z, abs=4 * posterior.log_evidence_error)
    assert posterior.log_evidence_error < 0.05
    heat, weights = posterior.samples["heat"], posterior.weights
    own = float(weights @ heat)
    assert own == pytest.approx(mean, abs=4 * math.sqrt((weights**2) @ (heat - own) ** 2))
    mcmc = MCMC(NUTS(program), num_warmup=200, num_samples=400, progress_bar=False)
    mcmc.run(random.key(1), lm.argument("cd"))
    chain = np.asarray(mcmc.get_samples()["heat"])
    size = numpyro.diagnostics.effective_sample_size(chain[None])
    assert size > 50
    assert chain.mean() == pytest.approx(mean, abs=4 * chain.std() / math.sqrt(size))


@pytest.mark.long
def test_a_text_and_a_number_together(twin: Any) -> None:
    """The guide of the number is given as others=; each weight is p/q to 1e-9."""
    lm = twin.lm

    def program(ending: str) -> None:
        heat = numpyro.sample("heat", dist.LogNormal(0.0, 0.5))
        middle = numpyro.sample("middle", lm("ab", max_tokens=2, temperature=heat))
        numpyro.sample("ending", lm("ab", middle), obs=lm.encode(ending))

    def others(ending: str) -> None:
        numpyro.sample("heat", dist.LogNormal(0.1, 0.4))

    posterior = importance(program, PromptGuide(program, lm, others=others), 5, progress=False)(random.key(0), "cd")
    for n in range(5):
        heat, text = posterior.samples["heat"][n], jnp.asarray(posterior.samples["middle"][n], jnp.int32)
        told = lm("cd", "ab", max_tokens=2, temperature=heat)
        log_q = dist.LogNormal(0.1, 0.4).log_prob(heat) + told.log_prob(text)
        log_p = dist.LogNormal(0.0, 0.5).log_prob(heat) + lm("ab", max_tokens=2, temperature=heat).log_prob(text)
        log_p = log_p + lm("ab", text).log_prob(lm.encode("cd"))
        assert posterior.log_weights[n] == pytest.approx(float(log_p - log_q), abs=1e-9)


def numbers(data: Any) -> None:
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    with numpyro.plate("entries", 3):
        w = numpyro.sample("w", dist.Normal(z, 1.0))
        numpyro.sample("x", dist.Normal(w, 1.0), obs=data)


def numbers_guide(data: Any) -> None:
    numpyro.sample("z", dist.Normal(0.0, 1.0))
    with numpyro.plate("entries", 3):
        numpyro.sample("w", dist.Normal(data, 1.0))


def test_inner_plates_and_early_stopping() -> None:
    run = importance(numbers, numbers_guide, 4096, target_error=0.08, progress=False)
    posterior = run(random.key(0), jnp.array([0.2, -0.1, 0.4]))
    assert posterior.batch_shape == ()
    assert posterior.samples["w"].shape == (posterior.num_samples, 3)
    assert posterior.num_samples % 64 == 0
    assert 128 <= posterior.num_samples < 4096
    assert posterior.log_evidence_error <= 0.08
    covariance = np.ones((3, 3)) + 2 * np.eye(3)
    x = np.array([0.2, -0.1, 0.4])
    log_z = -0.5 * (x @ np.linalg.solve(covariance, x) + np.linalg.slogdet(2 * np.pi * covariance)[1])
    assert posterior.log_evidence == pytest.approx(log_z, abs=4 * 0.08)


def test_what_importance_sampling_refuses(twin: Any) -> None:
    run = importance(numbers, numbers_guide, 4, progress=False)
    data = jnp.zeros(3)
    with pytest.raises(TypeError, match=r"rng_key must be a JAX key, got str.*jax.random.key\(0\)"):
        twin.run(*ARGS)
    with pytest.raises(TypeError, match="old style"):
        run(random.PRNGKey(0), data)
    with pytest.raises(ValueError, match="site 'odd' has log-probability nan at row"):
        importance(undefined, numbers_guide, 4, progress=False)(random.key(0), data)
    with pytest.raises(ValueError, match="site 'z' is scaled"):
        importance(handlers.scale(numbers, scale=2.0), numbers_guide, 4)(random.key(0), data)
    with pytest.raises(ValueError, match="none of the 4 samples has positive weight"):
        importance(excluding, numbers_guide, 4, progress=False)(random.key(0), data)
    with pytest.raises(ValueError, match="does not sample the model's latent sites"):
        importance(numbers, lambda data: None, 4)(random.key(0), data)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        importance(numbers, numbers_guide, 0)
    with pytest.raises(ValueError, match="target_error=-1 must be a positive number"):
        importance(numbers, numbers_guide, 200, target_error=-1)
    with pytest.raises(ValueError, match="one length"):
        importance(twin.program, twin.guide, 4, vectorize_data=True)(random.key(0), ["ab", "c"], ["cd"])
    unscored = PromptGuide(twin.program, twin.lm)
    unscored.exactness = "none"
    with pytest.raises(ValueError, match="no exact density"):
        importance(twin.program, unscored)
    unscored.exactness = "conditional"
    with pytest.raises(ValueError, match="needs the guide's density"):
        bounds(twin.program, unscored)
    with pytest.raises(ValueError, match="'smc' must be 'importance'"):
        bounds(twin.program, twin.guide, method="smc")


def test_what_enumeration_refuses(twin: Any) -> None:
    with pytest.raises(ValueError, match=r"'z' \(Normal\) cannot be enumerated"):
        exact_posterior(numbers)(jnp.zeros(3))
    with pytest.raises(ValueError, match="combinations"):
        exact_posterior(lambda: numpyro.sample("long", twin.lm("a", max_tokens=30)))()
    with pytest.raises(ValueError, match="no latent site"):
        exact_posterior(lambda: numpyro.sample("seen", dist.Normal(), obs=0.0))()


def undefined(data: Any) -> None:
    numbers(data)
    numpyro.factor("odd", jnp.nan)


def excluding(data: Any) -> None:
    numbers(data)
    numpyro.factor("never", -jnp.inf)


@pytest.mark.long
def test_a_callable_that_is_used_again_has_the_guides_weights_of_now() -> None:
    """Compiled code would keep what they were when it was compiled."""
    lm = tiny_lm()

    def program(beginning: Any, ending: Any) -> None:
        middle = numpyro.sample("middle", lm(beginning, max_tokens=2, stop="."))
        numpyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    guide = AutoregressiveGuide(program, lm, rank=2)
    runs = [
        lambda make: make(importance(program, guide, 32, progress=False)),
        lambda make: make(bounds(program, guide, 8, simulations=0)),
        lambda make: make(smc(program, guide, 8, progress=False)),
    ]
    kept = [run(lambda own: own) for run in runs]
    before = [own(random.key(0), "ab", "cd") for own in kept]
    guide.update({name: jax.tree.map(lambda w: w + 0.5, value) for name, value in guide.parameters().items()})
    fresh = [run(lambda own: own) for run in runs]

    def number(found: Any) -> float:
        return float(np.mean(found.lower if hasattr(found, "lower") else found.log_evidence))

    for first, own, new in zip(before, kept, fresh, strict=True):
        now = number(own(random.key(0), "ab", "cd"))
        assert now == pytest.approx(number(new(random.key(0), "ab", "cd")), abs=1e-6)
        assert abs(now - number(first)) > 1e-3


def test_a_proposal_without_the_plates_shape_is_drawn_for_each_row() -> None:
    lm, y = tiny_lm(), jnp.array([0.0, 1.5])

    def program(y: Any, ending: Any) -> None:
        with numpyro.plate("inner", 2):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)
        middle = numpyro.sample("middle", lm("ab", max_tokens=1))
        numpyro.sample("ending", lm("ab", middle), obs=lm.encode(ending))

    exact = float(exact_posterior(program)(y, "cd").log_evidence)
    guide = PromptGuide(program, lm, others={"z": lambda y: dist.Bernoulli(0.5)})
    found = importance(program, guide, 2000, progress=False)(random.key(0), y, "cd")
    assert found.samples["z"].shape == (2000, 2)
    assert float(found.log_evidence) == pytest.approx(exact, abs=0.06), "four standard errors"


def test_two_plates_of_one_size_are_no_rows_of_their_own() -> None:
    p, y = np.array([0.2, 0.7]), np.array([0.5, 1.5])

    def program() -> None:
        with numpyro.plate("a", 2):
            z = numpyro.sample("z", dist.Bernoulli(jnp.array(p)))
        with numpyro.plate("b", 2):
            numpyro.sample("y", dist.Normal(z.sum(-1), jnp.array([1.0, 2.0])), obs=jnp.array(y))

    each = [
        stats.bernoulli.logpmf(z, p).sum() + stats.norm.logpdf(y, sum(z), [1.0, 2.0]).sum()
        for z in ([0, 0], [0, 1], [1, 0], [1, 1])
    ]
    found = exact_posterior(program)()
    assert float(found.log_evidence) == pytest.approx(float(np.logaddexp.reduce(each)), abs=1e-5)


def test_observed_texts_of_an_inner_plate_go_to_their_rows() -> None:
    lm = tiny_lm()
    endings = jnp.asarray(lm.encode(["aa", "bb", "cc", "dd", "ee", "ab"])).reshape(3, 2, 2)  # inner plate, rows, tokens

    def program(endings: Any) -> None:
        with numpyro.plate("rows", 2, dim=-1):
            middle = numpyro.sample("middle", lm("ab", max_tokens=1))
            with numpyro.plate("inner", 3, dim=-2):
                numpyro.sample("ending", lm("ab", middle), obs=endings)

    found = exact_posterior(program)(endings)
    assert [found.row(n).decode("ending") for n in range(2)] == [["aa", "cc", "ee"], ["bb", "dd", "ab"]]


def test_observed_texts_of_an_inner_plate_as_large_as_the_rows_are_of_each_row() -> None:
    lm = tiny_lm()

    def program(endings: Any) -> None:
        with numpyro.plate("rows", 2, dim=-2):
            middle = numpyro.sample("middle", lm("ab", max_tokens=1))
            with numpyro.plate("inner", 2, dim=-1):
                numpyro.sample("ending", lm("ab", middle), obs=endings)

    found = exact_posterior(program)(jnp.asarray(lm.encode(["ab", "ba"])))
    assert [found.row(n).decode("ending") for n in range(2)] == [["ab", "ba"]] * 2


def test_a_program_may_ask_for_a_key() -> None:
    lm = tiny_lm()

    def program(ending: Any) -> None:
        numpyro.prng_key()
        middle = numpyro.sample("middle", lm("ab", max_tokens=1))
        numpyro.sample("ending", lm("ab", middle), obs=lm.encode(ending))

    found = importance(program, PromptGuide(program, lm), 8, progress=False)(random.key(0), "cd")
    assert np.isfinite(found.log_evidence)


def test_rows_outside_of_all_plates_are_summed() -> None:
    """As one program with a latent for each: all combinations of them are enumerated."""
    lm = tiny_lm()

    def batched(ending: Any) -> None:
        z = numpyro.sample("z", lm(["a", "b"], max_tokens=1))
        numpyro.sample("y", lm(z), obs=ending)

    def two(ending: Any) -> None:
        for name in "ab":
            z = numpyro.sample(f"z_{name}", lm(name, max_tokens=1))
            numpyro.sample(f"y_{name}", lm(z), obs=ending)

    ending = lm.encode("a")
    exact, found = (exact_posterior(program)(ending) for program in (two, batched))
    assert float(found.log_evidence) == pytest.approx(float(exact.log_evidence), abs=1e-5)
    assert found.samples["z"].shape == (36, 2, 1)
    drawn = importance(batched, PromptGuide(batched, lm, {"z": lambda: [["a", "b"]]}), 64, progress=False)
    posterior = drawn(random.key(0), ending)
    values = jnp.asarray(posterior.samples["z"])
    weights = lm(values).log_prob(ending).sum(-1)
    np.testing.assert_allclose(posterior.log_weights, weights, atol=1e-5)


def test_observed_texts_may_be_masked() -> None:
    """What is masked does not count, and is simulated all the same."""
    lm = tiny_lm()

    def program(ending: Any) -> None:
        z = numpyro.sample("z", lm("a", max_tokens=1))
        with handlers.mask(mask=jnp.array(False)):
            numpyro.sample("y", lm(z), obs=ending)
        numpyro.sample("x", lm(z), obs=ending)

    def plain(ending: Any) -> None:
        z = numpyro.sample("z", lm("a", max_tokens=1))
        numpyro.sample("x", lm(z), obs=ending)

    ending = lm.encode("b")
    exact, found = (float(exact_posterior(each)(ending).log_evidence) for each in (plain, program))
    assert found == pytest.approx(exact, abs=1e-5)
    guide = PromptGuide(program, lm, {"z": lambda y: [y, "a"]})
    bracket = bounds(program, guide, 8, 4)(random.key(0), ending)
    assert np.isfinite([bracket.lower, bracket.upper]).all()


def test_masked_latents_are_refused_where_they_would_count() -> None:
    lm = tiny_lm()

    def program(ending: Any) -> None:
        with handlers.mask(mask=jnp.array(False)):
            numpyro.sample("c", dist.Categorical(jnp.array([0.2, 0.8])))
        z = numpyro.sample("z", lm("a", max_tokens=1))
        numpyro.sample("y", lm(z), obs=ending)

    ending = lm.encode("b")
    with pytest.raises(ValueError, match="latent site 'c' is masked"):
        exact_posterior(program)(ending)
    with pytest.raises(ValueError, match="latent site 'c' is masked"):
        smc(program, None, 8, progress=False)(random.key(0), ending)
