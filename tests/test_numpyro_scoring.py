"""Scores of tokens over the vocabulary in blocks: the log-softmax, its gradients, masks, padded heads, precision."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, random

from llmppl.numpyro.network import scoring
from llmppl.numpyro.network.scoring import token_scores

V, D = 23, 4
HEAD = 3 * random.normal(random.key(0), (V + 2, D))
STATES = 2 * random.normal(random.key(1), (3, 5, D))
TOKENS = random.randint(random.key(2), (3, 5), 10, V)
MASKS: dict[str, Any] = {
    "all": None,
    # Nothing of the first block may stand anywhere, nothing of the second one at two places.
    "of tokens": jnp.arange(V) >= 10,
    "of places and tokens": (jnp.arange(V) >= 10) & ((jnp.arange(V) >= 16) | (jnp.arange(5) < 3)[:, None]),
}


def plain(states: Array, tokens: Array, possible: Any) -> Array:
    logits = jnp.einsum("...d,vd->...v", states, HEAD[:V])
    if possible is not None:
        logits = jnp.where(possible, logits, -jnp.inf)
    return jnp.take_along_axis(jax.nn.log_softmax(logits, -1), tokens[..., None], -1)[..., 0]


@pytest.mark.long
@pytest.mark.parametrize("block", [8, V, 100])
@pytest.mark.parametrize("mask", MASKS)
def test_scores_and_gradients_are_those_of_the_log_softmax(
    mask: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks and a rest, one block exactly, a rest alone; reverse, forward and second derivatives; mapped over."""
    monkeypatch.setattr(scoring, "BLOCK", block)
    possible = MASKS[mask]
    tokens = jnp.maximum(TOKENS, 16)

    def ours(states: Array) -> Array:
        return jax.vmap(lambda s, t: token_scores(HEAD, V, s, t, possible))(states, tokens)

    def theirs(states: Array) -> Array:
        return plain(states, tokens, possible)

    np.testing.assert_allclose(ours(STATES), theirs(STATES), atol=1e-5)
    # Another weight for each, so that no gradient stands in another's place.
    weights = jnp.arange(1.0, 16.0).reshape(3, 5)
    value, gradient = jax.value_and_grad(lambda s: (weights * ours(s)).sum())(STATES)
    due_value, due = jax.value_and_grad(lambda s: (weights * theirs(s)).sum())(STATES)
    assert float(value) == pytest.approx(float(due_value), rel=1e-5)
    np.testing.assert_allclose(gradient, due, rtol=1e-5, atol=1e-4)
    assert jnp.abs(due).max() > 10
    moved = random.normal(random.key(3), STATES.shape)
    found, wanted = (jax.jvp(function, (STATES,), (moved,))[1] for function in (ours, theirs))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    found, wanted = (jax.hessian(lambda s, f=f: f(s).sum())(STATES)[0, 0, :, 0, 0] for f in (ours, theirs))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_tokens_without_a_state_of_their_own_share_one() -> None:
    """One context, several texts of one token: broadcast, not repeated."""
    found = token_scores(HEAD, V, STATES[0, :1], TOKENS.reshape(15, 1))
    np.testing.assert_allclose(found, plain(STATES[0, :1][None], TOKENS.reshape(15, 1), None), atol=1e-5)


def test_half_precision_is_summed_in_single(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probabilities of all tokens sum to one to 1e-3, where bfloat16 has two digits."""
    monkeypatch.setattr(scoring, "BLOCK", 8)
    states = jnp.broadcast_to(STATES[0, 0], (V, 1, D)).astype(jnp.bfloat16)
    scores = token_scores(HEAD.astype(jnp.bfloat16), V, states, jnp.arange(V)[:, None])
    assert scores.dtype == jnp.float32
    assert float(jnp.exp(scores).sum()) == pytest.approx(1, abs=1e-3)


def test_a_state_that_is_no_number_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an empty context leaves must not be taken for a probability."""
    monkeypatch.setattr(scoring, "BLOCK", 8)
    states = STATES[0].at[2].set(jnp.nan)
    assert np.isnan(token_scores(HEAD, V, states, TOKENS[0])).tolist() == [False, False, True, False, False]
