"""Strings that people have: several stops, halves of characters, characters that a vocabulary lacks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmppl import LM
from llmppl.numpyro.testing import tiny_lm as numpyro_tiny_lm
from llmppl.testing import tiny_lm


def twins() -> list[Any]:
    return [tiny_lm(), numpyro_tiny_lm()]


def test_several_stop_strings_are_the_tokens_of_any_of_them() -> None:
    """The law ends at each of them, sums to one, and is that of the ids."""
    lm = tiny_lm()
    fn = lm("ab", max_tokens=3, stop=[".", "c"])
    texts = fn.enumerate_support()
    assert float(fn.log_prob(texts).exp().sum()) == pytest.approx(1.0, abs=1e-5)
    ended = [text for text in lm.decode(texts) if len(text) < 3]
    assert {text[-1] for text in ended} == {".", "c"}
    assert not any(stop in text[:-1] for text in lm.decode(texts) for stop in ".c")
    ids = [int(lm.encode(stop)[0]) for stop in (".", "c")]
    torch.testing.assert_close(lm("ab", max_tokens=3, stop=ids).log_prob(texts), fn.log_prob(texts))


def test_the_twins_have_the_same_stops() -> None:
    first, second = twins()
    assert first.spelling.stops(["c", ".", "c"]) == second.spelling.stops(["c", ".", "c"]) == sorted(
        {*first.spelling.stops("."), *first.spelling.stops("c")}
    )  # fmt: skip
    for lm in (first, second):
        with pytest.raises(ValueError, match="stop='zz' matches no token"):
            lm("ab", max_tokens=3, stop=[".", "zz"])
        with pytest.raises(TypeError, match=r"stop=\[None\] must be a string, a list of strings, or token ids"):
            lm("ab", max_tokens=3, stop=[None])
        with pytest.raises(ValueError, match="stop= is empty"):
            lm("ab", max_tokens=3, stop=[])


def test_half_a_character_is_refused_by_its_place() -> None:
    for lm in twins():
        for call in (
            lambda lm: lm.encode("a\ud83d."),
            lambda lm: lm("a\udc80", max_tokens=2),
            lambda lm: lm.encode(["a", "\udfff"]),
        ):
            with pytest.raises(ValueError, match=r"has a lone surrogate, '\\ud...'.*Give whole characters"):
                call(lm)
        # A whole character beyond the basic plane is one, and no half of one.
        lm.spelling.ids("a")


def with_unknowns() -> LM:
    """Words by letters, with ``<unk>`` for all other signs, as unigram vocabularies have it."""
    vocabulary = {sign: n for n, sign in enumerate(["<unk>", *"abc."])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    config = LlamaConfig(vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=32)  # fmt: skip
    return LM(LlamaForCausalLM(config), tokenizer)


def test_an_observed_text_with_unknown_characters_warns_with_them() -> None:
    lm = with_unknowns()
    with pytest.warns(UserWarning, match=r"the observed text 'a\?b!' has '!', '\?', which .*'<unk>' is observed"):
        lm.encode("a?b!")
    with pytest.warns(UserWarning, match="'é'"):
        lm.encode(["abc", "é"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm.encode("abc.")
        lm("a?", max_tokens=2)  # a context is not observed
        tiny_lm().encode("ab")


def test_a_byte_level_vocabulary_knows_all(smollm2: LM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = "naïve 😀 <|endoftext|>"
        assert smollm2.decode(smollm2.encode(text)) == text
