"""A text that is said again, in both frameworks."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pyro
import pytest
import torch
from jax import random

from llmppl import LM
from llmppl.numpyro.testing import tiny_lm as twin_lm
from llmppl.text import PAD


def test_echoes_sum_to_one_over_all_texts(lm: LM) -> None:
    echo = lm.echo(["ab", "e"], 0.3, max_tokens=2)
    signs = range(lm.vocabulary)
    texts = [ids for n in (0, 1, 2) for ids in itertools.product(signs, repeat=n)]
    padded = torch.tensor([[*ids, *[PAD] * (2 - len(ids))] for ids in texts])
    log_prob = echo.log_prob(padded[:, None])
    torch.testing.assert_close(log_prob.exp().sum(0), torch.ones(2).double())
    assert float(echo.log_prob(lm.encode("ab"))[0]) == pytest.approx(math.log(0.7 + 0.1 / lm.vocabulary**2))
    assert float(echo.log_prob(lm.encode("e"))[0]) == pytest.approx(math.log(0.1 / lm.vocabulary))
    assert echo.log_prob(lm.encode("abc")).tolist() == [-math.inf] * 2
    assert echo.log_prob(torch.tensor([1, 2, PAD, PAD]))[0] == echo.log_prob(lm.encode("ab"))[0]
    twin = twin_lm(lm.vocabulary).echo(["ab", "e"], 0.3, max_tokens=2)
    np.testing.assert_allclose(jax.jit(twin.log_prob)(jnp.asarray(padded.numpy())[:, None]), log_prob, rtol=1e-5)


def test_an_echo_is_of_its_own_row_alone(lm: LM) -> None:
    """Its law is that of a row alone, however long the other rows and its own padding are; a text that is longer than
    all mistakes is said again all the same."""
    for model in (lm, twin_lm(lm.vocabulary)):
        alone = [model.echo(text, 0.3, max_tokens=1).log_prob(model.encode("b")) for text in ("b", "abcd")]
        both = model.echo(["b", "abcd"], 0.3, max_tokens=1).log_prob(model.encode("b"))
        assert [float(own) for own in both] == [float(own) for own in alone]
        assert float(both[0]) == pytest.approx(math.log(0.7 + 0.15 / lm.vocabulary))
        assert float(both[1]) == pytest.approx(math.log(0.15 / lm.vocabulary))
        longer = model.echo(["b", "abcd"], 0.3, max_tokens=1).log_prob(model.encode(["abcd", "abcd"]))
        assert [float(own) for own in longer] == [-math.inf, pytest.approx(math.log(0.7))]
        default = [model.echo(text).log_prob(model.encode("c")) for text in ("b", "abcd")]
        assert float(default[0]) == float(default[1]) == pytest.approx(math.log(1e-3 / 65 / lm.vocabulary))
    twin = twin_lm(lm.vocabulary)
    argument = twin.argument("ab")  # padded to a multiple of 16 tokens
    assert float(twin.echo(argument, 0.3, 2).log_prob(twin.encode("ba"))) == pytest.approx(
        float(lm.echo("ab", 0.3, 2).log_prob(lm.encode("ba")))
    )


def test_computed_texts_are_weighed_row_by_row(lm: LM) -> None:
    """What other particles write does not change a particle's weight."""

    def backwards(text: str) -> str:
        return text[::-1]

    texts = lm.encode(["a", "b", "ab", "ccd"])
    single = [lm.echo(lm.map(backwards, row)).log_prob(lm.encode("a")) for row in texts]
    together = lm.echo(lm.map(backwards, texts)).log_prob(lm.encode("a"))
    torch.testing.assert_close(together, torch.stack(single), rtol=0, atol=0)


def test_echoes_are_drawn_as_they_are_scored(lm: LM) -> None:
    twin = twin_lm(lm.vocabulary).echo(["ab", "e"], 0.3, 2)
    pyro.set_rng_seed(0)
    for drawn in (
        lm.echo(["ab", "e"], 0.3, 2).sample((20000,)).numpy(),
        np.asarray(twin.sample(random.key(0), (20000,))),
    ):
        texts = [lm.decode(torch.as_tensor(row)) for row in drawn[:, 1].astype(np.int64)]
        v = lm.vocabulary
        for text, expected in (("e", 0.7 + 0.1 / v), ("", 0.1), ("a", 0.1 / v), ("ab", 0.1 / v**2)):
            assert abs(texts.count(text) / 20000 - expected) < 4 * (expected / 20000) ** 0.5


@pytest.mark.parametrize("mistake", [0.0, 1.0, -1.0])
def test_mistakes_that_are_no_probabilities(lm: LM, mistake: float) -> None:
    for model in (lm, twin_lm(lm.vocabulary)):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            model.echo("ab", mistake)
        with pytest.raises(ValueError, match="max_tokens=-1 must not be negative"):
            model.echo("ab", max_tokens=-1)
