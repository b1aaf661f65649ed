"""Sequential Monte Carlo in JAX against enumeration: the evidence, the posterior, rows, several latents, bad input."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import numpyro
import pytest
from jax import random
from numpyro import distributions as dist

from llmppl.numpyro import LM, Posterior, exact_posterior, smc
from llmppl.numpyro.guides import PromptGuide
from llmppl.numpyro.testing import tiny_lm

PARTICLES, RUNS = 6, 500


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


@pytest.fixture(scope="module")
def story(lm: LM) -> Any:
    def program(beginning: Any, ending: Any) -> None:
        middle = numpyro.sample("middle", lm(beginning, max_tokens=3, stop="."))
        # Token ids are scored as they are, a string padded to 16 tokens.
        seen = ending if isinstance(ending, (jax.Array, np.ndarray)) else lm.encode(ending)
        numpyro.sample("ending", lm(beginning, middle), obs=seen)

    return program


@pytest.fixture(scope="module")
def exact(story: Any) -> Posterior:
    return exact_posterior(story)("ab", "cd")


def estimates(posterior: Posterior, runs: int) -> np.ndarray:
    """Ẑ of each run, ``(runs,) + batch_shape``."""
    weights = np.exp(posterior.log_weights)
    return weights.reshape(runs, -1, *weights.shape[1:]).mean(1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("guided", "targets", "resampling"),
    [(False, "prefixes", "residual"), (True, "prefixes", "systematic"), (True, "flows", "multinomial")],
)
def test_the_evidence_is_unbiased_and_the_posterior_the_exact_one(
    lm: LM, story: Any, exact: Posterior, guided: bool, targets: str, resampling: str
) -> None:
    """E[Ẑ] = Z, and E[Ẑ E_w[1{text}]] = Z p(text|x) for every text of more than 3 %, over 500 runs of six particles
    that resample at every token: within 4 standard errors (one key; 3 for a single number). The standard error of the
    mean Ẑ is below 6 % of Z, so that resampling without resetting weights, say, is far outside."""
    guide = PromptGuide(story, lm) if guided else None
    run = smc(
        story,
        guide,
        PARTICLES,
        targets=targets,
        resampling=resampling,
        ess_threshold=1.0,
        check_every=1,
        num_runs=RUNS,
        progress=False,
    )
    posterior = run(random.key(0), "ab", lm.encode("cd") if guided else "cd")
    assert posterior.method == "smc"
    assert posterior.ancestors is not None
    assert posterior.ess_history is not None
    found, evidence = estimates(posterior, RUNS), np.exp(exact.log_evidence)
    error = found.std(ddof=1) / np.sqrt(RUNS)
    assert error < 0.06 * evidence
    assert abs(found.mean() - evidence) < 3 * error
    # Resampling happened, and the genealogy knows it: a run's survivors descend from fewer than all. (Prefixes that the
    # program proposes itself all weigh the same.)
    survivors = [len(set(row)) for row in posterior.ancestors.reshape(RUNS, -1)]
    assert np.mean(survivors) < PARTICLES - 0.5 if guided else set(survivors) == {PARTICLES}
    # log q and the joint follow the particles: both are those of the text that each particle ends with.
    index = {tuple(text): n for n, text in enumerate(exact.samples["middle"].tolist())}
    places = np.array([index[tuple(text)] for text in posterior.samples["middle"].tolist()])
    np.testing.assert_allclose(posterior.log_joint, exact.log_joint[places], atol=1e-4)
    np.testing.assert_allclose(posterior.token_log_p["middle"], exact.token_log_p["middle"][places], atol=1e-4)
    weights = np.exp(posterior.log_weights).reshape(RUNS, -1)
    for text in np.flatnonzero(exact.weights > 0.03):
        share = (weights * (places.reshape(RUNS, -1) == text)).mean(1)
        wanted = evidence * exact.weights[text]
        assert abs(share.mean() - wanted) < 4 * share.std(ddof=1) / np.sqrt(RUNS) + 1e-6


@pytest.mark.long
def test_two_latents_with_an_observation_between_and_rows_of_their_own(lm: LM) -> None:
    """Each row of the data plate resamples by itself: its evidence is that of a call for it alone, enumerated. Of 40
    rows every other one is of the same observation, so that 50 calls are 1000 runs for each of the two."""

    def program(beginning: Any, clue: Any, ending: Any) -> None:
        first = numpyro.sample("first", lm(beginning, max_tokens=2, stop="."))
        numpyro.sample("clue", lm(beginning, first), obs=clue)
        second = numpyro.sample("second", lm(first, "b", max_tokens=2, stop="."))
        numpyro.sample("ending", lm(first, second), obs=ending)

    rows = [("ab", "c", "de"), ("cd", "a", "bb")]
    exact = [exact_posterior(program)(b, lm.encode(clue), lm.encode(ending)).log_evidence for b, clue, ending in rows]
    run = smc(program, None, 32, ess_threshold=1.0, num_runs=50, vectorize_data=True, progress=False)
    beginnings, clues, endings = map(list, zip(*rows * 20, strict=True))
    posterior = run(random.key(1), beginnings, lm.encode(clues), lm.encode(endings))
    assert posterior.batch_shape == (40,)
    found = estimates(posterior, 50).reshape(1000, 2)
    error = found.std(0, ddof=1) / np.sqrt(1000)
    assert (error < 0.08 * np.exp(exact)).all()
    assert (abs(found.mean(0) - np.exp(exact)) < 3 * error).all()
    assert posterior.decode("second")[0][0]


def test_a_key_gives_one_result_and_bad_numbers_are_refused(lm: LM, story: Any) -> None:
    run = smc(story, None, 4, progress=False)
    first, again = (run(random.key(3), "ab", "cd").samples["middle"] for _ in range(2))
    assert (first == again).all()
    assert (run(random.key(4), "ab", "cd").samples["middle"] != first).any()
    run(random.key(3), "abc", "e")  # strings of other lengths, in the same buckets
    assert run.compilations() == 1
    with pytest.raises(TypeError, match="rng_key must be a JAX key"):
        run("ab", "cd")
    for arguments, message in (
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"targets": "texts"}, "targets='texts' must be one of"),
        ({"resampling": "optimal"}, "resampling='optimal' is not built for NumPyro"),
        ({"ess_threshold": 2.0}, "ess_threshold=2.0 must be a share"),
    ):
        with pytest.raises(ValueError, match=message):
            smc(story, None, **{"num_samples": 4, **arguments})  # type: ignore[arg-type]


@pytest.mark.long
@pytest.mark.parametrize("targets", ["prefixes", "flows"])
def test_what_a_latent_allows_follows_its_particle(lm: LM, targets: str) -> None:
    masks = np.array([[True, True, True, False, False, False], [True, False, False, True, True, True]])

    def program(beginning: Any, ending: Any) -> None:
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        allowed = jax.numpy.asarray(masks)[z]
        middle = numpyro.sample("middle", lm(beginning, max_tokens=3, stop=".", allowed=allowed))
        numpyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    exact = float(exact_posterior(program)("ab", "cd").log_evidence)
    told = {"z": lambda beginning: dist.Bernoulli(0.5)}
    guide = PromptGuide(program, lm, others=told) if targets == "prefixes" else None
    run = smc(program, guide, 64, targets=targets, check_every=1, ess_threshold=1.0, progress=False)
    found = [run(random.key(n), "ab", "cd") for n in range(30)]
    assert all(np.isfinite(own.log_joint).all() for own in found), "no particle outside its law"
    assert np.mean([np.exp(own.log_evidence - exact) for own in found]) == pytest.approx(1.0, abs=0.12)
