"""Dialogue: intents by a noisy channel, replies given what the user says next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from conftest import character_lm

from llmppl import LM, exact_posterior, importance
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.models import dialogue

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}.{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
FORM: dict[str, Any] = {
    "intents": [" ab", " c"],
    "styles": [" b", " a"],
    "user": "w{}",
    "agent": "g{}",
    "opening": "hi",
    "max_tokens": 2,
    "stop": ".",
}


def chatting(end: str | None = None) -> LM:
    lm = character_lm("abcwghisu .WnrdoesHyMAt?m", end)
    lm.tokenizer.chat_template = TEMPLATE
    return lm


@pytest.fixture(scope="module")
def lm() -> LM:
    return chatting()


def small(lm: LM, **more: Any) -> Any:
    # The choices' contexts are the guide's alone.
    return dialogue(lm, **{**FORM, **more})


def test_intents_are_a_noisy_channel(lm: LM) -> None:
    posterior = exact_posterior(small(lm, replies=0))("ca")
    likelihood = [float(lm(f"sw{intent}.uhi.a").log_prob(lm.encode("ca"))) for intent in FORM["intents"]]
    assert posterior.log_evidence == pytest.approx(np.logaddexp.reduce(likelihood) - np.log(2), abs=1e-6)
    share = dict(zip(posterior.decode("intent"), posterior.weights, strict=True))
    expected = np.exp(likelihood) / np.exp(likelihood).sum()
    np.testing.assert_allclose([share[intent] for intent in FORM["intents"]], expected, atol=1e-6)


def test_replies_are_given_what_comes_next(lm: LM) -> None:
    """By hand: the sum over intents, styles and both candidate replies, each with the same next turn."""
    program = small(lm, replies=1, max_tokens=1)
    posterior = exact_posterior(program)("ca", "b")
    terms = []
    for intent in FORM["intents"]:
        channel = float(lm(f"sw{intent}.uhi.a").log_prob(lm.encode("ca")))
        for style in FORM["styles"]:
            law = lm(f"sg{style}.uca.a", max_tokens=1, stop=".")
            replies = law.enumerate_support()
            following = lm(f"sw{intent}.uhi.aca.u", replies, ".a").log_prob(lm.encode("b"))
            terms.append(channel + (law.log_prob(replies) + following).logsumexp(0) - np.log(4))
    assert posterior.log_evidence == pytest.approx(float(torch.stack(terms).logsumexp(0)), abs=1e-6)


@pytest.mark.long
def test_candidates_share_intent_and_style(lm: LM) -> None:
    """Two candidates: an unbiased estimate of the enumerated evidence."""
    program = small(lm, replies=2, max_tokens=1)
    exact = exact_posterior(program)("ca", "b").log_evidence
    guide = PromptGuide(program, lm, prompt={"intent": lambda message: [message], "style": lambda: ["a"]})
    pyro.set_rng_seed(0)
    posterior = importance(program, guide, 3000, progress=False)("ca", "b")
    assert posterior.samples["reply"].shape[:2] == (3000, 2)
    assert abs(posterior.log_evidence - exact) < 4 * posterior.log_evidence_error
    assert posterior.log_evidence_error < 0.1


def test_in_plates_and_simulated(lm: LM) -> None:
    program = small(lm, replies=2)
    guide = AutoregressiveGuide(program, lm, rank=2, seed=0)
    rows = importance(program, guide, 3, progress=False, vectorize_data=True)(["ca", "b"], ["b", "ac"])
    assert rows.batch_shape == (2,)
    assert np.isfinite(rows.log_joint).all()
    run = pyro.poutine.trace(program).get_trace()
    assert run.nodes["next"]["value"].shape == (2, 2)
    assert not run.nodes["message"]["is_observed"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"user": "w"}, "must hold {} once"),
        ({"agent": "{}{}"}, "agent="),
        ({"replies": -1}, "not be negative"),
    ],
)
def test_dialogues_that_make_no_sense(lm: LM, keywords: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(lm, **keywords)
    with pytest.raises(ValueError, match="no reply before the next turn"):
        small(lm, replies=0)("a", "b")


@pytest.mark.long
def test_numpyro_has_the_same_evidence(tmp_path: Path) -> None:
    from llmppl.numpyro import LM as Twin
    from llmppl.numpyro import exact_posterior as twin_posterior
    from llmppl.numpyro.models import dialogue as twin_dialogue

    lm = chatting()
    lm.transformer.float().save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    ours = exact_posterior(small(lm, replies=1, max_tokens=1))("ca", "b").log_evidence
    twin = twin_dialogue(Twin.from_pretrained(tmp_path), **{**FORM, "max_tokens": 1})
    assert twin_posterior(twin)("ca", "b").log_evidence == pytest.approx(ours, abs=1e-3)
