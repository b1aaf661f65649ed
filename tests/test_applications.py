"""Programs whose text is a formula or a piece of code."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from conftest import character_lm
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

from llmppl import LM, Grammar, exact_posterior, fit, importance
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.inference.simulated_pairs import score_given
from llmppl.models import completion, evaluate, formula, run
from llmppl.models.formula import OPERANDS, noise_given, points_listed, points_told, unexplained
from llmppl.objectives import TrajectoryBalance, WakeSleep

# --- code ----------------------------------------------------------------------------------------

CODE = "def f(x):\n return+*1234567890o'"


def test_completion_is_prior_suffix_and_tests() -> None:
    """Every body of two characters, by hand: what passes all tests, one, or none."""
    lm = character_lm(CODE)
    program = completion(lm, ["f(1)", "f(2)"], max_tokens=2, stop="\n", mistake=0.01)
    prefix, suffix, outputs = "def f(x):\n return 1", "*x", ["11", "22"]
    posterior = exact_posterior(program)(prefix, suffix, *outputs)
    law = lm(prefix, max_tokens=2, stop="\n")
    texts = law.enumerate_support()
    likelihood = lm(prefix, texts).log_prob(lm.encode(suffix))
    passed = np.array(
        [
            [run(prefix + t + suffix, c) == o for c, o in zip(["f(1)", "f(2)"], outputs, strict=True)]
            for t in lm.decode(texts)
        ]
    )
    assert {tuple(row) for row in passed} >= {(True, True), (False, False)}
    wrong = 0.01 / 33 * lm.vocabulary**-2.0  # any text of two characters, of 32 at most
    tests = torch.as_tensor(np.where(passed, math.log(0.99 + wrong), math.log(wrong)).sum(1))
    log_joint = law.log_prob(texts) + likelihood + tests
    assert posterior.log_evidence == pytest.approx(float(log_joint.logsumexp(0)), abs=1e-5)
    assert "11" in posterior.decode("got_1")
    spaced = exact_posterior(program)(prefix, suffix, " 11", "22\n")
    assert spaced.log_evidence == posterior.log_evidence, "the space around an output does not count"
    best = posterior.top("body", 1)[0][0]
    assert run(prefix + best + suffix, "f(2)") == "22"


def test_a_completion_without_suffix_is_one_with_an_empty_suffix() -> None:
    lm = character_lm(CODE)
    program = completion(lm, ["f(1)"], max_tokens=2, stop="\n", mistake=0.01)
    prefix = "def f(x):\n return 1"
    none, empty = (exact_posterior(program)(prefix, suffix, "1") for suffix in (None, ""))
    assert none.log_evidence == empty.log_evidence
    assert none.decode("got_1") == empty.decode("got_1")
    told = exact_posterior(program)(prefix, "*x", "11").log_evidence
    assert exact_posterior(program)(prefix, lm.encode("*x"), "11").log_evidence == told, "a suffix may be a text tensor"


def test_completions_on_the_real_model(smollm2: LM) -> None:
    program = completion(smollm2, ["double(2)", "double(5)"], max_tokens=12)
    pyro.set_rng_seed(0)
    guide = PromptGuide(program, smollm2, prompt={"body": lambda prefix: [prefix]})
    posterior = importance(program, guide, 24)("def double(x):\n    return", "", "4", "10")
    # Which of the right texts are drawn is the processor's affair; hardly any weight may lie on others.
    found = posterior.top("body", 24)
    right = [weight for body, weight in found if run("def double(x):\n    return" + body, "double(7)") == "14"]
    assert right
    assert right[0] == found[0][1]
    assert sum(right) > 0.9


@pytest.mark.parametrize(
    ("calls", "keywords", "outputs", "message"),
    [
        ([], {}, [], "must be a list of expressions"),
        (["f(1)"], {"mistake": 0.0}, ["1"], "between 0 and 1"),
        (["f(1)"], {}, ["1", "2"], "2 outputs of 1 calls"),
    ],
)
def test_completions_that_make_no_sense(calls: Any, keywords: Any, outputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        completion(character_lm(CODE), calls, **keywords)("def f(x):\n return 1", "", *outputs)


def test_calls_that_are_one_string() -> None:
    with pytest.raises(TypeError, match=r"calls must be a list of strings, got 'f\(1\)'"):
        completion(character_lm(CODE), "f(1)")


# --- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("2 * x + 1", 7.0), (" x / 2 - -1", 2.5), ("sin(x) + cos(x)", math.sin(3) + math.cos(3)), ("x", 3.0)],
)
def test_formulas_are_evaluated(text: str, value: float) -> None:
    assert evaluate(text, 3.0) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "y",
        "x.real",
        "1 / 0",
        "log(0 - x)",
        "exp(exp(exp(x)))",
        "sin(x, x)",
        "x ** 9",
        "[x]",
        "f(x)",
        "1e999",
        "x if x else 1",
    ]
    + ["(" * 300, "-" * 5000 + "x", "__import__('os')", "sin", "sin()", "sin(*[x])", "x = 1", "nan"],
)
def test_what_has_no_value_is_far_from_all_data(text: str) -> None:
    assert evaluate(text, 3.0) == 1e6


FORMS = Grammar.regex(r"[x12]([+*][x12])?")


def test_formulas_are_explained_exactly() -> None:
    """Given the noise, the posterior over 21 formulas is enumerated, and that over both is bounded by it."""
    lm = character_lm("The data follow the formula y =x12+*.", ".")
    program = formula(lm, grammar=FORMS, max_tokens=4)
    x = torch.linspace(-1, 2, 5)
    y = x + 1 + 0.1 * torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5])
    given = poutine.condition(program, data={"noise": torch.tensor(0.2)})
    posterior = exact_posterior(given)(x, y)
    texts = sorted(set(posterior.decode("formula")))
    log_likelihood = {
        t: float(
            torch.distributions.Normal(torch.tensor([evaluate(t.removesuffix("."), float(v)) for v in x]), 0.2)
            .log_prob(y)
            .sum()
        )
        for t in texts
    }
    prior = exact_posterior(
        lambda: pyro.sample("f", lm("The data follow the formula y =", grammar=FORMS, max_tokens=4))
    )()
    by_text = dict(zip(prior.decode("f"), np.log(prior.weights), strict=True))
    noise = float(torch.distributions.LogNormal(math.log(0.3), 0.5).log_prob(torch.tensor(0.2)))
    expected = np.logaddexp.reduce([by_text[t] + log_likelihood[t] for t in texts]) + noise
    assert posterior.log_evidence == pytest.approx(expected, abs=1e-4)
    assert {posterior.top("formula", 2)[n][0].rstrip(".") for n in (0, 1)} == {"x+1", "1+x"}


@pytest.mark.long
def test_formula_and_noise_are_proposed_together() -> None:
    """A text guide with an AutoGuide for the noise, trained; its log Ẑ is that of a sum over formulas and a grid of
    noises."""
    lm = character_lm("The data follow the formula y =x12+*.:;f()-0 D\n", ".")
    program = formula(lm, grammar=FORMS, max_tokens=4)
    x = torch.linspace(-1, 2, 5)
    y = 2 * x + 0.2 * torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5])
    others = AutoNormal(poutine.block(program, hide=["formula"]), init_scale=0.3)
    guide = AutoregressiveGuide(program, lm, others=others, rank=4, seed=0)
    pyro.set_rng_seed(0)
    fit(program, guide, [(x, y)], TrajectoryBalance(16), 80, learning_rate=2e-2, seed=0, progress=False)
    posterior = importance(program, guide, 500)(x, y)
    prior = exact_posterior(
        lambda: pyro.sample("f", lm("The data follow the formula y =", grammar=FORMS, max_tokens=4))
    )()
    grid = torch.linspace(0.02, 4.0, 400)[:, None]
    of_noise = torch.distributions.LogNormal(math.log(0.3), 0.5).log_prob(grid[:, 0])
    terms = []
    for text, weight in zip(prior.decode("f"), prior.weights, strict=True):
        mean = torch.tensor([evaluate(text.removesuffix("."), float(v)) for v in x])
        by_noise = of_noise + torch.distributions.Normal(mean, grid).log_prob(y).sum(-1)
        terms.append(math.log(weight) + float(by_noise.logsumexp(0)))
    exact = np.logaddexp.reduce(terms) + math.log(float(grid[1] - grid[0]))
    assert abs(posterior.log_evidence - exact) < 4 * posterior.log_evidence_error + 0.02
    assert posterior.ess > 50


def test_formulas_on_the_real_model_are_told_the_points(smollm2: LM) -> None:
    program = formula(smollm2, max_tokens=16)
    x = torch.tensor([0.0, 1.0, 2.0])
    others = AutoNormal(poutine.block(program, hide=["formula"]))
    guide = PromptGuide(program, smollm2, prompt={"formula": points_told(smollm2)}, others=others)
    pyro.set_rng_seed(0)
    posterior = importance(program, guide, 4)(x, torch.tensor([1.0, 2.0, 5.0]))
    assert np.isfinite(posterior.log_joint).all()
    context = poutine.trace(guide).get_trace(x, torch.tensor([1.0, 2.0, 5.0])).nodes["formula"]["fn"].context
    told = smollm2.decode(context.reshape(-1))
    assert told.startswith("Data: f(0.0) = 1.0; f(1.0) = 2.0; f(2.0) = 5.0;")


def test_noise_is_positive() -> None:
    with pytest.raises(ValueError, match="noise must be positive"):
        formula(character_lm("xy"), noise=0.0)


def test_a_small_grammar_is_enumerated_over_the_whole_vocabulary(smollm2: LM) -> None:
    """By what the grammar permits, not by all of 49,152 tokens at each place."""
    law = smollm2("y =", grammar=Grammar.regex(r" (x|2)( [+*] (x|2))?"), max_tokens=8)
    texts = law.enumerate_support()
    strings = {text.removesuffix(smollm2.spelling.end) for text in smollm2.decode(texts)}
    assert strings == {" x", " 2", *(f" {a} {o} {b}" for a in "x2" for o in "+*" for b in "x2")}
    assert len(texts) > len(strings)  # some are spelled in several ways
    assert float(law.log_prob(texts).exp().sum()) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="more than 1,000,000 texts"):
        smollm2("y =", grammar=Grammar.regex(r"[a-z ]*"), max_tokens=9).enumerate_support()


@pytest.mark.long
@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal])
def test_an_autoguide_beside_the_text_learns_asleep(kind: Any) -> None:
    """It draws on the real line and is given values of the program's: the noise's prior is what it learns, told
    nothing, and its density of given noises is that of a LogNormal."""
    lm = character_lm("ab.", ".")

    def program(y: Any) -> None:
        noise = pyro.sample("noise", pyro.distributions.LogNormal(1.0, 0.7))
        pyro.sample("text", lm("ab", max_tokens=2))
        pyro.sample("y", pyro.distributions.Normal(0.0, noise), obs=y)

    others = kind(poutine.block(program, hide=["text"]), init_scale=0.2)
    guide = AutoregressiveGuide(program, lm, others=others, rank=2, seed=0)
    args = (torch.tensor(1.0),)
    if kind is AutoDiagonalNormal:
        with pytest.raises(ValueError, match="draws all its sites as one, '_AutoDiagonalNormal_latent'"):
            fit(program, guide, [args], WakeSleep(4, insomnia=0.0), 1, progress=False)
        return
    fit(program, guide, [args], WakeSleep(64, insomnia=0.0), 150, learning_rate=5e-2, weight_decay=0.0, seed=0,
        schedule="cosine", progress=False)  # fmt: skip
    location, scale = float(others.locs.noise.detach()), float(others.scales.noise.detach())
    assert location == pytest.approx(1.0, abs=0.1)
    assert scale == pytest.approx(0.7, abs=0.1)
    noises, text = torch.tensor([0.5, 2.0, 3.0]), lm.encode(["ab", "ba", "aa"])
    particles = score_given(program, guide, args, {}, {"noise": noises, "text": text}, 3)
    own = poutine.trace(guide).get_trace(*args).nodes["text"]["fn"].log_prob(text)
    expected = torch.distributions.LogNormal(location, scale).log_prob(noises) + own
    torch.testing.assert_close(particles.log_q.detach(), expected.to(particles.log_q).detach(), rtol=0, atol=1e-5)


def test_what_half_a_formula_leaves_unexplained() -> None:
    x = [-1.0, 0.0, 1.0, 2.0, 3.0]
    features, y = unexplained(x), "-2.00 0.00 2.00 4.00 6.00"
    grid = torch.linspace(1e-3, 100.0, 1_000_000, dtype=torch.float64)
    of_noise = torch.distributions.LogNormal(math.log(0.3), 0.5).log_prob(grid)

    def cost(form: str) -> float:
        squares = sum((float(own) - evaluate(form, place)) ** 2 for own, place in zip(y.split(), x, strict=True))
        log_likelihood = -0.5 * squares / grid**2 - 5 * grid.log() - 2.5 * math.log(2 * math.pi)
        return -float((log_likelihood + of_noise).logsumexp(0)) - math.log(float(grid[1] - grid[0]))

    best = pytest.approx(cost("2 * x"), abs=0.02)
    assert features(y, " 2 * x") == [best, best], "−log p(y | formula)"
    assert features(y, " x")[0] == pytest.approx(cost("x"), abs=0.02)
    assert features(y, " x")[1] == features(y, "")[1] == features(y, " 2 *")[1] == best, "x + x, 2 * x"
    assert features(y, " 2 *")[0] == 24.0, "no formula yet"
    assert features(y, " 5 -") == [24.0, pytest.approx(min(cost(f"5 - {one}") for one in OPERANDS), abs=0.02)]
    for half in (" s", " si", " sin", " sin(", " sin(x"):
        assert features(y, half) == [24.0, features(y, " sin(x)")[1]], "what it may become"
    assert features(y, " 2 * ") == [24.0, pytest.approx(min(24.0, cost("2 * x") + 8, cost("2 * 1")), abs=0.02)]
    assert unexplained(x, signs="-")(y, " 2")[1] > features(y, " 2")[1]
    assert features("", " x") == [0.0, 0.0]
    lm = character_lm("0123456789.- ")
    told = lm.context(*points_listed(lm, 2)(torch.tensor([[1.0, -2.5], [0.0, 3.0]])))
    assert told.shape[:-1] == (2, 1), "a row for each of two simulations, outside the plate of the points"
    assert [lm.decode(row) for row in told[:, 0]] == ["1.00 -2.50", "0.00 3.00"]


@pytest.mark.parametrize(("form", "slope"), [("x", 1.0), ("x", 4.0), ("exp(x)", 1.0)])
def test_noise_is_proposed_by_what_a_formula_leaves(form: str, slope: float) -> None:
    """Of one formula, that fits or not, log Ẑ is the integral over the noise, and most draws count."""
    lm = character_lm("The data follow the formula y =ep()x.", ".")
    program = formula(lm, grammar=Grammar.regex(re.escape(form)), max_tokens=8)
    x = torch.linspace(-1, 2, 5)
    y = slope * x + 0.1 * torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5])
    guide = PromptGuide(program, lm, others=noise_given(lm))
    pyro.set_rng_seed(0)
    posterior = importance(program, guide, 400, progress=False)(x, y)
    given = poutine.condition(program, data={"noise": torch.tensor(0.5)})
    text = exact_posterior(given)(x, y)
    mean = torch.tensor([evaluate(form, float(v)) for v in x])

    def at(noise: Any) -> Any:
        likelihood = torch.distributions.Normal(mean, noise[..., None]).log_prob(y).sum(-1)
        return torch.distributions.LogNormal(math.log(0.3), 0.5).log_prob(noise) + likelihood

    grid = torch.linspace(0.005, 12.0, 8000, dtype=torch.float64)
    of_text = text.log_evidence - float(at(torch.tensor(0.5)))
    exact = of_text + float(at(grid).logsumexp(0)) + math.log(float(grid[1] - grid[0]))
    assert posterior.log_evidence == pytest.approx(exact, abs=4 * posterior.log_evidence_error)
    assert posterior.ess > 0.85 * 400


@pytest.mark.long
def test_numpyro_has_the_same_evidence_of_code_and_formulas(tmp_path: Path) -> None:
    from llmppl.numpyro import LM as Twin
    from llmppl.numpyro import exact_posterior as twin_posterior
    from llmppl.numpyro.models import completion as twin_completion
    from llmppl.numpyro.models import formula as twin_formula

    lm = character_lm(CODE + "Tahelowmuty=.", ".")
    lm.transformer.float().save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    twin = Twin.from_pretrained(tmp_path)
    args = ("def f(x):\n return 1", "*x", "11", "22")
    calls = ["f(1)", "f(2)"]
    ours = exact_posterior(completion(lm, calls, max_tokens=2, stop="\n"))(*args).log_evidence
    theirs = twin_posterior(twin_completion(twin, calls, max_tokens=2, stop="\n"))(*args).log_evidence
    assert theirs == pytest.approx(ours, abs=1e-3)
    form = {"prompt": "y =", "grammar": FORMS, "max_tokens": 4}
    x = torch.linspace(-1, 2, 5)
    ours = exact_posterior(poutine.condition(formula(lm, **form), data={"noise": torch.tensor(0.2)}))(x, x + 1)
    from numpyro import handlers

    given = handlers.condition(twin_formula(twin, **form), data={"noise": 0.2})
    theirs = twin_posterior(given)(np.asarray(x), np.asarray(x + 1)).log_evidence
    assert theirs == pytest.approx(float(ours.log_evidence), abs=1e-3)
