"""Plates that take some of their rows at a step, under NumPyro objectives: program, guide and all particles have the
same."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers

from llmppl.numpyro.guides import PromptGuide
from llmppl.numpyro.objectives import Behaviour, LeaveOneOutELBO, TrajectoryBalance, WakeSleep
from llmppl.numpyro.testing import tiny_lm

PRIOR = jnp.asarray([0.5, -0.3, 0.2])
LIKELIHOOD = jnp.asarray([[0.0, 1.0, -1.0], [0.8, 0.0, 0.5], [-0.5, 0.3, 1.2], [2.0, 0.1, -0.7]])
"""Log-odds of four observations, a row each for what is seen, a column for the latent."""
SEEN = jnp.arange(4)
TEXTS = ["aa", "b.", "cd", "e."]


def joint() -> jax.Array:
    """log p(z, x) by ``[x, z]``."""
    return jax.nn.log_softmax(PRIOR) + jax.nn.log_softmax(LIKELIHOOD, axis=0)


def model(seen: jax.Array) -> None:
    with numpyro.plate("rows", 4, subsample_size=2) as rows:
        z = numpyro.sample("z", dist.Categorical(logits=PRIOR))
        numpyro.sample("x", dist.Categorical(logits=LIKELIHOOD.T[z]), obs=seen[rows])


def guide(seen: jax.Array, observations: dict[str, jax.Array] | None = None) -> None:
    """The exact posterior."""
    with numpyro.plate("rows", 4, subsample_size=2) as rows:
        own = seen[rows] if observations is None else observations["x"]
        numpyro.sample("z", dist.Categorical(logits=joint()[own]))


@pytest.mark.parametrize("sleep", [0.0, 1.0])
def test_balance_vanishes_at_the_posterior_whatever_the_rows(sleep: float) -> None:
    """Were rows of the program others than the guide's, or other ones in each particle, it would not."""
    objective = TrajectoryBalance(6, behaviour=Behaviour(sleep=sleep))
    losses = jax.jit(jax.vmap(lambda key: objective.loss(key, {}, model, guide, SEEN)))(random.split(random.key(0), 40))
    np.testing.assert_allclose(losses, 0.0, atol=1e-10)


def test_a_bound_is_that_of_the_rows_of_the_step() -> None:
    """Twice the evidence of two rows of four; each pair of them is met."""
    log_z = jax.scipy.special.logsumexp(joint(), 1)
    pairs = {round(-2 * float(log_z[i] + log_z[j]), 4) for i, j in itertools.combinations(range(4), 2)}
    objective = LeaveOneOutELBO(3)
    losses = jax.jit(jax.vmap(lambda key: objective.loss(key, {}, model, guide, SEEN)))(random.split(random.key(0), 99))
    assert {round(float(loss), 4) for loss in losses} == pairs
    assert len(pairs) == 6


@pytest.mark.long
def test_rows_that_the_program_alone_takes() -> None:
    """A latent outside of the plate: the guide has none."""

    def program(seen: jax.Array) -> None:
        z = numpyro.sample("z", dist.Categorical(logits=PRIOR))
        with numpyro.plate("rows", 4, subsample_size=2) as rows:
            numpyro.sample("x", dist.Categorical(logits=LIKELIHOOD.T[z]), obs=seen[rows])

    def proposal(seen: jax.Array) -> None:
        numpyro.sample("z", dist.Categorical(logits=numpyro.param("logits", jnp.zeros(3))))

    def gradient(key: jax.Array, objective: LeaveOneOutELBO | TrajectoryBalance) -> jax.Array:
        def loss(logits: jax.Array) -> jax.Array:
            return objective.loss(key, {"logits": logits}, program, proposal, SEEN)

        return jax.grad(loss)(jnp.asarray([0.4, -0.1, 0.3]))

    def exact(logits: jax.Array) -> jax.Array:
        log_q = jax.nn.log_softmax(logits)
        log_p = jax.nn.log_softmax(PRIOR) + jax.nn.log_softmax(LIKELIHOOD, axis=0).sum(0)
        return (jnp.exp(log_q) * (log_q - log_p)).sum()

    for objective, factor in ((LeaveOneOutELBO(3), 1), (TrajectoryBalance(3), 2)):
        each = jax.jit(jax.vmap(lambda key, own=objective: gradient(key, own)))(random.split(random.key(1), 20_000))
        error = each.std(0) / len(each) ** 0.5
        expected = factor * jax.grad(exact)(jnp.asarray([0.4, -0.1, 0.3]))
        assert float(error.max()) < 0.05 < float(jnp.abs(expected).max()) / 4
        np.testing.assert_array_less(jnp.abs(each.mean(0) - expected), 4.5 * error)


def test_a_text_guide_is_told_the_rows_of_its_step() -> None:
    lm = tiny_lm()
    texts = jnp.asarray(lm.encode(TEXTS))

    def program(texts: Any) -> None:
        with numpyro.plate("rows", 4, subsample_size=2) as rows:
            middle = numpyro.sample("middle", lm("ab", max_tokens=1))
            numpyro.sample("ending", lm("ab", middle), obs=texts[rows])

    told = PromptGuide(program, lm)
    for seed in range(4):
        trace = handlers.trace(handlers.seed(told, seed)).get_trace(texts)
        np.testing.assert_array_equal(trace["middle"]["fn"].context[0], texts[trace["rows"]["value"]])
    given = handlers.substitute(handlers.seed(told, 0), data={"rows": jnp.array([3, 1])})
    np.testing.assert_array_equal(
        handlers.trace(given).get_trace(texts)["middle"]["fn"].context[0], texts[jnp.array([3, 1])]
    )
    loss = jax.jit(lambda key: WakeSleep(2).loss(key, {}, program, told, texts))(random.key(0))
    assert np.isfinite(loss)


def test_replayed_values_are_of_rows_that_are_known() -> None:
    replayed = {"z": jnp.zeros((1, 2), int)}
    with pytest.raises(ValueError, match="plate 'rows' takes others at every step"):
        TrajectoryBalance(3).loss(random.key(0), {}, model, guide, SEEN, replayed=replayed)


def test_a_temperature_of_the_program_learns_by_the_bound_alone() -> None:
    """The guide's law has it, too, and no gradient from there: balance and wake-sleep leave it as it is."""
    lm = tiny_lm()
    ending = lm.encode("cd")

    def program(ending: Any) -> None:
        heat = numpyro.param("heat", jnp.asarray(1.3))
        middle = numpyro.sample("middle", lm("ab", max_tokens=1, temperature=heat))
        numpyro.sample("ending", lm("ab", middle), obs=ending)

    told = PromptGuide(program, lm)

    @jax.jit
    def gradients(heat: jax.Array) -> list[jax.Array]:
        def gradient(objective: Any) -> jax.Array:
            return jax.grad(lambda heat: objective.loss(random.key(0), {"heat": heat}, program, told, ending))(heat)

        return [gradient(objective) for objective in (LeaveOneOutELBO(4), TrajectoryBalance(4), WakeSleep(4))]

    bound, *others = (float(gradient) for gradient in gradients(jnp.asarray(1.3)))
    assert abs(bound) > 1e-3
    assert others == [0, 0]
