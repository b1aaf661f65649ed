"""Keyword programs in NumPyro: content words, what compiled code makes of them, and inference, against torch."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
import torch
from conftest import kl
from jax import random
from numpyro import handlers
from numpyro.infer import Predictive
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llmppl import exact_posterior as torch_exact_posterior
from llmppl.numpyro import LM, exact_posterior, fit, importance, jit, smc
from llmppl.numpyro.distributions import content_word
from llmppl.numpyro.distributions.content_word import ContentWord
from llmppl.numpyro.guides import AutoregressiveGuide, PromptGuide
from llmppl.numpyro.models import keyword
from llmppl.numpyro.objectives import WakeSleep
from llmppl.numpyro.programs.tracing import structure
from llmppl.numpyro.testing import tiny_lm
from llmppl.testing import tiny_lm as torch_tiny_lm
from llmppl.text import PAD

TEXTS = ["b.cd.b.", "bcd.c.d", "a.a.a.."]
LAW: dict[str, Any] = {"max_tokens": 4, "stop": None, "temperature": 1.0, "shortest": 1}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A language model of torch, and the same one in JAX."""
    theirs, folder = torch_tiny_lm(vocabulary=5, seed=1), tmp_path_factory.mktemp("model")
    theirs.transformer.save_pretrained(folder)
    theirs.tokenizer.save_pretrained(folder)
    return SimpleNamespace(torch=theirs, jax=LM.from_pretrained(folder))


@pytest.fixture(scope="module")
def lm(twins: Any) -> LM:
    return twins.jax


@pytest.fixture(scope="module")
def exact(lm: LM) -> Any:
    return exact_posterior(keyword(lm, **LAW))("ab", "c")


def test_the_words_of_every_text_have_mass_one_and_the_probabilities_of_torch(twins: Any) -> None:
    """All 625 texts of four tokens, with every word of any of them, a word that none has, and the empty value."""
    texts = twins.torch("ab", max_tokens=4).enumerate_support()
    theirs = twins.torch.content_word(texts, 1)
    fn = twins.jax.content_word(jnp.asarray(texts.numpy(), jnp.int32), 1)
    assert isinstance(fn, ContentWord)
    assert (fn.batch_shape, fn.event_shape) == ((625,), (16,))
    assert fn.options() == theirs.options()
    words = sorted({word for own in fn.options() for word in own} | {(1,)})
    assert () in words
    total = np.zeros(625)
    for word in words:
        ids = np.full(5, PAD)
        ids[: len(word)] = word
        log_prob = fn.log_prob(jnp.asarray(ids, jnp.int32))
        np.testing.assert_allclose(log_prob, theirs.log_prob(torch.tensor(ids).expand(625, -1)), rtol=1e-6)
        total += np.exp(log_prob)
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)


def test_words_are_drawn_with_their_probabilities(lm: LM) -> None:
    fn = lm.content_word(TEXTS, shortest=1)
    drawn = fn.sample(random.key(0), (4000,))
    assert (drawn.shape, drawn.dtype) == ((4000, 3, 16), jnp.int32)
    first, second, third = (Counter(lm.decode(drawn[:, n])) for n in range(3))
    for found, words in ((first, {"b", "cd"}), (second, {"bcd", "c"})):
        assert set(found) == words
        assert abs(found["".join(words & {"b", "c"})] / 4000 - 0.5) < 0.032, "four standard errors"
    assert set(third) == {""}
    assert bool(jnp.isfinite(fn.log_prob(drawn)).all())


def test_jit_vmap_and_plates_agree_with_eager_and_read_each_text_once(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()

    def counting(text: str, shortest: int) -> list[str]:
        read[text] += 1
        return content_words(text, shortest)

    content_words = content_word.content_words
    texts = jnp.asarray(lm.encode([*TEXTS, TEXTS[0]]))
    keys = random.split(random.key(0), 4)

    def both(key: Any, text: Any) -> Any:
        word = lm.content_word(text, 1).expand((2,)).sample(key)
        return word, lm.content_word(text, 1).log_prob(word)

    eager = [both(key, text) for key, text in zip(keys, texts, strict=True)]
    monkeypatch.setattr(content_word, "content_words", counting)
    for words, log_prob in (jax.jit(jax.vmap(both))(keys, texts), jit(jax.vmap(both))(keys, texts)):
        np.testing.assert_array_equal(words, jnp.stack([own for own, _ in eager]))
        np.testing.assert_allclose(log_prob, jnp.stack([own for _, own in eager]), rtol=1e-6)
    # Two programs with two calls each.
    assert read == dict.fromkeys(TEXTS, 4)


def test_predictions_in_plates_are_words_of_their_own_sentences(lm: LM) -> None:
    def program() -> None:
        with numpyro.plate("rows", 2):
            sentence = numpyro.sample("sentence", lm(["ab", "cd"], max_tokens=4))
            numpyro.sample("keyword", lm.content_word(sentence, 1))

    drawn = Predictive(program, num_samples=50)(random.key(0))
    assert drawn["keyword"].shape == (50, 2, 16)
    assert bool(jnp.isfinite(lm.content_word(drawn["sentence"], 1).log_prob(drawn["keyword"])).all())
    trace = handlers.trace(handlers.seed(program, 0)).get_trace()
    assert trace["keyword"]["fn"].log_prob(trace["keyword"]["value"]).shape == (2,)


@pytest.mark.long
def test_the_evidence_is_that_of_torch_and_samplers_agree(twins: Any, lm: LM, exact: Any) -> None:
    theirs = torch_exact_posterior(keyword(twins.torch, **LAW))("ab", "c")
    assert float(exact.log_evidence) == pytest.approx(float(theirs.log_evidence), abs=1e-4)
    program = keyword(lm, **LAW)
    prior = PromptGuide(program, lm, prompt={"sentence": lambda beginning: [beginning]})
    drawn = importance(program, prior, 2048, progress=False)(random.key(0), "ab", "c")
    walked = smc(program, num_samples=2048, progress=False)(random.key(0), "ab", "c")
    error = float(drawn.log_evidence_error)
    assert error < 0.1
    for posterior in (drawn, walked):
        assert abs(float(posterior.log_evidence - exact.log_evidence)) < 4 * error
        assert posterior.observed["keyword"].tolist() == [3]


def test_upper_case_and_space_do_not_count_in_compiled_code_either() -> None:
    lm = tiny_lm(vocabulary=5)
    characters = Tokenizer(models.BPE({c: n for n, c in enumerate(".ĠbcB")}, merges=[]))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters.decoder = decoders.ByteLevel()
    lm.tokenizer.backend_tokenizer = characters
    lm = LM(lm.weights, lm.architecture, lm.tokenizer)
    run = jit(
        lambda word: handlers.trace(handlers.seed(keyword(lm, **LAW), 0)).get_trace("b", word)["keyword"]["value"]
    )
    assert lm.decode(run(lm.argument([" B", "b"]))) == ["b", "b"]


def test_a_keyword_may_be_token_ids_in_both_frameworks(twins: Any, exact: Any) -> None:
    theirs = torch_exact_posterior(keyword(twins.torch, **LAW))("ab", twins.torch.encode("c"))
    assert float(theirs.log_evidence) == pytest.approx(float(exact.log_evidence), abs=1e-4)
    ours = structure(keyword(twins.jax, **LAW), ("ab", twins.jax.encode("c")), {})["keyword"]["value"]
    assert ours.tolist() == [3, *[PAD] * 15]


def test_rows_of_a_plate_are_observations_of_their_own(lm: LM, exact: Any) -> None:
    program = keyword(lm, **LAW)
    guide = PromptGuide(program, lm)
    rows = importance(program, guide, 256, vectorize_data=True, progress=False)(random.key(0), ["ab", "ab"], ["c", "b"])
    assert rows.log_evidence.shape == (2,)
    assert abs(rows.log_evidence[0] - exact.log_evidence) < 4 * rows.log_evidence_error[0]


@pytest.mark.long
def test_a_guide_that_sleeps_is_told_the_simulated_word_and_comes_nearer_the_posterior(lm: LM, exact: Any) -> None:
    program = keyword(lm, **LAW)
    told = []

    def word_first(beginning: Any, keyword: Any) -> list[Any]:
        told.append(keyword)
        return [keyword, beginning]

    guide = AutoregressiveGuide(program, lm, prompt={"sentence": word_first}, rank=4, seed=0)
    texts = jnp.asarray(exact.samples["sentence"], jnp.int32)
    log_p = torch.as_tensor(exact.log_weights - exact.log_evidence)
    some = torch.isfinite(log_p)

    def divergence() -> float:
        fn = handlers.trace(handlers.seed(guide, 0)).get_trace("ab", "c")["sentence"]["fn"]
        return kl(log_p[some], torch.as_tensor(np.array(fn.log_prob(texts)))[some])

    before = divergence()
    told.clear()
    objective = WakeSleep(32, insomnia=0.0)
    fit(program, guide, [("ab", "c")], objective, steps=30, learning_rate=1e-2, warmup_steps=1, progress=False)
    simulated = [value for value in told if hasattr(value, "shape")]
    assert {value.shape for value in simulated if isinstance(value, jax.core.Tracer)} == {(16,)}
    assert divergence() < before / 2


@pytest.mark.parametrize(
    ("word", "message"),
    [("", "keyword is empty"), ("two words", "is 2 words"), ("x2", "characters that no word"), ("the", "stop word")],
)
def test_what_is_no_keyword_is_refused(lm: LM, word: str, message: str) -> None:
    program = keyword(lm)
    with pytest.raises(ValueError, match=message):
        importance(program, PromptGuide(program, lm), 2)(random.key(0), "ab", word)
    with pytest.raises(ValueError, match=message):
        exact_posterior(program)("ab", [word])


def test_what_is_no_keyword_is_refused_where_it_is_encoded_already(lm: LM) -> None:
    program = keyword(lm)
    with pytest.raises(ValueError, match="'clean' raised ValueError for the inputs .*content words have 3 to 16"):
        handlers.seed(program, 0)(lm.argument("ab"), lm.argument("cd"))


def test_a_beginning_without_text_is_refused(lm: LM) -> None:
    program = keyword(lm, shortest=1)
    run = importance(program, PromptGuide(program, lm), 2, vectorize_data=True)
    with pytest.raises(ValueError, match=r"beginning\[1\]=' ' has no text"):
        run(random.key(0), ["ab", " "], ["b", "c"])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda lm: lm.content_word(None), TypeError, "text must be a string, .* or a text array, got None"),
        (lambda lm: lm.content_word(jnp.ones(2)), TypeError, "text must hold integer token ids, got dtype float32"),
        (lambda lm: lm.content_word(jnp.int32(2)), ValueError, "text must have a token dimension"),
        (lambda lm: lm.content_word(jnp.array([9])), ValueError, "text holds the token id 9"),
        (lambda lm: lm.content_word(jnp.array([-1, 2])), ValueError, "text has padding before a token"),
        (lambda lm: lm.content_word("b.").log_prob("b"), TypeError, "value is a string, 'b'"),
        (lambda lm: lm.content_word(["b.", "c."]).log_prob(jnp.ones((3, 1), int)), ValueError, "does not broadcast"),
        (lambda lm: lm.content_word(["b.", "c."]).expand((3,)), ValueError, "cannot be expanded"),
    ],
)
def test_errors_say_what_was_wrong(lm: LM, call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(lm)


def test_a_guide_refuses_a_latent_word(lm: LM) -> None:
    def program() -> None:
        numpyro.sample("word", lm.content_word("b.cd.", 1))

    with pytest.raises(ValueError, match="which no guide changes"):
        handlers.seed(PromptGuide(program, lm), 0)()
