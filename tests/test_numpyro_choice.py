"""The finite distribution over given strings, in JAX."""

from __future__ import annotations

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import Array, random
from numpyro import handlers
from scipy.stats import chisquare

from llmppl.numpyro import LM, exact_posterior
from llmppl.numpyro.distributions import choice as module
from llmppl.numpyro.testing import tiny_lm
from llmppl.text import PAD

OPTIONS = ["a.", "bc", "e"]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm(6)


def test_weights_are_the_normalised_stream_probabilities(lm: LM) -> None:
    options = jnp.asarray(lm.encode(OPTIONS))
    contexts = jnp.asarray(lm.encode(["d", "ab"]))
    choice = lm.choice(["d", "ab"], options=OPTIONS)
    assert choice.batch_shape == (2,)
    expected = jax.nn.log_softmax(lm(contexts[:, None]).log_prob(options), -1)
    mapped = jax.jit(jax.vmap(lambda context: lm.choice(context, options=OPTIONS).logits))(contexts)
    np.testing.assert_allclose(mapped, expected, atol=1e-5)
    np.testing.assert_allclose(choice.logits, expected, atol=1e-5)
    scores = choice.log_prob(choice.enumerate_support())
    np.testing.assert_allclose(np.exp(scores).sum(0), [1, 1], atol=1e-6)
    np.testing.assert_allclose(scores.T, expected, atol=1e-5)
    assert choice.enumerate_support(expand=False).shape == (3, 1, 2)
    draws = np.asarray(choice.sample(random.key(0), (4000,)))
    assert draws.shape == (4000, 2, 2)
    for row in range(2):
        counts = [(draws[:, row] == option).all(-1).sum() for option in np.asarray(options)]
        assert sum(counts) == 4000
        # Fixed seed; a weight that is off by a tenth gives p below 1e-3 at 4000 draws.
        assert (
            chisquare(counts, 4000 * np.exp(np.float64(expected[row])) / np.exp(np.float64(expected[row])).sum()).pvalue
            > 1e-3
        )
    hot, _ = choice.draw(random.key(1), (4000,), heat=1e4)
    share = (np.asarray(hot)[:, 0] == np.asarray(options)[0]).all(-1).mean()
    assert abs(share - 1 / 3) < 0.03  # four standard errors


def test_options_of_different_lengths_are_padded(lm: LM) -> None:
    choice = lm.choice("d", options=["abc", "e"])
    assert choice.options.tolist() == [[1, 2, 3], [5, PAD, PAD]]
    assert choice.support(lm.encode("e"))
    assert not choice.support(lm.encode("a"))
    assert choice.support(choice.support.feasible_like(jnp.zeros((2, 5), jnp.int32))).all()
    assert repr(choice) == "Choice(batch_shape=(), options=['abc', 'e'])"
    assert choice.option(jnp.array([[1], [0]])).shape == (2, 1, 3)


def test_a_text_that_is_no_option_is_warned_of_and_has_probability_zero(lm: LM) -> None:
    choice = lm.choice(["d", "ab"], options=OPTIONS)
    message = r"(?s)^Out-of-support values.*'d' \(row \(1,\)\) is none of the options \['a.', 'bc', 'e'\]"
    with pytest.warns(UserWarning, match=message):
        scores = choice.log_prob(lm.encode(["e", "d"], width=3))
    assert np.isneginf(np.asarray(scores)).tolist() == [False, True]
    with pytest.raises(ValueError, match=r"batch shape \(3,\) does not broadcast"):
        choice.log_prob(lm.encode(["b", "c", "b"]))


def test_a_choice_in_plates_and_pytrees(lm: LM) -> None:
    def model() -> Array:
        with numpyro.plate("columns", 3, dim=-1), numpyro.plate("rows", 2, dim=-2):
            plan = numpyro.sample("plan", lm.choice(["a", "b", "cc"], options=OPTIONS))
        return plan

    trace = jax.eval_shape(lambda key: handlers.seed(model, key)(), random.key(0))
    assert trace.shape == (2, 3, 2)
    choice = lm.choice("a", options=OPTIONS).expand((4,))
    assert choice.batch_shape == (4,)
    with pytest.raises(ValueError, match=r"batch shape \(4,\) cannot be expanded"):
        choice.expand(())
    leaves, tree = jax.tree.flatten(choice)
    assert repr(jax.tree.unflatten(tree, leaves)) == repr(choice)
    traced = jax.make_jaxpr(lambda d: d.expand((2, 4)).logits)(choice)
    assert sum(np.size(c) for c in traced.consts) < 100, "weights became constants of the program"


def test_numpyros_enumeration_is_refused_and_the_options_number_enumerates(lm: LM) -> None:
    """NumPyro would put 0, 1, ... where texts belong. Its module (with funsor) is no requirement, so its name stands in
    for it."""
    choice = lm.choice("ab", options=["c", "de"])
    caller = types.ModuleType("numpyro.contrib.funsor.enum_messenger")
    exec("def enumerate(fn): return fn.enumerate_support(expand=False)", caller.__dict__)
    with pytest.raises(TypeError, match=r"Enumerate the option's number.*choice.option\(number\)"):
        caller.enumerate(choice)
    assert choice.enumerate_support().shape == (2, 2)
    assert module.__name__ in sys.modules


def test_given_probabilities_stand_in_for_the_models(lm: LM) -> None:
    choice = lm.choice(["d", "ab"], options=OPTIONS, probs=[1, 1, 2])
    np.testing.assert_allclose(np.exp(choice.logits), [[0.25, 0.25, 0.5]] * 2, atol=1e-6)
    np.testing.assert_allclose(np.exp(choice.expand((3, 2)).log_prob(lm.encode("e"))), 0.5, atol=1e-6)
    np.testing.assert_allclose(np.exp(jax.jit(lambda c: c.logits)(choice)), [[0.25, 0.25, 0.5]] * 2, atol=1e-6)
    proposal = choice.with_context(lm.context("d"), None)
    np.testing.assert_allclose(proposal.logits[0], lm.choice("d", options=OPTIONS).logits, atol=1e-5)
    with pytest.raises(ValueError, match="must be a positive number for each of the 3 options"):
        lm.choice("d", options=OPTIONS, probs=[1.0])


@pytest.mark.long
def test_a_tilt_is_added_before_the_options_are_normalised(lm: LM) -> None:
    """Compiled, mapped, expanded and with a gradient, as in the other twin."""
    tilt = np.array([[0.0, 0.0, 0.0], [1.0, -1.0, 0.5]], dtype=np.float32)
    plain, choice = lm.choice(["d", "ab"], options=OPTIONS), lm.choice(["d", "ab"], options=OPTIONS, tilt=tilt)
    expected = np.exp(plain.logits + tilt)
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(choice.logits), expected, atol=1e-6)
    np.testing.assert_allclose(np.exp(jax.jit(lambda c: c.logits)(choice)), expected, atol=1e-6)
    np.testing.assert_allclose(np.exp(choice.expand((4, 2)).logits), np.broadcast_to(expected, (4, 2, 3)), atol=1e-6)
    one = lm.choice("d", options=OPTIONS, tilt=tilt)
    assert one.batch_shape == (2,)
    assert repr(one).endswith(", tilted)")
    number = OPTIONS.index("e")
    np.testing.assert_allclose(one.log_prob(lm.encode("e")), one.logits[:, number], atol=1e-6)
    mapped = jax.vmap(lambda own: lm.choice("d", options=OPTIONS, tilt=own).logits)(tilt)
    np.testing.assert_allclose(mapped, one.logits, atol=1e-6)

    def log_prob(own: jax.Array) -> jax.Array:
        return lm.choice("d", options=OPTIONS, tilt=own).log_prob(lm.encode("e"))

    wanted = np.eye(3)[number] - np.exp(one.logits[1])
    np.testing.assert_allclose(jax.grad(log_prob)(tilt[1]), wanted, atol=1e-6)
    np.testing.assert_allclose(
        choice.with_context(lm.context("d"), None).logits[0], lm.choice("d", options=OPTIONS).logits, atol=1e-5
    )
    for wrong, said in (([1.0], r"tilt= has shape \(1,\)"), ([1.0, np.nan, 0.0], "no finite floating point number")):
        with pytest.raises(ValueError, match=said):
            lm.choice("d", options=OPTIONS, tilt=wrong)


def test_a_tilt_that_a_compiled_program_closes_over_is_read(lm: LM) -> None:
    tilt = jnp.array([0.5, -0.5])

    def program() -> None:
        numpyro.sample("word", lm.choice("a", options=["b", "cd"], tilt=tilt))

    found = jax.jit(lambda: lm.choice("a", options=["b", "cd"], tilt=tilt).logits)()
    np.testing.assert_allclose(found, lm.choice("a", options=["b", "cd"], tilt=np.asarray(tilt)).logits, rtol=1e-5)
    assert float(exact_posterior(program)().log_evidence) == pytest.approx(0.0, abs=1e-5)
