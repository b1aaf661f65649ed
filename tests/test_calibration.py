"""calibrate() and expected_coverage(): level for exact posteriors, power against planted errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story
from scipy import stats
from test_objectives import perturbed
from torch import Tensor
from torch.distributions import constraints

from llmppl import LM, calibrate, exact_posterior, expected_coverage, importance
from llmppl.diagnostics import Calibration
from llmppl.diagnostics import calibration as module
from llmppl.diagnostics.uniformity import ecdf_band, uniformity_p_value
from llmppl.guides import AutoregressiveGuide, PromptGuide

Reshape = Callable[[Tensor], Tensor]


class Table(pyro.distributions.TorchDistribution):
    """A finite distribution over given texts: a guide of any shape, −inf where it does not go."""

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, texts: Tensor, logits: Tensor) -> None:
        self.texts, self.logits = texts, logits.log_softmax(-1)
        super().__init__(logits.shape[:-1], texts.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: object = None) -> Table:
        return Table(self.texts, self.logits.expand(torch.Size(batch_shape) + self.logits.shape[-1:]))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        cumulative = self.logits.exp().cumsum(-1).expand(torch.Size(sample_shape) + self.logits.shape).contiguous()
        uniform = torch.rand(cumulative.shape[:-1], dtype=cumulative.dtype) * cumulative[..., -1]
        return self.texts[torch.searchsorted(cumulative, uniform[..., None], right=True)[..., 0]]

    def log_prob(self, value: Tensor) -> Tensor:
        place = 7 ** torch.arange(self.texts.shape[-1])  # six tokens and padding
        row = torch.zeros(7 ** self.texts.shape[-1], dtype=torch.long)
        row[((self.texts + 1) * place).sum(-1)] = torch.arange(len(self.texts))
        index = row[((value + 1) * place).sum(-1)]
        shape = torch.broadcast_shapes(index.shape, self.batch_shape)
        logits = self.logits.expand(shape + self.logits.shape[-1:])
        return logits.gather(-1, index.expand(shape)[..., None])[..., 0]


def table_guide(story: Story, change: Reshape = lambda logits: logits) -> Callable[..., None]:
    """The exact posterior of any two-token ending as a guide, its logits ``(..., 156)`` changed."""
    texts, _ = story.joint()
    endings = story.lm(story.beginning, max_tokens=2).enumerate_support()
    with torch.no_grad():
        likelihood = story.lm(story.beginning, texts[:, None]).log_prob(endings)
        table = change((story.prior().log_prob(texts)[:, None] + likelihood).T.log_softmax(-1))

    def guide(beginning: Any, ending: Any, observations: dict[str, Tensor] | None = None) -> None:
        told = story.lm.encode(ending) if observations is None else observations["ending"]
        index = (told[..., None, :] == endings).all(-1).long().argmax(-1)
        pyro.sample("middle", Table(texts, table[index]))

    return guide


def without_mass(share: float, floor: float = -math.inf) -> Reshape:
    """Take texts, heaviest first, that together have at most ``share`` of the mass, out of a posterior.

    :param floor: what is left of their log-probability.
    """

    def change(logits: Tensor) -> Tensor:
        changed = logits.clone()
        for row in changed.reshape(-1, logits.shape[-1]):
            taken = 0.0
            for n in row.argsort(descending=True).tolist():
                if taken + float(row[n].exp()) <= share:
                    taken += float(row[n].exp())
                    row[n] = floor
        return changed

    return change


def pairs(story: Story, guide: Callable[..., Any], count: int, **options: Any) -> Calibration:
    run = calibrate(story.program, guide, vectorize_data=True, simulations=1, progress=False, **options)
    return run([story.beginning] * count, [story.ending] * count)


def test_the_exact_posterior_is_rejected_no_more_often_than_the_level_says(story: Story) -> None:
    """20 seeds, 5 % each: more than 4 rejections have probability 0.3 %. Here 20 draws for 100 pairs."""
    guide = table_guide(story)
    drawn = [pairs(story, guide, 100, num_draws=20, seed=seed) for seed in range(20)]
    assert sum(not found.passed for found in drawn) <= 4
    # All together, with 20 times the pairs of each: a bias that one run is too small to see.
    assert all(Calibration.join(drawn).p_value(name) > 0.001 for name in drawn[0].names)


def test_a_guide_that_lacks_a_tenth_of_the_posterior_is_rejected_by_log_q(story: Story) -> None:
    """Power of at least 0.9 over 20 fixed seeds with 20 draws and 300 pairs."""
    guide = table_guide(story, without_mass(0.1))
    found = [pairs(story, guide, 300, num_draws=20, seed=seed) for seed in range(20)]
    by = {name: sum(name in each.rejected for each in found) for name in found[0].names}
    assert by["log q(z|x)"] >= 18
    assert by["length of middle"] <= 4
    assert by["log p(x,z)"] <= 12
    assert np.isfinite(np.concatenate(list(found[0].ranks.values()))).all()


def test_importance_weights_and_samplers_of_posteriors_are_calibrated_where_the_guide_is_not(story: Story) -> None:
    """200 pairs each; p-values of correct samplers above 0.005, those of the guide's own draws far below."""
    guide = table_guide(story, lambda logits: 0.3 * logits)
    options: dict[str, Any] = {"num_draws": 15, "functionals": {"first token": lambda z, x: z["middle"][..., 0]}}
    assert "log q(z|x)" in pairs(story, guide, 200, **options).rejected
    exact = pairs(story, guide, 200, sampler=lambda model, _: exact_posterior(model), **options)
    assert min(map(exact.p_value, exact.names)) > 0.005
    many = pairs(story, guide, 200, sampler=lambda model, guide: importance(model, guide, 200), **options)
    assert min(map(many.p_value, many.names)) > 0.005
    weighted = pairs(story, guide, 100, num_draws=7, sampler="importance")
    assert weighted.num_draws == 7
    assert weighted.passed


def test_ranks_of_equal_values_are_uniform_whatever_share_of_draws_is_equal(story: Story) -> None:
    """Ties with the truth are broken at random: a functional of two values, exact posterior, 2000 pairs."""
    guide = table_guide(story)
    found = pairs(story, guide, 2000, num_draws=4, functionals={"starts": lambda z, x: z["middle"][..., 0] == 0})
    assert stats.kstest(found.ranks["starts"], "uniform").pvalue > 0.001
    assert stats.kstest(found.ranks["length of middle"], "uniform").pvalue > 0.001


def test_texts_scored_in_two_passes_are_ties_all_the_same(story: Story) -> None:
    """The guide's recorded log q is off by 1e-9 where it draws, as rounding is: no rank may notice."""
    guide = table_guide(story)
    original = Table.log_prob
    noisy = lambda self, value: original(self, value) + (1e-9 if value.shape[0] > 1 else 0.0)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Table, "log_prob", noisy)
        found = pairs(story, guide, 600, num_draws=15)
    assert found.p_value("log q(z|x)") > 0.005


def choosing(lm: LM) -> Callable[[str], None]:
    def program(ending: str) -> None:
        plan = pyro.sample("plan", lm.choice("ab", options=["c", "de", ".", "ea"]))
        pyro.sample("ending", lm("ab", plan), obs=lm.encode(ending))

    return program


def choice_guide(lm: LM, heat: float = 1.0) -> Callable[..., None]:
    """The exact posterior of the plan given any one-token ending, at a temperature."""
    options = lm.encode(["c", "de", ".", "ea"])
    endings = lm("ab", max_tokens=1).enumerate_support()
    with torch.no_grad():
        prior = lm.choice("ab", options=["c", "de", ".", "ea"]).logits
        table = (prior + lm("ab", options).log_prob(endings[:, None])) / heat

    def guide(ending: Any, observations: dict[str, Tensor] | None = None) -> None:
        told = lm.encode(ending) if observations is None else observations["ending"]
        index = (told[..., None, :1] == endings).all(-1).long().argmax(-1)
        pyro.sample("plan", Finite(options, table[index]))

    return guide


class Finite(Table):
    """A table that says that it is finite."""

    has_enumerate_support = True

    def expand(self, batch_shape: Any, _instance: object = None) -> Finite:
        return Finite(self.texts, self.logits.expand(torch.Size(batch_shape) + self.logits.shape[-1:]))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        texts = self.texts.reshape((len(self.texts),) + (1,) * len(self.batch_shape) + (-1,))
        return texts.expand((-1, *self.batch_shape, -1)) if expand else texts

    def log_prob(self, value: Tensor) -> Tensor:
        index = (value[..., None, :] == self.texts).all(-1).long().argmax(-1)
        shape = torch.broadcast_shapes(index.shape, self.batch_shape)
        return self.logits.expand(shape + (-1,)).gather(-1, index.expand(shape)[..., None])[..., 0]


def covered(lm: LM, guide: Callable[..., None], count: int, **options: Any) -> Calibration:
    run = expected_coverage(choosing(lm), guide, simulations=1, vectorize_data=True, **options)
    return run(["c"] * count)


def test_credible_sets_of_choices_cover_as_often_as_they_say(lm: LM) -> None:
    """Exactly at every level, by the border option's randomisation: 3000 pairs, 4 standard errors of 1 % or less."""
    found = covered(lm, choice_guide(lm), 3000)
    assert found.passed
    for each in found.coverage("plan", (0.1, 0.5, 0.8, 0.95)):
        assert each.coverage == pytest.approx(each.level, abs=4 * (each.level * (1 - each.level) / 3000) ** 0.5)
        assert each.lower < each.coverage < each.upper
    assert stats.kstest(found.ranks["credibility of plan"], "uniform").pvalue > 0.001


def test_credible_sets_of_an_overconfident_guide_cover_too_rarely(lm: LM) -> None:
    sharp = covered(lm, choice_guide(lm, heat=0.3), 400)
    assert not sharp.passed
    assert sharp.coverage("plan", [0.8])[0].upper < 0.8
    wide = covered(lm, choice_guide(lm, heat=4.0), 400)
    assert not wide.passed
    assert wide.coverage("plan", [0.8])[0].lower > 0.8
    with_draws = calibrate(choosing(lm), choice_guide(lm, heat=0.3), 7, 1, vectorize_data=True)(["c"] * 400)
    assert with_draws.names == ("log p(x,z)", "log q(z|x)", "credibility of plan")
    assert "credibility of plan" in with_draws.rejected


def test_a_guided_language_model_has_choices_and_texts_calibrated_together(lm: LM) -> None:
    """The prior as a guide, with nothing observed to tell it apart: calibrated in every functional."""

    def program(letter: Tensor) -> None:
        plan = pyro.sample("plan", lm.choice("ab", options=["c", "de", "."]))
        with pyro.plate("parts", 2, dim=-2):
            pyro.sample("part", lm("ab", plan, max_tokens=2, stop="."))
        pyro.sample("seen", dist.Normal(0.0, 1.0), obs=letter)

    guide = PromptGuide(program, lm, {"plan": lambda: ["ab"], "part": lambda plan: ["ab", plan]})
    run = calibrate(program, guide, 7, 1, vectorize_data=True)
    found = run(torch.zeros(200))
    assert found.names == ("length of part", "log p(x,z)", "log q(z|x)", "credibility of plan")
    assert found.simulations == 200
    assert min(map(found.p_value, found.names)) > 0.005
    drawn = calibrate(program, guide, 7, 1, vectorize_data=True, sampler=lambda m, g: importance(m, g, 7))
    again = drawn(torch.zeros(200))
    assert min(map(again.p_value, again.names)) > 0.005


def test_the_band_is_that_of_uniform_numbers_and_agrees_with_the_p_value() -> None:
    """Frequency of leaving it over 4000 trials within 4 standard errors (1.4 %) of its exact probability."""
    generator = np.random.default_rng(0)
    for count, num_points in ((8, 17), (60, 21), (200, 64)):
        points, low, high = ecdf_band(count, num_points, 0.95)
        values = generator.random((4000, count))
        seen = (values[:, None, :] <= points[:, None]).mean(-1)
        outside = ((seen < low) | (seen > high)).any(-1)
        p_values = np.array([uniformity_p_value(row, num_points) for row in values[:400]])
        np.testing.assert_array_equal(p_values <= 0.05, outside[:400])
        assert 0.02 < outside.mean() < 0.05 + 4 * (0.05 * 0.95 / 4000) ** 0.5
        for share in (0.1, 0.5):
            assert np.mean(p_values <= share) < share + 4 * (share * (1 - share) / 400) ** 0.5
    # Two numbers on one side of 1/2: so far out are the counts 0 and 2, of probability 1/4 each.
    assert uniformity_p_value(np.array([0.01, 0.02]), 2) == pytest.approx(0.5)
    assert uniformity_p_value(np.array([0.01, 0.7]), 2) == pytest.approx(1.0)


def test_calls_join_and_reproduce_from_a_seed(story: Story) -> None:
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2), 0.05)
    before = torch.get_rng_state()
    runs = []
    for _ in range(2):
        run = calibrate(story.program, guide, 5, simulations=3, seed=3)
        runs.append([run(*story.args), run(*story.args)])
    assert torch.equal(before, torch.get_rng_state())
    (first, second), (again, _) = runs
    np.testing.assert_array_equal(first.ranks["log q(z|x)"], again.ranks["log q(z|x)"])
    assert not np.array_equal(first.ranks["log q(z|x)"], second.ranks["log q(z|x)"])
    joined = Calibration.join([first, second])
    assert joined.simulations == 6
    assert repr(joined).startswith("Calibration(6 simulated pairs, 5 draws each: ")
    with pytest.raises(ValueError, match="cannot be joined"):
        Calibration.join([first, calibrate(story.program, guide, 4, 1)(*story.args)])


def test_bad_input_is_named(story: Story) -> None:
    guide = table_guide(story)
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        calibrate(story.program, guide, 0)
    with pytest.raises(ValueError, match="simulations must be at least 1"):
        calibrate(story.program, guide, simulations=0)
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        calibrate(story.program, guide, level=95)
    with pytest.raises(ValueError, match="sampler='smc' must be 'guide', 'importance'"):
        calibrate(story.program, guide, sampler="smc")
    with pytest.raises(ValueError, match=r"functional 'x' returned shape \(3,\)"):
        calibrate(story.program, guide, 3, 1, {"x": lambda z, x: torch.zeros(3)}, vectorize_data=True)(["ab"], ["cd"])
    with pytest.raises(ValueError, match="functional 'x' is NaN"):
        calibrate(story.program, guide, 3, 1, {"x": lambda z, x: torch.full((3,), math.nan)})(*story.args)
    with pytest.raises(ValueError, match="is measured already"):
        calibrate(story.program, guide, 3, 1, {"log p(x,z)": lambda z, x: torch.zeros(3)})(*story.args)
    with pytest.raises(ValueError, match="needs a latent site of finitely many options"):
        expected_coverage(story.program, guide, 1)(*story.args)
    with pytest.raises(KeyError, match="no functional 'length'"):
        calibrate(story.program, guide, 3, 1)(*story.args).band("length")

    def factored(beginning: str, ending: str) -> None:
        story.program(beginning, ending)
        pyro.factor("verifier", torch.tensor(0.0))

    with pytest.raises(ValueError, match="factor 'verifier': simulated observations are asked for"):
        calibrate(factored, guide, 3, 1)(*story.args)
    guide.exactness = "extended"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="exactness 'extended'"):
        calibrate(story.program, guide)
    assert module.call_seed(0, 1) != module.call_seed(1, 0)
