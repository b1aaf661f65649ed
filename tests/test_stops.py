"""Texts that end with a string that several tokens write: the automaton, and everything that follows the law."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmppl import LM, MaskedLM, decode, exact_posterior, mcmc, smc
from llmppl.guides import DirectGuide, PromptGuide
from llmppl.inference.rewriting import propose, rewrite
from llmppl.network.text_tensors import lengths, widen
from llmppl.objectives.prefix_states import prefixes
from llmppl.programs.structure import Program
from llmppl.testing import tiny_lm
from llmppl.text.spelling import Spelling
from llmppl.text.stop_automaton import build
from llmppl.text.tokenization import Codec


def test_a_text_ends_at_the_first_token_with_which_it_holds_a_stop_string() -> None:
    """Of 200 random sets of strings over tokens that overlap them in every way, against the texts themselves."""
    order = random.Random(0)
    tokens = [b"a", b"b", b"ab", b"ba", b"aab", b"c", b"bb", b""]
    for _ in range(200):
        strings = ["".join(order.choice("ab") for _ in range(order.randint(1, 4))) for _ in range(order.randint(1, 3))]
        automaton = build(strings, tokens)
        texts = np.array([[order.randrange(len(tokens)) for _ in range(8)] for _ in range(30)])
        for text, ended in zip(texts, automaton.ended(texts), strict=True):
            begun = [b"".join(tokens[t] for t in text[: n + 1]) for n in range(8)]
            assert ended.tolist() == [any(s.encode() in part for s in strings) for part in begun]
            free = text[~ended]
            assert automaton.walk(text) == (-1 if ended.any() else automaton.walk(free))
    assert build(["."], [b"a", b".", b"b."]).size == 1


def bytewise() -> Codec:
    """A vocabulary of single bytes, as byte-level tokenizers have them for characters that they do not know."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({sign: n for n, sign in enumerate(signs)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Codec(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_stop_string_may_be_split_within_a_character() -> None:
    codec = bytewise()
    assert b"".join(codec.token_bytes[n] for n in codec.encode("naïve €\n")) == "naïve €\n".encode()
    ids, automaton = Spelling(codec, codec.vocabulary).stops("é")
    assert ids == []
    assert automaton is not None
    text = codec.encode("âme été")  # â begins with é's first byte
    assert automaton.ended(np.array(text)).argmax() == len(codec.encode("âme é")) - 1


@pytest.fixture
def small() -> LM:
    return tiny_lm(vocabulary=4, seed=2, dtype=torch.float64)  # . a b c


STOP: dict[str, Any] = {"max_tokens": 4, "stop": ["ab", "cc"]}


def told(lm: LM) -> Program:
    def program(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", lm(beginning, **STOP))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    return program


def test_laws_of_other_kinds_end_there_too(small: LM) -> None:
    trace = pyro.poutine.trace(DirectGuide(told(small), small, seed=0)).get_trace("b", "c")
    factorised = trace.nodes["middle"]["fn"]
    texts = factorised.enumerate_support()
    assert float(factorised.log_prob(texts).detach().exp().sum()) == pytest.approx(1.0, abs=1e-9)
    drawn = set(small.decode(factorised.sample((300,))))
    assert all(len(text) == 4 or text.endswith(("ab", "cc")) for text in drawn)
    assert not any(end in text[:-1] for text in drawn for end in STOP["stop"])
    with pytest.raises(ValueError, match="min_tokens=3 with stop='ab', 'cc'"):
        trace = pyro.poutine.trace(DirectGuide(told_longer(small), small)).get_trace("b", "c")
    with pytest.raises(ValueError, match="a masked law fills tokens in any order"):
        MaskedLM.from_scratch(small, max_tokens=4, width=8, layers=1, heads=2, seed=0)("a", ..., "b", **STOP)


def told_longer(lm: LM) -> Program:
    def program(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", lm(beginning, min_tokens=3, **STOP))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    return program


@pytest.mark.long
def test_search_and_chains_have_the_exact_posterior(small: LM) -> None:
    """SMC's evidence is unbiased within three standard errors; a chain's frequencies are near; beams are the best."""
    program = told(small)
    exact = exact_posterior(program)("b", "c")
    log_z = float(exact.log_evidence)
    run = smc(program, None, 8, ess_threshold=1.0, check_every=1, vectorize_data=True, seed=1, progress=False)
    ratio = np.exp(run(["b"] * 400, ["c"] * 400).log_evidence - log_z)
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / 20 < 0.15
    p = dict(zip(map(tuple, exact.samples["middle"].tolist()), exact.weights.tolist(), strict=True))
    for kernel in ("suffix", "gibbs"):
        chain = mcmc(program, None, kernel, 200, 8, seed=0, progress=False)
        drawn = list(map(tuple, chain("b", "c").samples["middle"].reshape(-1, 4).tolist()))
        assert set(drawn) <= set(p)
        ends = Counter((text.index(-1) if -1 in text else 4, text[-1]) for text in drawn)
        wanted: dict[Any, float] = defaultdict(float)
        for text, weight in p.items():
            wanted[text.index(-1) if -1 in text else 4, text[-1]] += weight
        assert 0.5 * sum(abs(wanted[end] - ends[end] / len(drawn)) for end in wanted) < 0.08
    guide = PromptGuide(program, small, {"middle": lambda beginning: [beginning]})
    beams = decode(program, guide, "beam", num_beams=len(p))("b", "c").samples["middle"]
    assert set(map(tuple, beams.reshape(-1, 4).tolist())) == set(p)
    with pytest.raises(ValueError, match=r"ends with stop='ab', 'cc' alone"):
        smc(program, None, 4, "flows")("b", "c")


@pytest.mark.long
def test_a_block_is_rewritten_within_the_support_and_can_be_rewritten_back(small: LM) -> None:
    """From every text, at every place, by the density of every text: at most one in sum, and both ways or neither."""
    fn = small("b", **STOP)
    texts = fn.enumerate_support()
    pyro.set_rng_seed(0)
    new, ratio = propose(fn.expand((len(texts) * 5,)), texts.repeat(5, 1), 2)
    assert bool(fn.support.check(new).all())
    assert bool(ratio.isneginf().any()), "no stop string was written across a block"
    for start in range(4):
        begun = texts[lengths(texts) > start]
        many, place = fn.expand((len(begun),)), torch.full((len(begun),), start)
        density = torch.stack([rewrite(many, text.expand(len(begun), -1), place, 2, begun)[1] for text in begun])
        assert float(density.exp().sum(1).max()) < 1 + 1e-9
        assert float(density.diagonal().min()) > -torch.inf
        assert bool((density.isneginf() == density.T.isneginf()).all())


def test_prefixes_end_where_a_token_can_end_them(small: LM) -> None:
    """cab: only behind 'c' and behind 'ca' can one token end the text; with a full stop among the stops, everywhere
    before its own end, which the caller counts."""
    law = small.law(**STOP)
    texts, valid = prefixes(widen(small.encode("cab")[None], 4), law)
    assert [small.decode(text[0]) for text in texts[valid[:, 0]]] == ["cc", "cab"]
    both = small.law(max_tokens=4, stop=["ab", "cc", "."])
    texts, valid = prefixes(widen(small.encode("cab")[None], 4), both)
    assert [small.decode(text[0]) for text in texts[valid[:, 0]]] == [".", "c.", "ca."]


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("xyz", "matches no text of this tokenizer"),
        (["a", ""], "holds an empty string"),
        ("ab" * 200, "beginnings of stop strings"),
        ([1.5, "a"], None),
        ([], "stop= is empty"),
    ],
)
def test_bad_stops_are_named(small: LM, stop: Any, message: str | None) -> None:
    if message is None:
        assert small.law(max_tokens=3, stop=stop).stop.tolist() == [1]
        return
    with pytest.raises(ValueError, match=message):
        small("a", max_tokens=3, stop=stop)


@pytest.mark.long
def test_the_numpyro_twin_ends_texts_there(small: LM, tmp_path: Any) -> None:
    """The same support, the same evidence by enumeration, and unbiased SMC."""
    import numpyro
    from jax import random as random_jax

    from llmppl.numpyro import exact_posterior as exact_jax
    from llmppl.numpyro import smc as smc_jax
    from llmppl.numpyro.testing import tiny_lm as tiny_jax

    lm = tiny_jax(4, seed=2)

    def program(beginning: str, ending: str) -> None:
        middle = numpyro.sample("middle", lm(beginning, **STOP))
        numpyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    texts = lm("b", **STOP).enumerate_support()
    own = small("b", **STOP).enumerate_support()
    assert sorted(map(tuple, np.asarray(texts).tolist())) == sorted(map(tuple, own.tolist()))
    log_z = float(exact_jax(program)("b", "c").log_evidence)
    found = smc_jax(program, None, 16, num_runs=40)(random_jax.key(0), "b", "c")
    assert float(found.log_evidence) == pytest.approx(log_z, abs=4 * float(found.log_evidence_error) + 1e-6)
    assert float(found.log_evidence_error) < 0.15


def test_an_end_that_comes_too_early_whatever_is_written_is_refused() -> None:
    lm = tiny_lm(vocabulary=6)
    with pytest.raises(ValueError, match=r"min_tokens=3 cannot be kept: after some 1 tokens every allowed one"):
        lm("c", max_tokens=4, min_tokens=3, stop=["aa", "ab"], allowed=[1, 2])
    fn = lm("c", max_tokens=4, min_tokens=3, stop=["aa", "ab"], allowed=[1, 2, 3])
    assert float(fn.log_prob(fn.enumerate_support()).exp().sum()) == pytest.approx(1.0, abs=1e-5)
