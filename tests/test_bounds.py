"""bounds(): brackets of log Z and of both divergences on simulated observations, against enumeration."""

from __future__ import annotations

import importlib

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story, kl
from test_objectives import perturbed

from llmppl.diagnostics import Bounds, bounds
from llmppl.guides import AutoregressiveGuide, GFlowNetGuide
from llmppl.programs.observations import observing
from llmppl.programs.particles import run_particles
from llmppl.programs.simulation import simulate
from llmppl.programs.structure import structure

ROWS = 1500


def exact(story: Story, guide: AutoregressiveGuide) -> tuple[float, float, float]:
    """Mean over the program's own one-token endings of log Z, KL(q‖p) and KL(p‖q)."""
    texts, _ = story.joint()
    total = np.zeros(3)
    for ending in story.lm(story.beginning, max_tokens=1).enumerate_support():
        joint = story.prior().log_prob(texts) + story.lm(story.beginning, texts).log_prob(ending)
        log_z = joint.logsumexp(0)
        fn = structure(guide, story.args, {"observations": {"ending": ending}}).nodes["middle"]["fn"]
        log_q = fn.log_prob(texts).detach()
        row = np.array([float(log_z), kl(log_q, joint - log_z), kl(joint - log_z, log_q)])
        total += float(log_z.exp()) * row
    return tuple(total)


def simulated(
    story: Story, guide: AutoregressiveGuide, num_samples: int, method: str = "importance", rows: int = ROWS
) -> Bounds:
    run = bounds(story.program, guide, num_samples, vectorize_data=True, method=method)
    return run([story.beginning] * rows, [story.ending] * rows)


@pytest.mark.long
def test_the_brackets_contain_the_enumerated_values_and_close_with_more_samples(story: Story) -> None:
    """In expectation, so up to 3 standard errors over 1500 simulated endings (0.1 nats each at most)."""
    story.ending = "c"
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2), 0.08)
    log_z, kl_q_p, kl_p_q = exact(story, guide)
    assert min(kl_q_p, kl_p_q) > 0.3
    widths = []
    for num_samples in (2, 8, 32):
        found = simulated(story, guide, num_samples)
        brackets = (found.log_evidence, found.kl_q_p, found.kl_p_q)
        for (low, high), truth in zip(brackets, (log_z, kl_q_p, kl_p_q), strict=True):
            assert max(low.error, high.error) < 0.1
            assert low.value - 3 * low.error < truth < high.value + 3 * high.error
        assert found.kl_sum.value == pytest.approx(kl_q_p + kl_p_q, abs=3 * found.kl_sum.error)
        widths.append(found.log_evidence[1].value - found.log_evidence[0].value)
    assert widths[0] > widths[1] > widths[2] > -0.02
    # With two samples the bracket is wide: nothing above holds by accident.
    assert widths[0] > 0.3
    assert widths[2] < 0.25 * widths[0]


def test_each_bound_is_on_its_side_beyond_the_error(story: Story) -> None:
    story.ending = "c"
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2), 0.08)
    log_z, _, _ = exact(story, guide)
    low, high = simulated(story, guide, 2).log_evidence
    assert low.value + 3 * low.error < log_z < high.value - 3 * high.error


@pytest.mark.long
@pytest.mark.parametrize("targets", ["prefixes", "flows"])
def test_bounds_by_smc_bracket_log_z_and_are_each_on_their_side(
    story: Story, targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The retained particle is in every generation; beyond 3 standard errors on both sides with 3 particles."""
    module = importlib.import_module("llmppl.inference.bounds")

    # Resample wherever weights differ: with few looks the filter would be importance sampling.
    def always(stages: object, _: object, resampling: str, *rest: object) -> object:
        return Population(stages, targets, resampling, 1.0, 1, rest[-1])

    Population = module.Population
    monkeypatch.setattr(module, "Population", always)
    story.ending = "c"
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2), 0.08)
    log_z, _, _ = exact(story, guide)
    found = simulated(story, guide, 3, "smc", rows=500)
    low, high = found.log_evidence
    assert low.value + 3 * low.error < log_z < high.value - 3 * high.error
    assert max(low.error, high.error) < 0.15
    more = simulated(story, guide, 12, "smc", rows=250)
    narrow = [end.value for end in more.log_evidence if end is not None]
    assert narrow[1] - narrow[0] < high.value - low.value
    assert "12 samples each by SMC" in repr(more)


def test_of_observations_as_given_there_is_a_lower_bound_only(story: Story) -> None:
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2), 0.05)
    run = bounds(story.program, guide, 200, simulations=0, vectorize_data=True)
    found = run([story.beginning] * 40, [story.ending] * 40)
    log_z = float(story.joint()[1].logsumexp(0))
    low, high = found.log_evidence
    assert high is None
    assert low.value < log_z + 3 * low.error
    assert found.kl_q_p[0].value == pytest.approx(low.value - found.elbo.mean())
    assert "No upper bound: it needs an exact posterior draw" in repr(found)
    with pytest.raises(ValueError, match="kl_p_q needs an exact posterior draw"):
        _ = found.kl_p_q
    assert Bounds.join([found, found]).upper is None


def test_weights_at_a_simulated_observation_average_to_its_evidence(story: Story) -> None:
    """4 standard errors of 20 000 weights, 2 % each."""
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2), 0.1)
    latents, observations = simulate(story.program, story.args, {})
    assert latents["middle"].shape == (3,)
    ending = observations["ending"]
    assert story.lm.decode(ending) != story.ending
    joint = story.joint(ending=story.lm.decode(ending))[1]
    with torch.no_grad():
        weights = run_particles(*observing(story.program, guide, observations), story.args, {}, 20_000).log_weights
    relative = (weights - joint.logsumexp(0)).exp()
    error = float(relative.std() / len(relative) ** 0.5)
    assert error < 0.03
    assert float(relative.mean()) == pytest.approx(1.0, abs=4 * error)


def test_simulated_pairs_follow_the_program(story: Story) -> None:
    """Frequencies of 1500 one-token endings within 4 standard errors of the enumerated marginal."""
    from llmppl.programs.plates import in_data_plate

    rows = ([story.beginning] * ROWS, ["c"] * ROWS)
    latents, observations = simulate(in_data_plate(story.program), rows, {})
    assert latents["middle"].shape == (ROWS, 3)
    texts, _ = story.joint()
    for ending in story.lm(story.beginning, max_tokens=1).enumerate_support():
        joint = story.prior().log_prob(texts) + story.lm(story.beginning, texts).log_prob(ending)
        p = float(joint.logsumexp(0).exp())
        seen = float((observations["ending"] == ending).all(-1).double().mean())
        assert seen == pytest.approx(p, abs=4 * (p * (1 - p) / ROWS) ** 0.5)


def test_a_guide_told_of_other_observations_tells_its_log_partition(story: Story) -> None:
    guide = GFlowNetGuide(story.program, story.lm, rank=2)
    with torch.no_grad():
        guide.head.weight.normal_()
    observations = {"ending": story.lm.encode("ee")}
    _, told = observing(story.program, guide, observations)
    torch.testing.assert_close(told.log_partition("ab", "cd"), guide.log_partition("ab", "ee"))


def test_the_bracket_is_a_point_where_the_guide_is_the_posterior(lm: object) -> None:
    def model(seen: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=seen)

    def guide(seen: torch.Tensor, observations: dict | None = None) -> None:
        seen = seen if observations is None else observations["x"]
        pyro.sample("z", dist.Normal(seen / 2, 0.5**0.5))

    found = bounds(model, guide, 4, simulations=50)(torch.tensor(0.3))
    assert found.lower.shape == (50,)
    np.testing.assert_allclose(found.lower, found.upper, atol=1e-4)
    assert abs(found.kl_sum.value) < 1e-4
    assert repr(found).startswith("Bounds(50 simulated observations, 4 samples each: log Z -")


def test_what_cannot_be_simulated_is_named(story: Story) -> None:
    def factored(beginning: str, ending: str) -> None:
        story.program(beginning, ending)
        pyro.factor("verifier", torch.tensor(0.0))

    guide = AutoregressiveGuide(factored, story.lm, rank=2)
    with pytest.raises(ValueError, match="factor 'verifier': simulated observations are asked for"):
        bounds(factored, guide, 4)(*story.args)

    def deaf(beginning: str, ending: str) -> None:
        guide(beginning, ending)

    with pytest.raises(TypeError, match="takes no observations="):
        bounds(story.program, deaf, 4)(*story.args)
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        bounds(story.program, guide, 1)
    with pytest.raises(ValueError, match="simulations must not be negative"):
        bounds(story.program, guide, 2, simulations=-1)
    with pytest.raises(ValueError, match="method='mcmc' must be one of"):
        bounds(story.program, guide, 2, method="mcmc")
    guide.exactness = "extended"
    with pytest.raises(ValueError, match="exactness 'extended'"):
        bounds(story.program, guide, 2)
