"""Programs that reason: rationales behind labels, expressions behind answers, and what is predicted from them."""

from __future__ import annotations

import ast
import re
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from conftest import character_lm

from llmppl import LM, decode, exact_posterior, fit, importance, predict
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.models import arithmetic, calculate, rationale
from llmppl.models.arithmetic import number_of_operators
from llmppl.objectives import TrajectoryBalance
from llmppl.testing import tiny_lm

# --- the calculator ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        (" 6 - 10 =", "-4"),
        ("6-10", "-4"),
        ("2 + 3 * 4 =", "14"),
        ("(2 + 3) * 4", "20"),
        ("2 × 3 ÷ 4", "1.5"),
        ("5 − 7", "-2"),
        ("1/3 + 2/3", "1"),
        ("1/3", "0.333333"),
        ("-3 - -4", "1"),
        ("0.1 + 0.2", "0.3"),
        ("999999999999 - 1", "999999999998"),
        ("6 =", "6"),
    ],
)
def test_the_calculator_calculates(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", "=", " ", ".", "?", "six - two", "5 5", "6 -", "((((1", "1 / 0", "0 / 0", "1 / (2 - 2)"),
        *("9" * 1000, "9" * 13, "999999 * 9999999", "1e9", "0x10", "1_000", "007", "3j", "2 ** 9", "10 // 3", "5 % 2"),
        *("(" * 60 + "1", "1" + "+1" * 40, "1 < 2", "1 if 2 else 3", "[1]", "(1, 2)", "f(1)", "a.b"),
        *("__import__('os').system('true')", "(lambda: 1)()", "1; 2", "1\n+ 2", "x := 3", "'6' - '2'", "True", "1\x00"),
        *("1 = 2 =", "６ - ２", "¹", "6 - 10 = -4,"),
    ],
)
def test_what_is_no_arithmetic_is_a_question_mark(expression: str) -> None:
    assert calculate(expression) == "?"


def test_the_calculator_never_executes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    monkeypatch.setattr("builtins.eval", lambda *a, **k: pytest.fail("eval"))
    monkeypatch.setattr("builtins.exec", lambda *a, **k: pytest.fail("exec"))
    real = ast.parse
    monkeypatch.setattr(ast, "parse", lambda *a, **k: parsed.append((a, k)) or real(*a, **k))
    assert calculate("6 - 2 =") == "4"
    assert all(keywords.get("mode") == "eval" for _, keywords in parsed)
    generator = np.random.default_rng(0)
    for _ in range(2000):  # whatever a model writes
        text = "".join(generator.choice(list("0123456789+-*/(). =e_x'\n"), generator.integers(0, 12)))
        result = calculate(text)
        assert result == "?" or np.isfinite(float(result)), text


@pytest.mark.parametrize(
    ("question", "steps"),
    [
        *[("6 - 0 - 4", 2), ("6-0-4", 2), ("6 - -2 + 1", 2), ("-5 + 2", 1), ("3 * (2 + 1)", 2), ("7", 0)],
        *[("What is -5 + 3?", 1), (" -5 + 3", 1), ("3 * - 2", 1), ("1.5+.5-2", 2), ("3. − .5", 1), ("-(3 + 4)", 1)],
        *[("2 - -(3+1)", 2), ("(1+2)-(3)", 2), ("2--3", 1), ("1 - + - 2", 1), ("((-3)) - 4", 1), ("8 ÷ 2 × 3", 2)],
        *[("How much is 2-1 (two - one)?", 1), ("- 3", 0), ("What is - 3?", 0), ("Subtract. - 3", 0), ("3 - ?", 0)],
    ],
)
def test_steps_are_the_operators_of_the_question(question: str, steps: int) -> None:
    assert number_of_operators(question) == steps


# --- the arithmetic program ------------------------------------------------------------------------

CHARACTERS = "0123456789+-=? ,.:\nQuestionAwrhl"


@pytest.fixture
def counting() -> LM:
    return character_lm(CHARACTERS)


def test_arithmetic_sums_over_its_expressions(counting: LM) -> None:
    """Every expression of two characters, by hand."""
    lm = counting
    posterior = exact_posterior(arithmetic(lm, max_tokens=2))("1 + 1", "2")
    prompt = "Question: 1 + 1 = ?\nAnswer:"
    law = lm(prompt, max_tokens=2, stop="=")
    texts = law.enumerate_support()
    results = [f" {calculate(text)}," for text in lm.decode(texts)]
    assert {" ?,", " 1,", " 9,"} <= set(results)
    likelihood = lm([prompt + t + r + " the answer is" for t, r in zip(lm.decode(texts), results, strict=True)])
    log_joint = law.log_prob(texts) + likelihood.log_prob(lm.encode(" 2."))
    assert posterior.log_evidence == pytest.approx(float(log_joint.logsumexp(0)), abs=1e-9)
    assert np.isfinite(posterior.log_joint).all()  # what the tool refuses is improbable, not impossible
    assert set(posterior.decode("result_1")) == set(results)


@pytest.mark.long
def test_arithmetic_is_amortized_and_learned(counting: LM) -> None:
    """A guide reaches the exact posterior over two expressions; EM raises the evidence."""
    theta = counting.adapt(rank=2, seed=0)
    allowed = counting.encode("123+-=")
    program = arithmetic(_Restricted(theta, allowed), max_tokens=2)  # type: ignore[arg-type]
    guide = AutoregressiveGuide(program, counting, rank=4, seed=1)
    theta.requires_grad_(False)
    fit(program, guide, [("1 + 2", "3")], TrajectoryBalance(16), 60, learning_rate=1e-2, seed=0, progress=False)
    exact = exact_posterior(program)("1 + 2", "3")
    pyro.set_rng_seed(0)
    posterior = importance(program, guide, 400)("1 + 2", "3")
    assert posterior.ess > 300
    assert abs(posterior.log_evidence - exact.log_evidence) < 5 * posterior.log_evidence_error + 1e-3
    theta.requires_grad_(True)
    fit(program, guide, [("1 + 2", "3")], TrajectoryBalance(8), 20, learning_rate=1e-2, seed=0, progress=False)
    assert exact_posterior(program)("1 + 2", "3").log_evidence > exact.log_evidence + 1.0


class _Restricted:
    """A language model whose bounded texts are written with a few tokens."""

    def __init__(self, lm: LM, allowed: torch.Tensor) -> None:
        self.lm, self.allowed = lm, allowed

    def __call__(self, *pieces: Any, **law: Any) -> Any:
        return self.lm(*pieces, **law, **({"allowed": self.allowed} if "max_tokens" in law else {}))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)


def test_arithmetic_on_the_real_model(smollm2: LM) -> None:
    """Worked examples make it solve: decoded, and observed in a plate."""
    examples = [("2 + 3 - 1", ["2 + 3", "5 - 1"], "4"), ("7 - 5 - 6", ["7 - 5", "2 - 6"], "-4")]
    program = arithmetic(smollm2, examples)
    questions = ["6 - 0 - 4", "9 + 4 - 8"]

    def batch(questions: list[str], answers: list[str] | None = None) -> Any:
        with pyro.plate("questions", len(questions)):
            return program(questions, answers)

    greedy = decode(program)("6 - 0 - 4")
    assert greedy.decode("expression_2") == [" 6 - 4 ="]
    assert greedy.decode("answer") == [" 2."]
    pyro.set_rng_seed(0)
    posterior = importance(batch, PromptGuide(batch, smollm2, prompt=_untold(examples)), 2)(questions, ["2", "5"])
    assert posterior.batch_shape == (2,)
    assert np.isfinite(posterior.log_joint).all()
    told = [result for row in posterior.decode("result_2") for result in row]
    assert all(result.startswith(" ") and result.endswith(",") for result in told)


def _untold(examples: Any) -> dict[str, Any]:
    shown = "".join(
        f"Question: {q} = ?\nAnswer:" + "".join(f" {e} = {calculate(e)}," for e in es) + f" the answer is {a}.\n\n"
        for q, es, a in examples
    )
    prompt = [shown + "Question: "]
    return {
        "expression_1": lambda questions: [*prompt, questions, " = ?\nAnswer:"],
        "expression_2": lambda questions, expression_1, result_1: [
            *prompt,
            questions,
            " = ?\nAnswer:",
            expression_1,
            result_1,
        ],
    }


@pytest.mark.parametrize(
    ("question", "keywords", "message"),
    [
        (["1 + 2", "1 + 2 + 3"], {}, "equally many steps"),
        ("seven", {}, "has no operator"),
        (torch.tensor([1, 2]), {}, "number of steps cannot be seen"),
        ("1 + 2", {"steps": 0}, "steps must be at least 1"),
    ],
)
def test_questions_that_say_no_number_of_steps(counting: LM, question: Any, keywords: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        arithmetic(counting, **keywords)(question, "3")


@pytest.mark.parametrize("expression", [" 3 + 4 =", "3 + 4=", "3 + 4 = 7"])
def test_examples_with_an_equals_sign_are_refused(counting: LM, expression: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(repr(expression))} has an equals sign.*Leave it out: '3 \+ 4'"):
        arithmetic(counting, examples=[("3 + 4", [expression], "7")])


def test_a_prompt_over_the_context_length_is_named(counting: LM) -> None:
    with pytest.raises(ValueError, match="128"):
        arithmetic(counting)(" + ".join("1" * 40), "40")


# --- the rationale program -------------------------------------------------------------------------

PLAIN: dict[str, Any] = {"before": "", "between": "", "max_tokens": 2}


def test_rationale_sums_over_its_rationales(lm: LM) -> None:
    program = rationale(lm, ["b", "cd"], **PLAIN)
    texts = lm("ab", max_tokens=2, stop=".").enumerate_support()
    log_prior = lm("ab", max_tokens=2, stop=".").log_prob(texts)
    for label in ("b", "cd"):
        log_label = lm.choice("ab", texts, options=["b", "cd"]).log_prob(lm.encode(label))
        posterior = exact_posterior(program)("ab", label)
        assert posterior.log_evidence == pytest.approx(float((log_prior + log_label).logsumexp(0)), abs=1e-9)


def test_predictions_average_over_the_rationales(lm: LM) -> None:
    program = rationale(lm, ["b", "cd"], **PLAIN)
    texts = lm("ab", max_tokens=2, stop=".").enumerate_support()
    prior = lm("ab", max_tokens=2, stop=".").log_prob(texts).exp()
    by_text = lm.choice("ab", texts, options=["b", "cd"]).logits.exp()
    exact = (prior[:, None] * by_text).sum(0).numpy()
    pyro.set_rng_seed(0)
    found = predict(program, "label", 4000)("ab")
    assert found.options == ["b", "cd"]
    assert found.error[0] == pytest.approx(
        float((prior * (by_text[:, 0] - exact[0]) ** 2).sum() / 4000) ** 0.5, rel=0.1
    )
    assert abs(found.probabilities[0] - exact[0]) < 4 * found.error[0]
    assert found.probabilities.sum() == pytest.approx(1.0)
    assert found.best == ["b", "cd"][int(exact.argmax())]
    # The mean of one rationale is another number, and so is that of the most probable one.
    assert abs(float(by_text[prior.argmax(), 0]) - exact[0]) > 0.01


def test_predictions_of_rows_and_of_a_guide(lm: LM) -> None:
    program = rationale(lm, ["b", "cd"], **PLAIN)
    theta = lm.adapt(rank=2, seed=0)
    with torch.no_grad():
        for parameter in theta.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    guide = PromptGuide(program, theta, prompt={"rationale": lambda text: [text]})
    pyro.set_rng_seed(0)
    rows = predict(program, "label", 3000, vectorize_data=True)(["ab", "ba", "aab"])
    other = predict(program, "label", 3000, guide=guide, vectorize_data=True)(["ab", "ba", "aab"])
    assert rows.probabilities.shape == (3, 2)
    assert len(rows.best) == 3
    texts = lm("ab", max_tokens=2, stop=".").enumerate_support()
    for n, text in enumerate(["ab", "ba", "aab"]):
        by_text = lm.choice(text, texts, options=["b", "cd"]).logits.exp()
        for found, drawing in ((rows, lm), (other, theta)):
            weights = drawing(text, max_tokens=2, stop=".").log_prob(texts).detach().exp()
            exact = float((weights * by_text[:, 0]).sum())
            assert abs(found.probabilities[n, 0] - exact) < 4.5 * found.error[n, 0] + 1e-4
    assert "3 rows" in repr(rows)


def test_predictions_that_cannot_be_made(lm: LM) -> None:
    program = rationale(lm, ["b", "cd"], **PLAIN)
    with pytest.raises(ValueError, match="no site of the program, which has"):
        predict(program, "lable")("ab")
    with pytest.raises(ValueError, match="cannot be listed"):
        predict(lambda: pyro.sample("x", pyro.distributions.Normal(0.0, 1.0)), "x")()
    with pytest.raises(ValueError, match="at least 1"):
        predict(program, "label", 0)


@pytest.mark.parametrize("label", ["d", ["b", "d"], 1])
def test_labels_that_are_no_option_are_refused(lm: LM, label: Any) -> None:
    program = rationale(lm, ["b", "cd"], **PLAIN)
    with pytest.raises((ValueError, TypeError), match="label"):
        program("ab" if isinstance(label, str) else ["ab", "ab"], label)


@pytest.mark.parametrize("options", [[" b", "b"], ["cd", "b", "cd "]])
def test_options_that_space_alone_tells_apart_are_refused(lm: LM, options: list[str]) -> None:
    with pytest.raises(ValueError, match=r"options '.*' and '.*' differ only by the space around them.*Keep one"):
        rationale(lm, options, **PLAIN)


def test_options_are_a_list() -> None:
    with pytest.raises(TypeError, match="Give a list"):
        rationale(tiny_lm(), "bc")


def test_rationales_on_the_real_model(smollm2: LM) -> None:
    program = rationale(
        smollm2,
        [" objective", " subjective"],
        examples=[("A boy finds a dog.", " tells what happens.", "objective")],
        max_tokens=6,
    )
    pyro.set_rng_seed(0)
    texts = ["A dull, lifeless film.", "Two brothers leave home to find work."]
    found = predict(program, "label", 4, vectorize_data=True)(texts)
    assert found.probabilities.shape == (2, 2)
    assert found.probabilities.sum(-1) == pytest.approx([1.0, 1.0])
    posterior = importance(program, PromptGuide(program, smollm2), 4, vectorize_data=True)(
        texts, ["subjective", " objective"]
    )
    assert np.isfinite(posterior.log_joint).all()
