"""Keyword programs: words, the automaton, content words, the twisted law, and the guide that learns it."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from conftest import kl
from pyro import poutine
from torch import Tensor

from llmppl import LM, bounds, exact_posterior, fit, held_out_gain, importance, simulate
from llmppl.distributions import ContentWord, TwistedText
from llmppl.distributions.twisted_text import WordTwist
from llmppl.guides import AutoregressiveGuide, PromptGuide, WordGuide
from llmppl.models import keyword
from llmppl.objectives import WakeSleep
from llmppl.text.word_automaton import BETWEEN, HAS, WordTokens
from llmppl.text.words import as_keyword, content_words, words


@pytest.fixture
def small() -> LM:
    from llmppl.testing import tiny_lm

    return tiny_lm(vocabulary=5, seed=1, dtype=torch.float64)


def test_words_are_whole_words_and_content_words_are_outside_the_stop_list() -> None:
    assert words("The dog's bone, and dogs. A cut wor") == ["the", "dog's", "bone", "and", "dogs", "a", "cut"]
    assert content_words(" The Dog saw a dog and the garden's gate. Unfinis") == ["dog", "garden's", "gate"]
    assert content_words("") == []
    assert as_keyword(" Garden ") == "garden"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("", "keyword is empty"),
        ("two words", "is 2 words"),
        ("naïve", "characters that no word"),
        ("x2", "characters that no word"),
        ("the", "stop word"),
        ("ox", "2 letters"),
        ("a" * 17, "17 letters"),
    ],
)
def test_what_is_no_keyword_is_refused(small: LM, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_keyword(word)
    with pytest.raises(ValueError, match=message):
        importance(keyword(small), PromptGuide(keyword(small), small), 2)("ab", word)


def test_a_beginning_without_text_is_refused(small: LM) -> None:
    program = keyword(small, shortest=1)
    with pytest.raises(ValueError, match=r"beginning\[1\]=' ' has no text"):
        importance(program, PromptGuide(program, small), 2, vectorize_data=True)(["ab", " "], ["b", "c"])


def test_the_automaton_reads_tokens_as_a_reader_reads_words() -> None:
    """20,000 random token sequences against a search of the text; tokens hold half words and several words."""
    texts = [".", " ", "a", "b", "ab", "ba", " a", " ab", " b", "ab.", "a b", " ab ", "aba", "b.a", "aab", "'", "a'b"]
    tokens = WordTokens([*texts, "", ".ab", "ab ab", "é", " Ab"])
    texts = tokens.texts
    generator = random.Random(0)
    for _ in range(20_000):
        word = generator.choice(["ab", "aba", "a", "aab", "ba", "a'b"])
        row = [generator.randrange(len(texts)) for _ in range(generator.randint(1, 6))]
        has = word in words("".join(texts[n] for n in row))
        assert (tokens.states(word, BETWEEN, row)[-1] == HAS) == has, (word, [texts[n] for n in row])


@pytest.mark.parametrize("merged", [["a\n", "ab\n", "\nab", "b\n\n"], ["İ", "aİ", "\u212a", "\u212aab", "AB", "B"]])
def test_the_automaton_agrees_with_the_words_of_the_text_as_it_is_written(merged: list[str]) -> None:
    """Of tokens that merge letters with a newline, and of letters that only lower case makes: İ (i), Kelvin (k)."""
    texts = ["a", "b", "i", "k", " ", "\n", ".", *merged]
    tokens = WordTokens(texts)
    generator, agreed = random.Random(0), {True: 0, False: 0}
    for _ in range(10_000):
        word = generator.choice(["ab", "a", "b", "i", "k", "kab", "ai"])
        row = [generator.randrange(len(texts)) for _ in range(generator.randint(1, 6))]
        has = word in words("".join(texts[n] for n in row))
        assert (tokens.states(word, BETWEEN, row)[-1] == HAS) == has, (word, [texts[n] for n in row])
        agreed[has] += 1
    assert min(agreed.values()) > 500


def test_content_words_have_mass_one_and_zero_for_what_is_no_word_of_the_text(small: LM) -> None:
    texts = torch.stack([small.encode("b.cd.b."), small.encode("bcd.c.d"), small.encode("a.a.a..")])
    fn = small.content_word(texts, shortest=1)
    assert isinstance(fn, ContentWord)
    assert [[small.decode(torch.tensor(w)) if w else "" for w in own] for own in fn.options()] == [
        ["b", "cd"],
        ["bcd", "c"],
        [""],
    ]
    candidates = [small.encode(word) for word in ("b", "cd", "bcd", "c", "d", "a", "db")] + [torch.full((1,), -1)]
    scores = torch.stack([fn.log_prob(word.expand(3, -1)) for word in candidates]).exp()
    torch.testing.assert_close(scores.sum(0), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(scores[:2, 0], torch.full((2,), 0.5, dtype=torch.float64))
    pyro.set_rng_seed(0)
    drawn = fn.sample((4000,))
    assert drawn.shape == (4000, 3, 16)
    assert bool(torch.isfinite(fn.log_prob(drawn)).all())
    share = (drawn[:, 0, :2] == small.encode("cd")).all(-1).double().mean()
    assert abs(share - 0.5) < 0.03, "four standard errors"


def twisted(lm: LM, word: str, stop: str | None = ".", seed: int = 0, length: int = 4) -> TwistedText:
    torch.manual_seed(seed)
    twist = WordTwist(8).double()
    with torch.no_grad():
        for parameter in twist.parameters():
            parameter.add_(torch.randn_like(parameter))
    prior = lm("ab", max_tokens=length, stop=stop, temperature=0.7)
    return TwistedText(lm, prior.context, prior.law, lm.encode(word) if word else torch.full((1,), -1), twist)


@pytest.mark.parametrize("stop", [None, "."])
@pytest.mark.parametrize("word", ["b", "cd", "bcb", ""])
def test_the_twisted_law_sums_to_one_and_is_the_formula(small: LM, word: str, stop: str | None) -> None:
    fn = twisted(small, word, stop)
    texts = fn.enumerate_support()
    log_q = fn.log_prob(texts).detach()
    assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    prior = small("ab", max_tokens=4, stop=stop, temperature=0.7)
    if not word:
        torch.testing.assert_close(log_q, prior.log_prob(texts))
        return
    ended = torch.tensor([stop is not None and text.rstrip("☐").endswith(".") for text in map(small.decode, texts)])
    has = torch.tensor([word in words(small.decode(text)) for text in texts])
    assert bool(torch.isneginf(log_q[ended & ~has]).all()), "a text that ends without the word"
    assert bool(torch.isfinite(log_q[has]).all())
    # Token by token from the base law: p(v) exp(b(class of v)), normalised over the vocabulary.
    walk_log_q = torch.zeros(len(texts), dtype=torch.float64)
    from llmppl.distributions.word_classes import WordWalk

    walk = WordWalk(small, fn.law, [word] * len(texts), fn.twist)
    for t in range(4):
        here = texts[:, t] >= 0
        beginnings = [tuple(text[:t].tolist()) for text in texts]
        laws = {ids: _next(small, torch.tensor(ids, dtype=torch.long)) for ids in set(beginnings)}
        logits = torch.stack([laws[ids] for ids in beginnings])
        law = walk(logits, list(range(len(texts))), texts[:, :t])
        walk_log_q += torch.where(here, law.gather(-1, texts[:, t].clamp(min=0)[:, None])[:, 0], 0.0)
    torch.testing.assert_close(walk_log_q[torch.isfinite(log_q)], log_q[torch.isfinite(log_q)])


def _next(lm: LM, text: Tensor) -> Tensor:
    """log p of every token behind ``ab`` and a text, at temperature 0.7; whatever behind its end."""
    with torch.no_grad():
        ids = torch.cat([lm.encode("ab"), text[text >= 0]])[None]
        return (lm.transformer(ids).logits[0, -1] / 0.7).log_softmax(-1)


@pytest.mark.long
def test_twisted_draws_follow_the_law_and_their_log_probability_is_recorded(small: LM) -> None:
    fn = twisted(small, "cd")
    pyro.set_rng_seed(1)
    drawn = fn.sample((6000,))
    recorded = fn._memo.take(False).sum(-1)
    again = twisted(small, "cd").log_prob(drawn).detach()
    torch.testing.assert_close(recorded, again)
    texts = fn.enumerate_support()
    q = fn.log_prob(texts).detach().exp()
    count = (drawn[:, None] == texts).all(-1).sum(0).double()
    common = q * 6000 > 5
    statistic = ((count - 6000 * q)[common] ** 2 / (6000 * q[common])).sum()
    assert float(statistic) < int(common.sum()) + 4 * (2 * int(common.sum())) ** 0.5, "chi-square, four deviations"


def test_batches_of_words_are_scored_as_one_by_one_and_from_memory(small: LM) -> None:
    alone = [twisted(small, word) for word in ("b", "cd")]
    texts = alone[0].enumerate_support()[::11]
    both = TwistedText(small, alone[0].context, alone[0].law, torch.tensor([[2, -1], [3, 4]])[:, None], alone[0].twist)
    expected = torch.stack([fn.log_prob(texts) for fn in alone])
    alone[0].twist.read.clear()
    for _ in range(2):
        torch.testing.assert_close(both.expand((2, 1)).log_prob(texts[None]), expected)


def test_the_gradient_of_the_twist_is_that_of_finite_differences(small: LM) -> None:
    fn = twisted(small, "cd")
    texts = torch.stack([text for text in fn.enumerate_support() if "cd" in words(small.decode(text))][:6])
    weight = next(fn.twist.parameters())
    fn.log_prob(texts).sum().backward()
    assert weight.grad is not None
    gradient = weight.grad.clone()
    place = tuple(np.unravel_index(int(gradient.abs().argmax()), gradient.shape))
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            weight[place] += step
            values.append(float(fn.log_prob(texts).sum()))
    assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


@pytest.mark.long
def test_a_trained_word_guide_comes_near_the_exact_posterior_of_every_word(small: LM) -> None:
    """Sleep on all words of every simulated sentence, a stop token and no stop alike; told no word in training."""
    program = keyword(small, max_tokens=4, stop=None, temperature=1.0, shortest=1)
    guide = WordGuide(program, small, seed=0)
    fit(
        program,
        guide,
        [("ab", "b")],
        WakeSleep(48, insomnia=0.0, exhaust=["keyword"]),
        steps=150,
        learning_rate=1e-2,
        schedule="cosine",
        progress=False,
    )
    for word in ("b", "c", "bb"):
        exact = exact_posterior(program)("ab", word)
        texts = torch.as_tensor(exact.samples["sentence"])
        log_p = torch.as_tensor(exact.log_weights - exact.log_evidence)
        some = torch.isfinite(log_p)
        with torch.no_grad():
            fn = poutine.trace(guide).get_trace("ab", word).nodes["sentence"]["fn"]
            log_q, prior = fn.log_prob(texts), small("ab", max_tokens=4, temperature=1.0).log_prob(texts)
        near, far = (kl(log_p[some], other[some]) for other in (log_q, prior))
        assert near < 0.45 < 2.0 < far, word
        posterior = importance(program, guide, 400, progress=False, defensive=0.1)("ab", word)
        assert abs(float(posterior.log_evidence - exact.log_evidence)) < 4 * float(posterior.log_evidence_error) + 1e-9


@pytest.mark.long
def test_all_words_of_a_sentence_are_the_expectation_of_a_sampled_one(small: LM) -> None:
    """The gradient of the exhausted sleep loss against the mean of 300 sampled ones, at the same sentences."""
    program = keyword(small, max_tokens=9, stop=None, temperature=1.0, shortest=1)
    guide = WordGuide(program, small, hidden=4, seed=0)
    pairs = simulate(program, [("ab", "b")], 40, seed=0, progress=False)
    from llmppl.programs.plates import in_data_plate
    from llmppl.programs.simulated_pair import with_pair
    from llmppl.training.collation import collate

    pair = collate([pairs[n] for n in range(len(pairs))])
    rows, proposal = in_data_plate(program), in_data_plate(guide)
    bias = dict(guide.twist.named_parameters())["layers.4.bias"]

    def gradient(exhaust: tuple[str, ...]) -> Tensor:
        guide.zero_grad()
        WakeSleep(1, insomnia=0.0, exhaust=exhaust).loss_and_grads(with_pair(rows, pair), proposal, *pair)
        assert bias.grad is not None
        return bias.grad.clone()

    whole = gradient(("keyword",))
    options = small.content_word(pair.latents["sentence"], 1).options()
    assert max(map(len, options)) > 1
    sampled = []
    for seed in range(300):
        pyro.set_rng_seed(seed)
        pair.observations = {"keyword": small.content_word(pair.latents["sentence"], 1).sample()}
        sampled.append(gradient(()))
    found = torch.stack(sampled)
    error = found.std(0) / 300**0.5
    assert bool(((found.mean(0) - whole).abs() < 4 * error + 1e-9).all())


def test_unknown_sites_are_refused_by_name(small: LM) -> None:
    program = keyword(small, shortest=1)
    with pytest.raises(ValueError, match=r"exhaust= names 'sentence'.*\['keyword'\]"):
        WakeSleep(2, insomnia=0.0, exhaust=["sentence"]).loss(program, WordGuide(program, small), "ab", "b")
    with pytest.raises(TypeError, match="exhaust must be a list of strings"):
        WakeSleep(2, exhaust="keyword")
    with pytest.raises(ValueError, match="word='word' is no observed text site"):
        importance(program, WordGuide(program, small, word="word"), 2)("ab", "b")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:each of the")  # read often, which is no harm here
def test_the_gain_is_the_mutual_information_less_the_divergence(small: LM) -> None:
    """By enumeration: mean over pairs of log q − log p is MI − KL(p‖q), and zero for the prior."""
    program = keyword(small, max_tokens=3, stop=None, temperature=1.0, shortest=1)
    pairs = simulate(program, [("ab", "b")], 600, seed=0, progress=False)
    prior = PromptGuide(program, small, prompt={"sentence": lambda beginning: [beginning]})
    assert held_out_gain(program, prior, pairs).values == pytest.approx(0.0, abs=1e-9)
    guide = WordGuide(program, small, seed=0)
    fit(program, guide, pairs, WakeSleep(1, insomnia=0.0), steps=40, batch_size=60, vectorize_data=True,
        learning_rate=1e-2, progress=False)  # fmt: skip
    fn = small("ab", max_tokens=3, temperature=1.0)
    texts = fn.enumerate_support()
    log_p = fn.log_prob(texts)
    expected = torch.zeros((), dtype=torch.float64)
    for word in sorted({word for own in small.content_word(texts, 1).options() for word in own}):
        ids = torch.tensor(word if word else (-1,))
        likelihood = small.content_word(texts, 1).log_prob(ids.expand(len(texts), -1))
        with torch.no_grad():
            told = TwistedText(small, fn.context, fn.law, ids, guide.twist).log_prob(texts)
        joint = (log_p + likelihood).exp()
        expected += (joint * torch.where(joint > 0, told - log_p, 0.0)).sum()
    gain = held_out_gain(program, guide, pairs)
    assert gain.error < 0.1
    assert abs(gain.mean - float(expected)) < 4 * gain.error
    assert re.fullmatch(r"Gain\(.* nats over 600 pairs\)", repr(gain))
    one = held_out_gain(program, guide, pairs[:5], vectorize_data=False)
    np.testing.assert_allclose(one.values, gain.values[:5], atol=1e-9)


@pytest.mark.long
def test_bounds_bracket_with_a_word_guide_that_is_told_the_simulated_word(small: LM) -> None:
    program = keyword(small, max_tokens=4, stop=None, temperature=1.0, shortest=1)
    guide = WordGuide(program, small, seed=0)
    pyro.set_rng_seed(0)
    found = bounds(program, guide, num_samples=64, simulations=60)("ab", "b")
    assert found.upper is not None
    assert bool(np.isfinite(found.upper).all()), "every simulated sentence is one that the guide can write"
    low, high = found.log_evidence
    assert high is not None
    assert low.value <= high.value


def test_a_guide_is_saved_read_back_and_refused_where_it_does_not_fit(small: LM, tmp_path: Path) -> None:
    program = keyword(small, shortest=1)
    guide = WordGuide(program, small, hidden=4, seed=1)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(1.0)
    guide.save(tmp_path / "word.safetensors")
    other = WordGuide(program, small, hidden=4, seed=2)
    other.load(tmp_path / "word.safetensors")
    for mine, its in zip(guide.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its)
    with pytest.raises(ValueError, match="hidden is 4"):
        WordGuide(program, small, hidden=8).load(tmp_path / "word.safetensors")
    assert "word='keyword', 5,444 parameters" in repr(WordGuide(program, small))


@pytest.mark.filterwarnings("ignore:each of the")  # read often, which is no harm here
def test_other_guides_learn_keywords_too(small: LM) -> None:
    """An adapter that is told the word, from the same simulated sentences."""
    program = keyword(small, max_tokens=3, stop=None, temperature=1.0, shortest=1)
    guide = AutoregressiveGuide(program, small, rank=4, seed=0)
    pairs = simulate(program, [("ab", "b")], 240, seed=0, progress=False)
    unseen = simulate(program, [("ab", "b")], 120, seed=1, progress=False)
    before = held_out_gain(program, guide, unseen)
    fit(program, guide, pairs, WakeSleep(1, insomnia=0.0), steps=30, batch_size=40, vectorize_data=True,
        learning_rate=1e-2, progress=False)  # fmt: skip
    assert held_out_gain(program, guide, unseen).mean > before.mean + 0.3


def test_laws_that_differ_in_their_stops_or_tokens_alone_are_read_apart(small: LM) -> None:
    twist = WordTwist(8).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in twist.parameters():
            parameter.add_(torch.randn_like(parameter))
    for options in ({"stop": "."}, {"stop": "b"}, {"stop": ".", "allowed": [0, 1, 2]}):
        prior = small("ab", max_tokens=4, **options)
        fn = TwistedText(small, prior.context, prior.law, small.encode("cd"), twist)
        mass = float(fn.log_prob(fn.enumerate_support()).detach().exp().sum())
        assert mass == pytest.approx(1.0, abs=1e-9), options
