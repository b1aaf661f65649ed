"""Latents without text whose proposals are told the texts, in both twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import character_lm
from pyro import poutine
from torch import Tensor

from llmppl import LM, exact_posterior, fit, importance
from llmppl.guides import PromptGuide
from llmppl.objectives import WakeSleep

TEXTS = ["a", "b"]


def mood(lm: LM) -> Any:
    """A text, then a mood that depends on it, then a number that depends on both."""

    def program(y: Any) -> None:
        text = pyro.sample("text", lm("ab", max_tokens=2, stop="."))
        kind = pyro.sample("kind", dist.Categorical(logits=prior_logits(lm, text)))
        pyro.sample("y", dist.Normal(kind + 0.0, 1.0), obs=y)

    return program


def prior_logits(lm: LM, text: Any) -> Any:
    return lm.map(lambda text, n: float(n) * text.count("a"), text[..., None, :], torch.tensor([0.0, 1.0, 2.0]),
                  returns=float)  # fmt: skip


def exact_kind(lm: LM, y: Any, text: Any) -> dist.Categorical:
    """p(kind | text, y)"""
    own = torch.log_softmax(prior_logits(lm, text), -1)
    return dist.Categorical(logits=own + dist.Normal(torch.tensor([0.0, 1.0, 2.0]), 1.0).log_prob(y[..., None]))


def evidence_given(lm: LM, y: Any, text: Any) -> Tensor:
    """log p(y | text)"""
    own = torch.log_softmax(prior_logits(lm, text), -1)
    return (own + dist.Normal(torch.tensor([0.0, 1.0, 2.0]), 1.0).log_prob(y[..., None])).logsumexp(-1)


def test_a_proposal_that_is_told_the_text_is_weighed_exactly() -> None:
    """With the text from its prior and the mood from its exact conditional, a weight is p(y | text), and log Ẑ that of
    the enumerated program."""
    lm = character_lm("ab.", ".")
    program, y = mood(lm), torch.tensor(1.5)
    others = {"kind": lambda y, text: exact_kind(lm, y, text)}
    guide = PromptGuide(program, lm, prompt={"text": lambda: ["ab"]}, others=others)
    pyro.set_rng_seed(0)
    posterior = importance(program, guide, 400, progress=False)(y)
    texts = torch.as_tensor(posterior.samples["text"])
    np.testing.assert_allclose(posterior.log_weights, evidence_given(lm, y, texts).numpy(), atol=1e-5)
    exact = exact_posterior(program)(y)
    assert abs(posterior.log_evidence - exact.log_evidence) < 4 * posterior.log_evidence_error


def test_such_a_proposal_is_told_what_is_simulated() -> None:
    """Asleep it is asked with the simulated y, a row for each particle, and learns the conditional."""
    lm = character_lm("ab.", ".")
    program, asked = mood(lm), list[Any]()

    def propose(y: Tensor, text: Tensor) -> dist.Categorical:
        asked.append(y.shape)
        return dist.Categorical(logits=pyro.param("logits", torch.zeros(3)) + 0.0 * prior_logits(lm, text))

    guide = PromptGuide(program, lm, prompt={"text": lambda: ["ab"]}, others={"kind": propose})
    pyro.set_rng_seed(0)
    fit(program, guide, [(torch.tensor(9.0),)], WakeSleep(64, insomnia=0.0), 80, learning_rate=5e-2, seed=0,
        weight_decay=0.0, schedule="cosine", progress=False)  # fmt: skip
    assert (64,) in asked
    learned = pyro.param("logits").detach().softmax(-1)
    law = lm("ab", max_tokens=2, stop=".")
    texts = law.enumerate_support()
    marginal = (law.log_prob(texts).exp()[:, None] * prior_logits(lm, texts).softmax(-1)).sum(0)
    torch.testing.assert_close(learned, marginal.to(learned), rtol=0, atol=0.06)


def test_bad_proposals_are_named() -> None:
    lm = character_lm("ab.", ".")
    program, y = mood(lm), torch.tensor(1.5)
    with pytest.raises(TypeError, match=r"others\['kind'\] must be a function that returns a distribution, got 3"):
        PromptGuide(program, lm, others={"kind": 3})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="others must be a function, a module or a guide, got 3"):
        PromptGuide(program, lm, others=3)  # type: ignore[arg-type]
    for name in ("kin", "text", "y"):
        guide = PromptGuide(program, lm, others={name: lambda y: dist.Categorical(logits=torch.zeros(3))})
        with pytest.raises(ValueError, match=rf"others= names \['{name}'\], but .* without text are \['kind'\]"):
            guide(y)
    with pytest.raises(ValueError, match=r"others\['kind'\] asks for 'x', which is neither"):
        PromptGuide(program, lm, others={"kind": lambda x: x})(y)


def test_numpyro_proposals_are_told_the_text() -> None:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as twin_dist
    from jax import random

    from llmppl.numpyro import importance as twin_importance
    from llmppl.numpyro.guides import PromptGuide as TwinGuide
    from llmppl.numpyro.testing import tiny_lm as twin_lm

    lm = twin_lm()

    def logits(text: Any) -> Any:
        return lm.map(lambda text, n: float(n) * text.count("a"), text[..., None, :], jnp.arange(3.0), returns=float)

    def program(y: Any) -> None:
        text = numpyro.sample("text", lm("ab", max_tokens=2, stop="."))
        kind = numpyro.sample("kind", twin_dist.Categorical(logits=logits(text)))
        numpyro.sample("y", twin_dist.Normal(kind + 0.0, 1.0), obs=y)

    def joint(y: Any, text: Any) -> Any:
        own = jnp.log(jnp.exp(logits(text)) / jnp.exp(logits(text)).sum(-1, keepdims=True))
        return own + twin_dist.Normal(jnp.arange(3.0), 1.0).log_prob(y)

    others = {"kind": lambda y, text: twin_dist.Categorical(logits=joint(y, text))}
    guide = TwinGuide(program, lm, prompt={"text": lambda: ["ab"]}, others=others)
    posterior = twin_importance(program, guide, 40, progress=False)(random.key(0), jnp.array(1.5))
    texts = jnp.asarray(posterior.samples["text"], jnp.int32)
    expected = jnp.log(jnp.exp(joint(1.5, texts)).sum(-1))
    np.testing.assert_allclose(posterior.log_weights, np.asarray(expected), atol=1e-5)
    with pytest.raises(ValueError, match=r"others= names \['kin'\]"):
        TwinGuide(program, lm, others={"kin": lambda y: y})(jnp.array(1.5))


# --- prompts with rows where their site has none --------------------------------------------------


def test_rows_of_a_plate_are_not_a_prompt_for_a_site_outside() -> None:
    """``y[..., 0]`` of simulated numbers has a row for each particle where the plate was: the text would be drawn, and
    counted, as often as there are particles."""
    lm = character_lm("ab0123456789.- ", ".")

    def program(y: Any) -> None:
        pyro.sample("text", lm("ab", max_tokens=2, stop="."))
        with pyro.plate("points", 2):
            pyro.sample("y", dist.Normal(torch.zeros(2), 1.0), obs=y)

    for prompt, fine in ((lambda y: [lm.map("{:.0f}".format, y[..., 0])], False),
                         (lambda y: [lm.map("{:.0f}".format, y[..., :1])], True)):  # fmt: skip
        guide = PromptGuide(program, lm, prompt={"text": prompt})
        with pyro.plate("particles", 4, dim=-2):
            trace = poutine.trace(guide)
            if fine:
                text = trace.get_trace(torch.zeros(2), observations={"y": torch.ones(4, 2)}).nodes["text"]
                assert text["value"].shape == (4, 1, 2)
            else:
                with pytest.raises(ValueError, match=r"'text' has batch shape \(4,\), with 4 rows in dimension -1, "
                                   "where the site is in no plate"):  # fmt: skip
                    trace.get_trace(torch.zeros(2), observations={"y": torch.ones(4, 2)})


def test_numpyro_rows_of_a_plate_are_not_a_prompt_for_a_site_outside() -> None:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as twin_dist
    from numpyro import handlers

    from llmppl.numpyro.guides import PromptGuide as TwinGuide
    from llmppl.numpyro.testing import tiny_lm as twin_lm

    lm = twin_lm()

    def program(y: Any) -> None:
        numpyro.sample("text", lm("ab", max_tokens=2, stop="."))
        with numpyro.plate("points", 2):
            numpyro.sample("y", twin_dist.Normal(jnp.zeros(2), 1.0), obs=y)

    guide = TwinGuide(program, lm, prompt={"text": lambda y: [lm.encode(["a", "b"])]})
    with handlers.seed(rng_seed=0), pytest.raises(ValueError, match=r"with 2 rows in dimension -1"):
        guide(jnp.zeros(2))
