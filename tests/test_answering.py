"""Answers by evidence and by draws, against enumeration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.distributions import Normal

from llmppl import LM, answer, predict
from llmppl.guides import AutoregressiveGuide

OPTIONS = ["a.", "b.", "cd."]


def asked(lm: LM) -> Any:
    """A question, a thought, and an answer that is drawn where none is given."""

    def program(question: Any, reply: Any = None) -> Any:
        thought = pyro.sample("thought", lm(question, max_tokens=2, stop="."))
        if reply is None:
            return pyro.sample("answer", lm(question, thought, max_tokens=3, stop="."))
        return pyro.sample("answer", lm(question, thought), obs=lm.encode(reply))

    return program


def exact(lm: LM, question: str, replies: list[str]) -> np.ndarray:
    """p(reply) by enumerating thoughts."""
    prior = lm(question, max_tokens=2, stop=".")
    thoughts = prior.enumerate_support()
    with torch.no_grad():
        log_p = prior.log_prob(thoughts)
        law = lm(question, thoughts, max_tokens=3, stop=".")
        found = [float((log_p + law.log_prob(lm.encode(reply))).logsumexp(0).exp()) for reply in replies]
    return np.array(found)


@pytest.mark.long
def test_options_have_the_share_of_their_evidence_with_honest_errors(lm: LM) -> None:
    evidence = exact(lm, "ab", OPTIONS)
    expected = evidence / evidence.sum()
    scores, shares, errors = [], [], []
    for seed in range(100):
        pyro.set_rng_seed(seed)
        found = answer(asked(lm), options=OPTIONS, num_samples=50)("ab")
        assert found.options == OPTIONS
        assert found.probabilities.sum() == pytest.approx(1.0)
        scores.append((found.probabilities - expected) / found.error)
        shares.append(found.probabilities)
        errors.append(found.error)
    # A ratio of means is biased by 1/K; over 100 seeds the mean score has a standard error of 0.1.
    assert abs(np.mean(scores, 0)).max() < 0.5
    # What the estimates vary by over seeds is known to 7 %.
    assert np.std(shares, 0) == pytest.approx(np.mean(errors, 0), rel=0.25)


def test_draws_are_grouped_by_what_they_are_once_normalised(lm: LM) -> None:
    found = answer(asked(lm), normalise=lambda text: text.strip(".")[:1], num_samples=4000)("ab")
    shares = dict(zip(found.options, found.probabilities, strict=True))
    law_by_first: dict[str, float] = {}
    prior = lm("ab", max_tokens=2, stop=".")
    thoughts = prior.enumerate_support()
    with torch.no_grad():
        first = lm("ab", thoughts, max_tokens=1)
        for token, letter in enumerate(".abcde"):
            value = torch.tensor([token])
            law_by_first[letter.strip(".")] = float(
                (prior.log_prob(thoughts) + first.log_prob(value)).logsumexp(0).exp()
            )
    for letter, share in shares.items():
        assert share == pytest.approx(law_by_first[letter], abs=4 * (0.25 / 4000) ** 0.5)
    assert list(found.probabilities) == sorted(found.probabilities, reverse=True)
    assert found.best == found.options[0]
    np.testing.assert_allclose(found.error, np.sqrt(found.probabilities * (1 - found.probabilities) / 3999))


@pytest.mark.long
def test_rows_have_answers_of_their_own_and_a_guide_may_think(lm: LM) -> None:
    program = asked(lm)
    both = answer(program, options=OPTIONS, num_samples=3000, vectorize_data=True)(["ab", "e"])
    assert both.probabilities.shape == (2, 3)
    for row, question in enumerate(("ab", "e")):
        evidence = exact(lm, question, OPTIONS)
        np.testing.assert_allclose(both.probabilities[row], evidence / evidence.sum(), atol=0.03)
    drawn = answer(program, normalise=str, num_samples=200, vectorize_data=True)(["ab", "e"])
    np.testing.assert_allclose(drawn.probabilities.sum(-1), 1.0)
    # A guide that proposes the answer, too, and another one: the answer is the program's.
    told = {"thought": lambda question: [question], "answer": lambda: ["e"]}
    guide = AutoregressiveGuide(program, lm, prompt=told, rank=2, seed=0)
    grouped = answer(program, normalise=str, guide=guide, num_samples=4000)("ab")
    for text, share in list(zip(grouped.options, grouped.probabilities, strict=True))[:5]:
        assert share == pytest.approx(float(exact(lm, "ab", [text])[0]), abs=0.03)

    def thinks(question: Any, reply: Any = None) -> None:
        pyro.sample("thought", lm("e", max_tokens=2, stop="."))

    found = answer(program, options=OPTIONS, guide=thinks, num_samples=4000)("ab")
    prior = lm("e", max_tokens=2, stop=".")
    thoughts = prior.enumerate_support()
    with torch.no_grad():
        law = lm("ab", thoughts, max_tokens=3, stop=".")
        own = np.array([float((prior.log_prob(thoughts) + law.log_prob(lm.encode(o))).exp().sum()) for o in OPTIONS])
    np.testing.assert_allclose(found.probabilities, own / own.sum(), atol=0.03)


def test_what_cannot_be_answered_is_named(lm: LM) -> None:
    program = asked(lm)

    def of_number() -> None:
        pyro.sample("number", Normal(0.0, 1.0))
        pyro.sample("text", lm("a", max_tokens=1))

    calls: list[tuple[Any, str]] = [
        (lambda: answer(program), "by options= or by normalise=. Give one of them"),
        (lambda: answer(program, options=["a."], normalise=str), "Give one of them"),
        (lambda: answer(program, options=[]), "at least one"),
        (lambda: answer(program, options=[]), "must be a list of answers"),
        (lambda: answer(program, "reply", options=OPTIONS)("ab"), r"is no site of the program, which has \['thought'"),
        (lambda: answer(program, options=["a"])("ab"), "'a' is no text of site 'answer'.* with its stop token"),
        (lambda: answer(program, options=OPTIONS)("ab", "c"), "is observed. Leave the argument out"),
        (lambda: answer(of_number, "number", options=OPTIONS)(), "is a Normal and no text. Name one of"),
        (lambda: answer(program, normalise=lambda text: [text])("ab"), "fails on the answer '.*unhashable"),
        (lambda: answer(program, normalise=int)("ab"), "normalise='int' fails on the answer .*ValueError"),
        (lambda: answer(program, options=OPTIONS, num_samples=0), "num_samples"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_options_of_less_than_the_smallest_float_are_answered() -> None:
    from llmppl.testing import tiny_lm

    lm = tiny_lm(vocabulary=6)

    def program(question: str, answered: Any = None) -> Any:
        way = pyro.sample("way", lm(question, max_tokens=1, allowed=[1]))
        law = lm(question, way, max_tokens=60)
        return pyro.sample("answer", law, obs=None if answered is None else lm.encode(answered))

    options = ["e" * 60, "e" * 59 + "d", "e" * 58 + "dd"]
    exact = lm("aa", max_tokens=60).log_prob(lm.encode(options)).double().detach()
    assert float(exact.max()) < -104, "no float32"
    found = answer(program, options=options, num_samples=2)("a")
    np.testing.assert_allclose(found.probabilities, exact.softmax(-1).numpy(), rtol=1e-3)


def half_told(lm: LM, reply: str | None = None) -> Any:
    """A program that observes more than its answer: a number before it, and a hard condition."""

    def program(question: Any, count: Any) -> Any:
        thought = pyro.sample("thought", lm(question, max_tokens=2, stop="."))
        pyro.sample("count", Normal(lm.map(lambda text: float(len(text)), thought), 0.5), obs=count)
        pyro.factor("has", torch.where(lm.map(lambda text: "d" not in text, thought), 0.0, -torch.inf))
        return pyro.sample("answer", lm.choice(thought, options=["b", "cd"]), obs=reply and lm.encode(reply))

    return program


def exactly(lm: LM, question: str, count: float) -> np.ndarray:
    """p(answer | count, no d) by enumerating thoughts."""
    prior = lm(question, max_tokens=2, stop=".")
    thoughts = prior.enumerate_support()
    texts = lm.decode(thoughts)
    lengths = torch.tensor([float(len(text)) for text in texts])
    with torch.no_grad():
        log_p = prior.log_prob(thoughts) + Normal(lengths, 0.5).log_prob(torch.tensor(count))
        log_p = torch.where(torch.tensor(["d" not in text for text in texts]), log_p, -torch.inf)
        joint = (log_p[:, None] + lm.choice(thoughts, options=["b", "cd"]).logits).logsumexp(0).exp()
    return (joint / joint.sum()).numpy()


@pytest.mark.parametrize("how", ["predict", "options", "normalise"])
def test_what_else_is_observed_weighs_the_answers(lm: LM, how: str) -> None:
    """The draws of the prior alone are some 10 standard errors off."""
    pyro.set_rng_seed(0)
    program = half_told(lm)
    calls = {
        "predict": lambda: predict(program, "answer", 4000, vectorize_data=True),
        "options": lambda: answer(program, options=["b", "cd"], num_samples=4000, vectorize_data=True),
        "normalise": lambda: answer(program, normalise=str, num_samples=4000, vectorize_data=True),
    }
    found = calls[how]()(["ab", "ba"], torch.tensor([1.0, 2.0]))
    order = [found.options.index(option) for option in ("b", "cd")]
    for row, args in enumerate([("ab", 1.0), ("ba", 2.0)]):
        expected = exactly(lm, *args)
        error = found.error[row][order]
        assert (abs(found.probabilities[row][order] - expected) < 4 * error).all()
        assert (error < 0.03).all()
    assert (found.ess < 3500).all()
    assert "ESS" in repr(found)


def test_the_error_of_weighed_answers_is_what_they_vary_by(lm: LM) -> None:
    expected = exactly(lm, "ab", 1.0)
    scores = []
    for seed in range(60):
        pyro.set_rng_seed(seed)
        found = predict(half_told(lm), "answer", 60)("ab", torch.tensor(1.0))
        scores.append((found.probabilities[0] - expected[0]) / found.error[0])
    assert abs(np.mean(scores)) < 0.6  # its standard error is 0.13, and the bias of a ratio that of 1/K
    assert 0.7 < np.std(scores) < 1.4


def test_an_observation_behind_the_answer_is_refused_where_each_value_is_asked_for(lm: LM) -> None:
    def program(question: str) -> None:
        reply = pyro.sample("answer", lm.choice(question, options=["b", "cd"]))
        pyro.sample("judged", lm(reply), obs=lm.encode("e"))

    for call in (predict(program, "answer"), answer(program, options=["b", "cd"])):
        with pytest.raises(ValueError, match="site 'judged' is observed, or a factor, behind site='answer'"):
            call("ab")
    pyro.set_rng_seed(0)
    found = answer(program, normalise=str, num_samples=4000)("ab")
    values = lm.encode(["b", "cd"])
    joint = lm.choice("ab", options=["b", "cd"]).logits + lm(values).log_prob(lm.encode("e"))
    expected = joint.softmax(-1)
    for option, own in zip(["b", "cd"], expected.tolist(), strict=True):
        n = found.options.index(option)
        assert abs(found.probabilities[n] - own) < 4 * found.error[n]

    def impossible(question: str) -> None:
        pyro.factor("never", torch.tensor(-torch.inf))
        pyro.sample("answer", lm.choice(question, options=["b", "cd"]))

    with pytest.raises(ValueError, match="none of the 16 draws of the prior is possible"):
        predict(impossible, "answer")("ab")
