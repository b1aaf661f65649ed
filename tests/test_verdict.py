"""diagnose(): what ESS and k̂ are fooled by fails, what is the posterior does not, and nothing is claimed too much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story
from test_calibration import Table, table_guide, without_mass
from torch import Tensor

from llmppl import LM, diagnose, exact_posterior
from llmppl.diagnostics import Diagnosis, Finding, verdict
from llmppl.guides import AutoregressiveGuide

ROWS = 4


def on_simulated_data(story: Story) -> list[tuple[str, str]]:
    """Endings that the program itself writes: the data are as the simulated x are."""
    with torch.no_grad():
        middle = story.lm(story.beginning, max_tokens=3, stop=".").sample((ROWS,))
        endings = story.lm(story.beginning, middle, max_tokens=2).sample()
    return [(story.beginning, ending) for ending in story.lm.decode(endings)]


def diagnosed(story: Story, guide: Callable[..., Any], simulations: int = 100, **options: Any) -> Diagnosis:
    data = options.pop("data", None) or on_simulated_data(story)
    return diagnose(
        story.program,
        guide,
        data,
        num_samples=64,
        simulations=simulations,
        vectorize_data=True,
        progress=False,
        **options,
    )


def status(found: Diagnosis) -> dict[tuple[str, str], str]:
    return {(finding.topic, finding.scope): finding.status for finding in found.findings}


def missing_the_heaviest(logits: Tensor) -> Tensor:
    """A posterior without texts of 90 % of its mass, and the rest not quite right, so that the weights vary."""
    return 0.85 * without_mass(0.9)(logits)


@pytest.fixture(params=["enumerated", "simulated"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the posteriors enumerated, and as if there were too many texts for that."""
    if request.param == "simulated":
        monkeypatch.setattr(verdict, "ENUMERABLE", 100)
    return request.param


@pytest.mark.long
def test_a_missed_mode_fails_where_ess_and_khat_are_content(story: Story, source: str) -> None:
    """log Ẑ is off by 2.3 nats, ESS above 90 % and k̂ below its limit: the weights are found good, the guide is not."""
    data = [("ab", "cd"), ("ab", "ee")]
    found = diagnosed(story, table_guide(story, missing_the_heaviest), data=data)
    posterior = found.posterior
    assert not isinstance(posterior, list)
    exact = np.array([exact_posterior(story.program)(*each).log_evidence for each in data])
    np.testing.assert_allclose(posterior.log_evidence - exact, -2.3, atol=0.15)
    assert (posterior.ess > 0.9 * 64).all()
    assert (posterior.khat < 0.45).all()
    states = status(found)
    assert states["weights", "these x"] == "suggested"
    assert states["modes", "simulated x"] == "failed"
    assert states["draws", "simulated x"] == "failed"
    assert states.get(("evidence", "these x")) == ("failed" if source == "enumerated" else None)
    assert states.get(("modes", "these x")) == ("failed" if source == "enumerated" else None)
    assert found.verdict.startswith("Failed: ")
    assert "the guide misses part of the posterior" in found.verdict
    assert "sleep" in repr(found)


@pytest.mark.long
def test_a_tenth_that_is_all_but_impossible_fails(story: Story, source: str) -> None:
    """Probability e^-14 in place of 10 %: the bounds of log Z hardly notice, the simulated latents do."""
    found = diagnosed(story, table_guide(story, without_mass(0.1, -14.0)), simulations=200)
    assert status(found)["modes", "simulated x"] == "failed"
    assert found.verdict.startswith("Failed: ")
    assert "the guide misses part of the posterior" in found.verdict


@pytest.mark.long
def test_the_exact_posterior_does_not_fail(story: Story, source: str) -> None:
    """Over 3 seeds: nothing fails but SBC, which may in 5 % each (one of 3 at most with probability 99 %)."""
    rejections = 0
    for seed in range(3):
        found = diagnosed(story, table_guide(story), simulations=60, seed=seed)
        states = status(found)
        rejections += states.pop(("draws", "simulated x")) == "failed"
        assert "failed" not in states.values()
        assert states["evidence", "simulated x"] == "certified"
        assert states["modes", "simulated x"] == "certified"
        expected = (
            "Certified for these x" if source == "enumerated" else ("Certified on average", "Suggested only: cer")
        )
        assert found.verdict.startswith(expected)
    assert rejections <= 1


@pytest.mark.long
def test_a_guide_near_the_posterior_does_not_fail(story: Story, source: str) -> None:
    """Tempered and with noise on every log-probability, as training leaves it: KL of some 0.05 nats both ways."""
    generator = torch.Generator().manual_seed(0)

    def near(logits: Tensor) -> Tensor:
        return 0.9 * logits + 0.2 * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)

    found = diagnosed(story, table_guide(story, near), simulations=60)
    states = status(found)
    states.pop(("draws", "simulated x"))  # they are not the posterior's, and ranks may show it
    assert "failed" not in states.values(), repr(found)
    assert not found.verdict.startswith("Failed")


def test_few_simulations_certify_little(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "ENUMERABLE", 100)
    found = diagnosed(story, table_guide(story), simulations=8)
    assert found.bounds is not None
    assert found.calibration is not None
    assert found.bounds.lower.size == found.calibration.simulations == 8
    assert status(found)["modes", "simulated x"] == "suggested"
    assert "31.2% missed" in repr(found)
    assert found.verdict.startswith("Suggested only")


def test_what_cannot_be_simulated_is_unknown_and_enumeration_still_certifies(story: Story) -> None:
    def factored(beginning: Any, ending: Any) -> None:
        middle = story.program(beginning, ending)
        pyro.factor("no_c", torch.where((middle == 3).any(-1), -1.0, 0.0).double())

    guide = AutoregressiveGuide(factored, story.lm, {"middle": lambda beginning: [beginning]}, rank=2)
    found = diagnose(factored, guide, [story.args], 64, progress=False)
    assert found.bounds is None
    assert found.calibration is None
    reasons = {finding.number for finding in found.findings if finding.status == "unknown"}
    assert reasons == {"nothing was simulated: the program has a factor, 'no_c'"}
    assert ("evidence", "these x") in status(found)

    def deaf(beginning: str, ending: str) -> None:
        guide(beginning, ending)

    deaf_found = diagnose(story.program, deaf, [story.args], 64, progress=False)
    assert "the guide takes no observations=" in repr(deaf_found)

    def long(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", story.lm(beginning, max_tokens=8))
        pyro.factor("f", -1.0 * (middle == 1).sum(-1))

    prior = AutoregressiveGuide(long, story.lm, {"middle": lambda beginning: [beginning]}, rank=2)
    unknown = diagnose(long, prior, [story.args], 32, progress=False)
    assert unknown.verdict.startswith("Unknown: nothing could be simulated")


def test_a_density_that_does_not_sum_to_one_fails(story: Story) -> None:
    class Wrong(Table):
        def log_prob(self, value: Tensor) -> Tensor:
            return super().log_prob(value) - 0.3

        def expand(self, batch_shape: Any, _instance: object = None) -> Wrong:
            return Wrong(self.texts, self.logits.expand(torch.Size(batch_shape) + self.logits.shape[-1:]))

    texts, joint = story.joint()

    def guide(beginning: str, ending: str) -> None:
        pyro.sample("middle", Wrong(texts, joint.detach()))

    found = diagnose(story.program, guide, [story.args], 64, progress=False)
    assert status(found)["density", "these x"] == "failed"
    assert "they sum to 0.7408" in repr(found)
    assert found.verdict.startswith("Failed: the guide's probabilities are wrong")


def test_the_prior_proves_a_guide_wrong_only_beyond_chance(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten observations without 90 % of each posterior: the prior finds 2 nats more in each, beyond Markov's bound."""
    monkeypatch.setattr(verdict, "ENUMERABLE", 100)
    data = [("ab", ending) for ending in ("cd", "ee", "ad", "cc", "ea", "dd", "be", "ce", "de", "ba")]
    wrong = diagnosed(story, table_guide(story, missing_the_heaviest), simulations=0, data=data)
    assert status(wrong)["prior", "these x"] == "failed"
    assert wrong.verdict == "Failed: log Ẑ is too low."
    right = diagnosed(story, table_guide(story), simulations=0, data=data)
    assert status(right)["prior", "these x"] == "suggested"


def test_choices_and_plain_latents_are_diagnosed(lm: LM) -> None:
    def model(seen: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=seen)

    def guide(seen: Tensor, observations: dict[str, Tensor] | None = None, scale: float = 0.5**0.5) -> None:
        seen = seen if observations is None else observations["x"]
        pyro.sample("z", dist.Normal(seen / 2, scale))

    good = diagnose(model, guide, [(torch.tensor(0.3),), (torch.tensor(-1.0),)], 32, 100, progress=False)
    assert good.verdict.startswith(("Certified on average", "Suggested only: certified"))
    assert isinstance(good.posterior, list)
    assert len(good.posterior) == 2

    def narrow(seen: Tensor, observations: dict[str, Tensor] | None = None) -> None:
        guide(seen, observations, 0.1)

    bad = diagnose(model, narrow, [(torch.tensor(0.3),)], 32, 100, progress=False)
    assert bad.verdict.startswith("Failed")
    assert "log q(z|x)" in repr(bad)


def test_reports_are_short_reproducible_and_escaped(story: Story) -> None:
    data = [story.args, ("ab", "ee")]
    before = torch.get_rng_state()
    first = diagnosed(story, table_guide(story), simulations=20, seed=5, data=data)
    assert torch.equal(before, torch.get_rng_state())
    pyro.set_rng_seed(7)
    second = diagnosed(story, table_guide(story), simulations=20, seed=5, data=data)
    assert [f.number for f in first.findings] == [f.number for f in second.findings]
    assert len(repr(first).splitlines()) <= 18
    assert repr(first).startswith(f"Diagnosis: {first.verdict}")
    page = Diagnosis("<b>", [Finding("failed", "a < b", "1 & 2", "")], [], None, None, 0.0)._repr_html_()
    assert "&lt;b&gt;" in page
    assert "a &lt; b" in page
    assert "1 &amp; 2" in page


def test_bad_input_is_named(story: Story) -> None:
    guide = table_guide(story)
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        diagnose(story.program, guide, [story.args], 1)
    with pytest.raises(ValueError, match="simulations must not be negative"):
        diagnose(story.program, guide, [story.args], simulations=-1)
    with pytest.raises(TypeError, match="must be a tuple of the program's arguments"):
        diagnose(story.program, guide, ["ab"])  # type: ignore[list-item]
