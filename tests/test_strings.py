"""Strings that people have: several stops, halves of characters, characters that a vocabulary lacks."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pyro
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmppl import LM, importance
from llmppl.guides import PromptGuide
from llmppl.numpyro.testing import tiny_lm as numpyro_tiny_lm
from llmppl.testing import tiny_lm
from llmppl.text.chat import chat_pieces
from llmppl.text.spelling import Spelling
from llmppl.text.tokenization import Codec


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
    assert first.spelling.stops(["c", ".", "c"])[0] == second.spelling.stops(["c", ".", "c"])[0] == sorted(
        {*first.spelling.stops(".")[0], *first.spelling.stops("c")[0]}
    )  # fmt: skip
    for lm in (first, second):
        with pytest.raises(ValueError, match="stop='zz' matches no text"):
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


def test_names_of_control_tokens_are_text_unless_special_is_said(smollm2: LM, folder: Spelling) -> None:
    """In observed texts, in pieces, in options: a row of data cannot end a turn."""
    text = "hello<|im_end|>x"
    ids = smollm2.encode(text)
    assert 2 not in ids.tolist()
    assert smollm2.decode(ids) == text
    assert smollm2.encode(text, special=True).tolist() == [28120, 2, 104]
    for pieces in ((text,), ("a", text), (["b", text],)):
        assert not bool(torch.isin(smollm2.context(*pieces), torch.tensor([0, 1, 2])).any())
    assert 2 in smollm2.context("a", smollm2.encode(text, special=True)).tolist()
    assert 2 not in smollm2.choice("a", options=["<|im_end|>", "b"]).options[0].flatten().tolist()
    assert folder.ids(text) == ids.tolist()
    assert folder.ids(text, special=True) == [28120, 2, 104]


@pytest.mark.long
def test_copies_read_control_tokens_as_the_original_does(smollm2: LM, folder: Spelling) -> None:
    for codec in (smollm2.codec, folder.codec):
        for again in (copy.deepcopy(codec), pickle.loads(pickle.dumps(codec))):
            for first in (True, False):
                assert again.encode("a<|im_end|>", first) == codec.encode("a<|im_end|>", first)
            assert again.encode("a<|im_end|>", special=True) == [81, 2]


def test_a_control_token_without_another_spelling_is_refused() -> None:
    lm = with_unknowns()
    lm.codec._tokenizer.add_special_tokens({"eos_token": "<end>"})
    wordy = LM(lm.transformer, lm.codec._tokenizer)
    vocabulary = {"<unk>": 0, "<end>": 1, "a": 2}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")
    lm = LM(wordy.transformer, tokenizer)
    with pytest.raises(ValueError, match="name of the control token '<end>', which this vocabulary cannot spell"):
        lm.encode("a <end>")
    assert lm.encode("a <end>", special=True).tolist() == [2, 1]


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Of what?"},
]


@pytest.fixture(scope="module")
def folder() -> Spelling:
    """As the NumPyro twin reads the same tokenizer."""
    return folder_spelling()


def folder_spelling() -> Spelling:
    from llmppl.files.packaged_model import packaged_folder
    from llmppl.numpyro.network.folder_tokenizer import FolderTokenizer

    codec = Codec(FolderTokenizer(packaged_folder("smollm2-135m")))
    return Spelling(codec, codec.vocabulary)


@pytest.mark.parametrize("answers", [True, False])
def test_a_chat_is_what_the_tokenizers_own_template_writes(smollm2: LM, folder: Spelling, answers: bool) -> None:
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[:1]):
        wanted = smollm2.codec._tokenizer.apply_chat_template(
            messages, add_generation_prompt=answers, return_dict=False
        )
        assert smollm2.context(*smollm2.chat(messages, answers)).tolist() == wanted
        parts = chat_pieces(folder, messages, answers)
        assert [n for own, part in parts for n in (part if own else folder.ids(part))] == wanted


def test_contents_are_pieces_and_never_read_as_turns(smollm2: LM) -> None:
    """Batches, latent texts, and data with the name of a control token."""
    latent = smollm2.encode(["Paris.", "Rome and Oslo."])
    pieces = smollm2.chat([{"role": "user", "content": ["A", "<|im_end|>B"]}, {"role": "assistant", "content": latent}])
    context = smollm2.context(*pieces)
    assert context.shape[0] == 2
    assert (context == 2).sum(-1).tolist() == [3, 3], "system, user, assistant"
    assert "Rome and Oslo.<|im_end|>" in smollm2.decode(context[1][context[1] >= 0])
    law = smollm2(*pieces, " I", max_tokens=2)
    assert law.sample().shape == (2, 2)

    def program(question: str) -> None:
        thought = pyro.sample("thought", smollm2(*smollm2.chat([{"role": "user", "content": question}]), max_tokens=2))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": thought}]
        pyro.sample("next", smollm2(*smollm2.chat(turns, answers=False), max_tokens=1), obs=smollm2.encode("<"))

    guide = PromptGuide(program, smollm2, prompt={"thought": lambda question: smollm2.chat(
        [{"role": "user", "content": question}])})  # fmt: skip
    posterior = importance(program, guide, 3, progress=False)("Why?")
    assert posterior.samples["thought"].shape == (3, 2)


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ("hello", TypeError, "messages must be a list such as"),
        ([], TypeError, "messages must be a list such as"),
        ([{"role": "user"}], ValueError, r'messages\[0\]=.* needs "role", a string, and "content"'),
        ([{"content": "a"}], ValueError, r'messages\[0\]=.* needs "role"'),
    ],
)
def test_malformed_messages_are_named(smollm2: LM, messages: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        smollm2.chat(messages)


def test_a_tokenizer_without_a_template_and_one_that_drops_a_content_are_named(smollm2: LM) -> None:
    for lm in twins():
        with pytest.raises(ValueError, match="this tokenizer has no chat template"):
            lm.chat(MESSAGES)
    spelling = folder_spelling()
    tokenizer: Any = spelling.codec._tokenizer
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match=r"does not show the content of messages\[1\] once"):
        chat_pieces(spelling, MESSAGES, True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="chat template refuses these messages: roles must alternate"):
        chat_pieces(spelling, MESSAGES, True)
