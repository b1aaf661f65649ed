"""Bad input in JAX is answered as in torch, and good input has the same values: one table for both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import llmppl
from llmppl import Grammar
from llmppl.numpyro import LM
from llmppl.numpyro.testing import tiny_lm
from llmppl.testing import tiny_lm as torch_tiny_lm
from llmppl.text import PAD


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm(6)


# (name, a call of a language model and a maker of arrays): torch's own test names the messages.
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "empty context": lambda lm, ids: lm(""),
    "no context": lambda lm, ids: lm(max_tokens=2),
    "empty row": lambda lm, ids: lm(["a", ""]),
    "empty choice": lambda lm, ids: lm.choice("", options=["a", "b"]),
    "stop matches nothing": lambda lm, ids: lm("a", max_tokens=2, stop="§"),
    "empty stop": lambda lm, ids: lm("a", max_tokens=2, stop=""),
    "no stop ids": lambda lm, ids: lm("a", max_tokens=2, stop=[]),
    "stop id": lambda lm, ids: lm("a", max_tokens=2, stop=6),
    "max_tokens 0": lambda lm, ids: lm("a", max_tokens=0),
    "max_tokens float": lambda lm, ids: lm("a", max_tokens=2.5),
    "min negative": lambda lm, ids: lm("a", max_tokens=2, min_tokens=-1),
    "min over max": lambda lm, ids: lm("a", max_tokens=2, min_tokens=3),
    "temperature": lambda lm, ids: lm("a", max_tokens=2, temperature=0.0),
    "temperature infinite": lambda lm, ids: lm("a", max_tokens=2, temperature=float("inf")),
    "temperature nan": lambda lm, ids: lm("a", max_tokens=2, temperature=float("nan")),
    "stop without end": lambda lm, ids: lm("a", stop="."),
    "grammar without end": lambda lm, ids: lm("a", grammar=Grammar.regex("ab")),
    "allowed ids": lambda lm, ids: lm("a", max_tokens=2, allowed=[7]),
    "allowed floats": lambda lm, ids: lm("a", max_tokens=2, allowed=[0.5]),
    "allowed nothing": lambda lm, ids: lm("a", max_tokens=2, allowed=ids([False] * 6)),
    "allowed mask": lambda lm, ids: lm("a", max_tokens=2, allowed=ids([True] * 5)),
    "allowed without stop": lambda lm, ids: lm("a", max_tokens=2, stop=".", allowed=[1, 2]),
    "allowed only stops": lambda lm, ids: lm("a", max_tokens=3, min_tokens=2, stop=".", allowed=[0]),
    "ids as list": lambda lm, ids: lm([1, 2]),
    "piece out of vocabulary": lambda lm, ids: lm(ids([1, 6])),
    "piece with hole": lambda lm, ids: lm("a", ids([1, PAD, 2])),
    "batch shapes": lambda lm, ids: lm(["a", "b", "c"], "d", lm.encode(["a", "b"])),
    "too long": lambda lm, ids: lm("a" * 60, max_tokens=10),
    "too long an observation": lambda lm, ids: lm("a" * 60).log_prob(lm.encode("abcab")),
    "grammar": lambda lm, ids: lm("a", max_tokens=3, grammar=Grammar.regex("(a")),
    "encode nothing": lambda lm, ids: lm.encode(""),
    "encode empty row": lambda lm, ids: lm.encode(["a", ""]),
    "encode array": lambda lm, ids: lm.encode(ids([1])),
    "encode no rows": lambda lm, ids: lm.encode([]),
    "decode string": lambda lm, ids: lm.decode("abc"),
    "decode ids": lambda lm, ids: lm.decode(ids([9])),
    "value string": lambda lm, ids: lm("a").log_prob("b"),
    "value id": lambda lm, ids: lm("a").log_prob(ids([6])),
    "value below PAD": lambda lm, ids: lm("a").log_prob(ids([-2])),
    "value hole": lambda lm, ids: lm("a").log_prob(ids([PAD, 2])),
    "value batch": lambda lm, ids: lm(["a", "b"]).log_prob(lm.encode(["a", "b", "c"])),
    "one option": lambda lm, ids: lm.choice("a", options=["b"]),
    "options string": lambda lm, ids: lm.choice("a", options="bc"),
    "prefix options": lambda lm, ids: lm.choice("a", options=["b", "bc"]),
    "equal options": lambda lm, ids: lm.choice("a", options=["b", "b"]),
    "enumerate stream": lambda lm, ids: lm("a").enumerate_support(),
}


def message(call: Callable[[], Any]) -> tuple[type, str]:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    return caught.type, " ".join(
        str(caught.value).replace("tensor", "array").replace("torch.array", "jnp.array").split()
    )


@pytest.mark.parametrize("case", CALLS)
def test_the_error_is_torchs(lm: LM, case: str) -> None:
    expected = message(lambda: CALLS[case](torch_tiny_lm(6), torch.tensor))
    found = message(lambda: CALLS[case](lm, jnp.array))
    assert found[0] is expected[0]
    assert found[1].removesuffix(" It cannot be a JAX value.") == expected[1]


OWN: dict[str, tuple[Callable[[LM], Any], type[Exception], str]] = {
    "piece dtype": (lambda lm: lm(jnp.array([1.0])), TypeError, "piece 0 must hold integer token ids"),
    "value scalar": (lambda lm: lm("a").log_prob(jnp.array(1)), ValueError, "must have a token dimension"),
    "value list": (lambda lm: lm("a").log_prob([1]), TypeError, "value must be a text array.*got list"),
    "a temperature that is no number": (
        lambda lm: lm("a", max_tokens=2, temperature="hot"),
        TypeError,
        "temperature must be a number or an array of numbers, got 'hot'",
    ),
    "one bad temperature of several": (
        lambda lm: lm("a", max_tokens=2, temperature=jnp.array([1.0, 0.0])),
        ValueError,
        "temperature must be positive",
    ),
    "a traced count": (
        lambda lm: jax.jit(lambda n: lm("a", max_tokens=n).log_prob(lm.encode("b")))(2),
        TypeError,
        "max_tokens must be a whole number of tokens.*cannot be a JAX value",
    ),
    "narrow width": (lambda lm: lm.encode("abc", width=2), ValueError, "3 tokens, more than width=2. Raise width"),
    "a grammar that nothing spells": (
        lambda lm: lm("a", max_tokens=3, grammar=Grammar.regex("zzz")),
        ValueError,
        "permits no token after ''",
    ),
    "a grammar that allowed excludes": (
        lambda lm: lm("a", max_tokens=3, grammar=Grammar.regex("a"), allowed=[0, 2]),
        ValueError,
        "begins with no token that allowed= permits",
    ),
    "a latent stream": (lambda lm: lm("a").sample(jax.random.key(0)), ValueError, "cannot be sampled.*max_tokens"),
}


@pytest.mark.parametrize("case", OWN)
def test_the_error_names_the_argument_and_the_mend(lm: LM, case: str) -> None:
    call, error, text = OWN[case]
    with pytest.raises(error, match=f"(?s){text}"):
        call(lm)


def test_a_missing_end_token_is_named_with_its_mend(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(lm.tokenizer), "eos_token_id", None)
    with pytest.raises(ValueError, match=r"this tokenizer has none.*eos_token in the folder's tokenizer_config.json"):
        lm("a", max_tokens=3, grammar=Grammar.regex("a"))


def test_a_token_without_embedding_is_refused(lm: LM) -> None:
    """JAX would read some other row of the matrix, and no one would know."""
    short = {**lm.weights, **{name: lm.weights[name][:4] for name in ("embed", "head")}}
    small = LM(short, lm.architecture, lm.tokenizer)
    assert small.vocabulary == 4
    for call in (lambda: small("abd"), lambda: small.encode("d"), lambda: small.argument("d")):
        with pytest.raises(ValueError, match="'(ab)?d' holds the token id 4, for which the model has no embedding"):
            call()


# --- the same values as torch -----------------------------------------------------------------------


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Characters with the habits of sentencepiece: ``▁`` for spaces, one put before every text."""
    characters = ["<s>", "</s>", "▁", *"abcdefg."]
    backend = Tokenizer(
        models.BPE({c: n for n, c in enumerate([*characters, "▁a", "ab"])}, merges=[("▁", "a"), ("a", "b")])
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    if kind == "begins":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {} if kind == "none" else {"bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **special)


@pytest.mark.parametrize("kind", ["none", "begins", "has one"])
def test_strings_contexts_and_masks_are_torchs(kind: str, tmp_path: Path) -> None:
    """A tokenizer without a token for the beginning, with one that it puts there itself, with one that it does not."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    reference = llmppl.LM(LlamaForCausalLM(config), tokenizer(kind))
    reference.transformer.save_pretrained(tmp_path)
    reference.tokenizer.save_pretrained(tmp_path)
    lm = LM.from_pretrained(tmp_path)
    assert lm.vocabulary == reference.vocabulary == 13
    texts = ["ab", " ab", "ab ab", "a.", " "]
    ids = reference.encode(texts)
    np.testing.assert_array_equal(lm.encode(texts), ids.numpy())
    assert lm.decode(lm.encode(texts)) == reference.decode(ids) == texts
    pieces: list[tuple[Any, ...]] = [
        ("ab",),
        ("ab", " a"),
        (["a", " ab"], "b", lm.encode(" c")),
        ("ab", [".", " ."]),
        ("ab", ["", ""]),
    ]
    if kind != "none":
        pieces += [(), ("",), (["", "ab"], ""), ([""], "a"), ([""], "")]
    for own in pieces:
        other = [torch.from_numpy(piece).long() if isinstance(piece, np.ndarray) else piece for piece in own]
        expected = reference.context(*other)
        context = lm.context(*own)
        shape = np.broadcast_shapes(*(text.shape[:-1] for text in context))
        joined = np.concatenate([np.broadcast_to(text, (*shape, text.shape[-1])) for text in context], -1)
        assert shape == expected.shape[:-1]
        rows = zip(joined.reshape(-1, joined.shape[-1]), expected.reshape(-1, expected.shape[-1]).tolist(), strict=True)
        for mine, theirs in rows:
            assert [t for t in mine if t != PAD] == [t for t in theirs if t != PAD]
        # Inside a compiled program the numbers of a text are not known; the context is the same.
        told = [lm.argument(piece) if not isinstance(piece, np.ndarray) else piece for piece in own]
        compiled = jax.eval_shape(lambda *told: lm.context(*told), *told)
        assert np.broadcast_shapes(*(text.shape[:-1] for text in compiled)) == shape
    for stop in (".", " ", [3, 5], 4):
        law = lm.law(max_tokens=3, stop=stop, grammar=Grammar.regex("a b|c"))
        other_law = reference.law(max_tokens=3, stop=stop, grammar=Grammar.regex("a b|c"))
        assert np.flatnonzero(law.stop).tolist() == other_law.stop.tolist()
        prefixes = [[], [3], [5], [3, 2]]
        np.testing.assert_array_equal(law.grammar.permitted(prefixes), other_law.grammar.permitted(prefixes))
    assert (
        lm.choice("ab", options=["a", " b"]).options.tolist()
        == reference.choice("ab", options=["a", " b"]).options.tolist()
    )


def test_an_empty_context_of_a_compiled_program(lm: LM) -> None:
    """With a token for the beginning it stands there, as outside of the program; without one the answer is NaN."""
    score = jax.jit(lambda beginning: lm(beginning).log_prob(lm.encode("cd")))(lm.argument(["", "a"]))
    assert np.isnan(score).tolist() == [True, False]
    lm = tiny_lm(6)
    lm.codec.bos = 3
    begin, told = jax.jit(lm.context)(lm.argument(["", "a"]))
    assert begin.tolist() == [[3], [PAD]]
    assert told.shape == (2, 16)
