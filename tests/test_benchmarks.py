"""What the benchmarks compute from their runs, on the enumerable story."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Story

from benchmarks import against_engines
from llmppl import LM, exact_posterior
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.models import infilling
from llmppl.programs.structure import structure


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


def test_the_infilling_table_says_the_exact_divergences_of_each_guide(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a script it finds measure.py beside itself.
    monkeypatch.syspath_prepend(str(Path(against_engines.__file__).parent))
    benchmark = importlib.import_module("infilling_bounds")
    monkeypatch.setattr(benchmark, "PROMPT", "ab")
    setting = benchmark.Setting(2, 1, None)
    prompts = {"told": lambda end: [end, "ab"], "prior": lambda end: ["ab"]}
    text = benchmark.program(lm, setting)
    found = {}
    for name, prompt in prompts.items():
        guide = PromptGuide(text, lm, prompt={"missing": prompt})
        found[name] = [benchmark.measured(lm, setting, guide, samples=50, simulations=300, rows=150)]
        # Every chunk has pairs of its own; one chunk again and again would have 150 values.
        assert len(np.unique(found[name][0].lower.round(9))) > 200
    rows = benchmark._table(found, {name: [0] for name in found}, []).splitlines()

    prior = lm("ab", max_tokens=2)
    texts = prior.enumerate_support()
    ends = torch.arange(6)[:, None]
    joint = prior.log_prob(texts)[:, None] + lm("ab", texts[:, None]).log_prob(ends)  # (n, 6)
    log_p = joint.log_softmax(0)
    at = joint.logsumexp(0).exp()  # the law of the simulated ends
    for name, context in {"told": lm.context(ends, "ab"), "prior": lm.context("ab")}.items():
        log_q = prior.with_context(context, None).log_prob(texts[:, None]).expand(len(texts), 6)
        exact = [at @ (log_q.exp() * (log_q - log_p)).sum(0), at @ (log_p.exp() * (log_p - log_q)).sum(0)]
        cells = next(row for row in rows if row.startswith(f"| {name} ")).split("|")
        for cell, value in zip(cells[3:5], exact, strict=True):
            low, high, error = map(float, re.findall(r"-?[\d.]+", cell))
            # Three standard errors of the mean over simulated pairs, and the table's last digit.
            assert low - 3 * error - 0.01 <= value <= high + 3 * error + 0.01, (name, cell, float(value))
            assert high - low < 0.25, cell
            assert error < 0.15, cell


def test_the_regularisation_table_says_exact_gaps_of_training_and_of_other_observations(
    lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(against_engines.__file__).parent))
    benchmark = importlib.import_module("regularisation")
    contenders = benchmark.contenders
    story = infilling(lm, max_tokens=3)
    guide = AutoregressiveGuide(story, lm, rank=2, seed=0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    train = benchmark.drawn(lm, 3, seed=0, tokens=1)
    other = benchmark.drawn(lm, 20, seed=1, tokens=1, without=(train[0][1],))
    assert train[0] not in other
    assert len(other) == 20
    gaps = benchmark.exact_gaps(lm, guide, train)
    for observation, gap in zip(train, gaps, strict=True):
        exact = exact_posterior(story)(*observation)
        fn = structure(guide, observation, {}).nodes["middle"]["fn"]
        with torch.no_grad():
            log_q = fn.log_prob(torch.as_tensor(exact.samples["middle"])).numpy()
        elbo = (np.exp(log_q) * (exact.log_weights - log_q)).sum()
        assert gap == pytest.approx(float(exact.log_evidence) - elbo, abs=1e-9)
        assert gap > 0.01

    result = benchmark.Result
    found = {
        "none": [result(np.array([1.0, 2.0]), np.array([3.0]), 1.0), result(np.array([2.0]), np.array([5.0]), 3.0)],
        "one": [result(np.array([1.0]), np.array([2.5]), 2.0), result(np.array([2.0]), np.array([3.5]), 2.0)],
    }
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in benchmark.report(found).splitlines()[2:]]
    assert rows[0] == ["none", "1.75 ± 0.25", "4.00 ± 1.00", "", "2"]
    assert rows[1] == ["one", "1.50 ± 0.50", "3.00 ± 0.50", "-1.00 ± 0.50", "2"]

    monkeypatch.setattr(benchmark, "contenders", lambda options: dict(list(contenders(options).items())[-2:]))
    arguments = {"steps": 1, "seeds": 1, "train": 3, "held-out": 4, "particles": 2, "batch-size": 2, "rank": 1}
    options = benchmark.parser().parse_args([part for k, v in arguments.items() for part in (f"--{k}", str(v))])
    assert [row.split("|")[1].strip() for row in benchmark.compare(options).splitlines()[2:]] == [
        "simulated x 0.5",
        "all four",
    ]
