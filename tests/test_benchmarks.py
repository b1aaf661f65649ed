"""What the benchmarks compute from their runs, on the enumerable story."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import Story

from benchmarks import against_engines
from llmppl.guides import PromptGuide


def test_the_reference_ess_of_pooled_samples_is_the_exact_one(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against_engines, "MAX_TOKENS", 3)
    prompts = {"prior": lambda beginning, ending: [beginning], "prompt guide": lambda b, e: [e, b]}
    monkeypatch.setattr(against_engines, "PROMPTS", prompts)
    guides = {
        name: PromptGuide(
            story.program, story.lm, prompt={"middle": lambda beginning, ending, p=p: p(beginning, ending)}
        )
        for name, p in prompts.items()
    }
    runs = {name: against_engines.ours(guide, story.args, 2000, 0) for name, guide in guides.items()}
    found = against_engines.reference(story.lm, guides, story.args, runs)

    texts, exact_joint = story.joint()
    joint = exact_joint.numpy()
    evidence = np.logaddexp.reduce(joint)
    assert found.log_evidence == pytest.approx(evidence, abs=0.1)
    for name in guides:
        weights = joint - against_engines.log_density(story.lm, guides, name, story.args, texts)
        exact = np.exp(evidence - np.logaddexp.reduce(joint - evidence + weights))
        # Off by at most 31 % over five seeds.
        assert found.efficiency[name] == pytest.approx(exact, rel=0.35), name
    assert len({round(value, 3) for value in found.efficiency.values()}) == 2


def test_kish_ess_of_equal_weights_is_their_number_and_of_one_heavy_weight_one() -> None:
    assert against_engines.kish(np.full(8, -40.0)) == pytest.approx(8.0)
    assert against_engines.kish(np.array([0.0, -50.0, -60.0])) == pytest.approx(1.0)


def test_break_even_is_never_where_the_guide_costs_more() -> None:
    assert against_engines.break_even(100.0, other=1.0, guide=2.0, wanted=10) == "never"
    assert against_engines.break_even(100.0, other=2.0, guide=1.0, wanted=10) == "10"
