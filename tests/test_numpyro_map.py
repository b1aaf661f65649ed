"""lm.map() in JAX: under jit and vmap, in programs, and what it says of mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro import handlers

from llmppl.numpyro import LM, exact_posterior, importance, jit, smc
from llmppl.numpyro.inference.stages import latents_of
from llmppl.numpyro.programs.tracing import simulate
from llmppl.numpyro.testing import tiny_lm
from llmppl.text import PAD


@pytest.fixture(scope="module")
def lm() -> Iterator[LM]:
    with jax.enable_x64(True):
        yield tiny_lm(vocabulary=4, dtype=jnp.float64)


@pytest.fixture(scope="module")
def counted(lm: LM) -> Any:
    """A text of which the number of "a" is observed, and what the function makes of it kept."""

    def program(letter: str) -> None:
        text = numpyro.sample("text", lm("b", max_tokens=2, stop="."))
        number = numpyro.deterministic("number", lm.map(lambda t, letter: t.count(letter), text, letter))
        numpyro.deterministic("twice", lm.map(twice, text, max_tokens=4))
        numpyro.sample("seen", dist.Normal(number, 0.5), obs=1.7)

    prior = lm("b", max_tokens=2, stop=".")
    texts = prior.enumerate_support()
    numbers = np.array([text.count("a") for text in lm.decode(texts)])
    log_joint = prior.log_prob(texts) + dist.Normal(numbers, 0.5).log_prob(1.7)
    return SimpleNamespace(program=program, evidence=float(jax.nn.logsumexp(log_joint)))


def twice(text: str) -> str:
    return text + text if "b" in text else text


def test_jit_vmap_and_plates_ask_once_for_each_distinct_row(lm: LM) -> None:
    calls: Counter[Any] = Counter()

    def function(text: str, number: float, name: str, whole: int) -> int:
        calls[text, number, name, whole] += 1
        assert [type(v) for v in (text, number, name, whole)] == [str, float, str, int]
        return len(text) * 10 + int(number * 4) + (name == "y") + whole

    def rows(texts: Any, number: Any) -> Any:  # a plate of 1, a number for all, a plate of 2
        return lm.map(function, texts, number, ["x", "y"], 100, returns=int)

    texts = jnp.asarray(lm.encode(["a", "ab", "a"]))[:, None]
    expected = [[111, 112], [121, 122], [111, 112]]
    # Outside of compiled code, and in it: the rows of vmap stand before those of plates.
    assert rows(texts, 0.25).tolist() == expected
    calls.clear()
    found = jax.jit(jax.vmap(rows))(texts, jnp.full(3, 0.25))
    assert (found.dtype, found.tolist()) == (jnp.int32, expected)
    assert len(calls) == 4
    assert set(calls.values()) == {1}


def test_results_are_constants_texts_have_their_width_and_arguments_are_decoded(lm: LM) -> None:
    def function(x: Any, text: Any) -> Any:
        half = lm.map(lambda v, t: v / 2 + len(t), x, text)
        flag = lm.map(lambda t: "b" in t, text, returns=bool)
        return half + x, (lm.map(lambda t: t + "c", text, max_tokens=4), flag)

    value, (text, flag) = function(jnp.float32(3.0), "ab")
    assert (float(value), text.tolist(), bool(flag)) == (6.5, [1, 2, 3, PAD], True)
    run = jit(jax.value_and_grad(function, has_aux=True))
    (value, (text, flag)), slope = run(jnp.float32(3.0), lm.argument("ab"))
    assert (float(value), text.tolist(), bool(flag), float(slope)) == (6.5, [1, 2, 3, PAD], True, 1.0)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda lm: lm.map(twice, "a", returns=str), ValueError, "returns=str needs max_tokens="),
        (lambda lm: lm.map(twice, "a"), TypeError, r"'twice' returned 'a' .*a float was.*returns=str, max_tokens="),
        (lambda lm: lm.map(lambda t: True, "a"), TypeError, "returned True .*Pass returns=bool"),
        (lambda lm: lm.map(abs, jnp.int32(3)), ValueError, r"value 0 .* int32 without dimensions.*astype\(float\)"),
        (lambda lm: lm.map(abs, jnp.array([9])), ValueError, "value 0 of lm.map holds the token id 9"),
        (lambda lm: lm.map(abs, jnp.array(1j)), TypeError, "holds complex"),
        (lambda lm: lm.map(abs, None), TypeError, "value 0 of lm.map must be .* array of texts.*got None"),
        (lambda lm: lm.map(max, ["a", "b"], jnp.ones(3)), ValueError, r"values 0 and 1 .* \(2,\) and \(3,\)"),
        (lambda lm: lm.map(int, ["1", "x"], returns=int), ValueError, r"raised ValueError in row \(1,\).*\('x'\)"),
        (lambda lm: lm.map(twice, "bbb", max_tokens=4), ValueError, "6 tokens, more than max_tokens=4"),
    ],
)
def test_errors_say_what_was_wrong(lm: LM, call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(lm)


def test_64_bits_arrive_and_come_back_whole(lm: LM) -> None:
    """Under jax.enable_x64 as a context the thread of the callback knows nothing of it."""
    number = np.random.default_rng(0).random(500)
    found = jax.jit(jax.vmap(lambda x: lm.map(lambda v: v, x)))(jnp.asarray(number))
    assert found.dtype == jnp.float64
    assert (np.asarray(found) == number).all()


def test_an_error_in_compiled_code_has_the_same_text(lm: LM) -> None:
    run = jax.jit(jax.vmap(lambda text: lm.map(lambda t: 1 / (len(t) - 2), text)))
    with pytest.raises(Exception, match=r"raised ZeroDivisionError in row \(1,\) of a batch \(2,\), for .*\('ab'\)"):
        jax.block_until_ready(run(jnp.asarray(lm.encode(["a", "ab"]))))


@pytest.mark.long
def test_posteriors_hold_it_and_show_strings(lm: LM, counted: Any) -> None:
    exact = exact_posterior(counted.program)("a")
    assert float(exact.log_evidence) == pytest.approx(counted.evidence, abs=1e-9)
    drawn = importance(counted.program, latents_of(counted.program), 64, progress=False)(random.key(0), "a")
    walked = smc(counted.program, num_samples=16, progress=False)(random.key(0), "a")
    for posterior in (exact, drawn, walked):
        texts = posterior.decode("text")
        assert posterior.samples["number"].tolist() == [text.count("a") for text in texts]
        assert posterior.decode("twice") == list(map(twice, texts))
        assert posterior.deterministic == ("number", "twice")
        assert posterior.texts == ["text", "twice"]
    data = drawn.to_arviz()
    assert set(data.posterior_text.data_vars) == {"text", "twice"}
    assert "twice" in drawn._repr_html_()


def test_a_program_of_varying_structure_and_plates(lm: LM) -> None:
    def program() -> None:
        coin = numpyro.sample("coin", dist.Bernoulli(0.5))
        with numpyro.plate("plate", 2):
            text = numpyro.sample("text", lm("b", max_tokens=1))
            if coin:
                numpyro.deterministic("twice", lm.map(lambda t: t + t, text, max_tokens=2))

    posterior = exact_posterior(program)()
    assert float(posterior.log_evidence) == pytest.approx(0, abs=1e-9)
    assert posterior.samples["twice"].shape == (32, 2, 2)
    coins = posterior.samples["coin"].astype(bool)
    doubled, texts = np.array(posterior.decode("twice")), np.array(posterior.decode("text"))
    assert (doubled[coins] == np.char.add(texts[coins], texts[coins])).all()
    assert (doubled[~coins] == "").all()


@pytest.mark.long
def test_simulations_leave_deterministic_sites_to_the_program(lm: LM, counted: Any) -> None:
    latents, observations = simulate(random.key(0), counted.program, ("a",), {})
    assert set(latents) == {"text"}
    assert set(observations) == {"seen"}
    trace = handlers.trace(handlers.seed(counted.program, 0)).get_trace("a")
    assert float(trace["number"]["value"]) == lm.decode(trace["text"]["value"]).count("a")
