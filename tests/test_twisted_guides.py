"""A twisted law is the law wherever a guide is written token by token: search, decoding, chains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pyro import poutine
from torch import Tensor

from llmppl import LM, decode, smc
from llmppl.guides import WordGuide
from llmppl.inference.rewriting import rewrite
from llmppl.models import keyword
from llmppl.objectives import SubTrajectoryBalance
from llmppl.programs.plates import in_data_plate
from llmppl.programs.structure import Program
from llmppl.testing import tiny_lm


@pytest.fixture
def small() -> LM:
    return tiny_lm(vocabulary=5, seed=1, dtype=torch.float64)


class Told:
    """A small keyword program without an end, and a guide whose twist is at random."""

    def __init__(self, lm: LM) -> None:
        self.program = keyword(lm, max_tokens=4, stop=None, temperature=1.0, shortest=1)
        self.guide = WordGuide(self.program, lm, hidden=4, seed=0)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in self.guide.twist.parameters():
                parameter.add_(torch.randn_like(parameter))
        self.words = ["b", "cd"]
        self.fns = [poutine.trace(self.guide).get_trace("ab", word).nodes["sentence"]["fn"] for word in self.words]


def test_smc_draws_from_the_twisted_law(small: LM) -> None:
    """Of two rows with a word each: without resampling the weights are those of the twisted law, to the digit."""
    told = Told(small)
    run = smc(told.program, told.guide, 60, ess_threshold=0.0, vectorize_data=True, seed=0, progress=False)
    posterior = run(["ab"] * 2, told.words)
    for row, (word, fn) in enumerate(zip(told.words, told.fns, strict=True)):
        texts = torch.as_tensor(posterior.samples["sentence"])[:, row]
        log_p = torch.stack([_joint(told.program, word, text) for text in texts])
        with torch.no_grad():
            expected = log_p - fn.log_prob(texts)
        np.testing.assert_allclose(posterior.log_weights[:, row], expected.numpy(), atol=1e-9)


def _joint(program: Program, word: str, text: Tensor) -> Tensor:
    return poutine.trace(poutine.condition(program, {"sentence": text})).get_trace("ab", word).log_prob_sum()


def test_greedy_decoding_follows_the_twisted_law(small: LM) -> None:
    told = Told(small)
    answers = decode(told.program, told.guide, vectorize_data=True)(["ab"] * 2, told.words).samples["sentence"][0]
    for answer, fn in zip(answers, told.fns, strict=True):
        texts = fn.enumerate_support()
        with torch.no_grad():
            q = fn.log_prob(texts).exp()
        begun = torch.ones(len(texts), dtype=torch.bool)
        for t in range(4):
            mass = torch.stack([q[begun & (texts[:, t] == v)].sum() for v in range(small.vocabulary)])
            begun &= texts[:, t] == mass.argmax()
        assert texts[begun].tolist() == [answer.tolist()]


def test_beams_follow_the_twisted_law(small: LM) -> None:
    """Sixty beams have the five best texts of the twisted law, which sixty of the prior's have not."""
    told = Told(small)

    def found(guide: Program | None) -> list[set[tuple[int, ...]]]:
        texts = decode(told.program, guide, "beam", num_beams=60, vectorize_data=True)(["ab"] * 2, told.words)
        return [set(map(tuple, texts.samples["sentence"][:, row].tolist())) for row in range(2)]

    best = []
    for fn in told.fns:
        texts = fn.enumerate_support()
        with torch.no_grad():
            best.append(set(map(tuple, texts[fn.log_prob(texts).topk(5).indices].tolist())))
    assert all(five <= beams for five, beams in zip(best, found(told.guide), strict=True))
    assert not all(five <= beams for five, beams in zip(best, found(None), strict=True))


def test_rewriting_a_whole_text_has_the_density_of_the_twisted_law(small: LM) -> None:
    """Rows with a word each, taken out of a batch as the moves of a chain take them."""
    told = Told(small)
    texts = told.fns[0].enumerate_support()[::7]
    fn = poutine.trace(in_data_plate(told.guide)).get_trace(["ab"] * 2, told.words).nodes["sentence"]["fn"]
    for row, alone in enumerate(told.fns):
        index = torch.full((len(texts),), row)
        with torch.no_grad():
            expected = alone.log_prob(texts)
            _, log_q = rewrite(fn.rows(index), texts, torch.zeros_like(index), 4, texts)
        torch.testing.assert_close(log_q, expected)


def test_flows_and_prefix_states_need_texts_that_can_end(small: LM) -> None:
    program = keyword(small, max_tokens=4, shortest=1)
    guide = WordGuide(program, small, hidden=4, seed=0)
    with pytest.raises(ValueError, match="twisted towards a word"):
        smc(program, guide, 4, "flows")("ab", "b")
    with pytest.raises(ValueError, match="twisted towards a word"):
        SubTrajectoryBalance(4).loss(program, guide, "ab", "b")
    assert smc(program, guide, 64, seed=0, progress=False)("ab", "b").num_samples == 64
