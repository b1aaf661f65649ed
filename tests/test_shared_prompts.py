"""Texts behind shared prompts have the laws of texts behind prompts of their own, whoever shares the keys."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig

from llmppl.inference.writing import _check_memory
from llmppl.network import drawing, prompt_reading
from llmppl.network.drawing import Stream, blocks
from llmppl.network.shared_prompts import SharedPrompts, pays
from llmppl.network.transformer import reading_of
from llmppl.testing import tiny_lm

TINY: dict[str, Any] = {
    "vocab_size": 7,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
CONFIGURATIONS = {
    "llama": LlamaConfig(**TINY),
    "sliding window": MistralConfig(**TINY, sliding_window=5),
    "two kinds of layers": Gemma3TextConfig(
        **TINY, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    ),
    "learned positions": GPT2Config(vocab_size=7, n_embd=16, n_layer=2, n_head=4, n_positions=64),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_rows_are_read_as_if_alone(name: str) -> None:
    """Prompts of three lengths, rows that are dropped, doubled and reordered on the way, against a plain pass each."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGURATIONS[name]).double().eval()
    prompts = [(1, 2, 3, 4, 5, 6, 1, 2), (3, 1), (2, 2, 6, 5)]
    rows = [list(prompts[n]) for n in (0, 0, 1, 0, 2, 1, 0)]
    stream = SharedPrompts(model, [tuple(row) for row in rows])
    order = torch.Generator().manual_seed(1)
    for step in range(14):
        plain = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
        torch.testing.assert_close(stream.logits, plain, atol=1e-9, rtol=0)
        if step % 3 == 1:
            count = (5, 9, 2, 6)[step // 3 % 4]
            index = torch.randint(len(rows), (count,), generator=order)
            stream.select(index)
            rows = [list(rows[n]) for n in index.tolist()]
        tokens = torch.randint(7, (len(rows),), generator=order)
        stream.advance(tokens)
        rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]
    assert stream._keys_at.shape[1] < len(prompts[0]) + 14 * 9, "keys that nobody sees are kept"


def test_few_rows_or_prompts_of_their_own_are_not_put_together() -> None:
    long, short = tuple(range(400)), tuple(range(10))
    assert pays([long] * 8, 16)
    assert not pays([long], 16)
    assert not pays([long[:60]] * 4, 16)
    assert not pays([long[n:] for n in range(8)], 16)
    assert not pays([short] * 128, 20), "all rows would be asked about the keys of all"


@pytest.mark.parametrize("shared", [False, True])
def test_draws_are_scored_as_they_were_drawn(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way, and with rows that end early and leave."""
    lm = tiny_lm(dtype=torch.float64)
    chosen = []
    monkeypatch.setattr(drawing, "pays", lambda contexts, tokens: chosen.append(shared) or shared)
    pyro.set_rng_seed(0)
    contexts = ["abcabcabcab", "bd", "bd"]
    texts, recorded = lm(contexts, max_tokens=12, stop=".").sample_with_log_prob((20,))
    assert chosen
    torch.testing.assert_close(
        tiny_lm(dtype=torch.float64)(contexts, max_tokens=12, stop=".").log_prob(texts), recorded
    )


def test_a_prompt_that_is_kept_once_takes_its_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGURATIONS["llama"])
    key, logits = drawing._bytes(model)
    monkeypatch.setattr(drawing, "CACHE_BYTES", 3 * (key * 320 + logits))
    prompt = list(range(300))
    parts = list(blocks(model, [prompt] * 12 + [[1]] * 4, 20))
    assert parts[0] == slice(0, 12)
    assert [part.stop - part.start for part in parts[1:]] == [3, 1]
    assert list(blocks(model, [[1]] * 2 + [prompt] * 12, 20)) == [slice(0, 3), slice(3, 14)]


def test_more_rows_than_the_cache_holds_are_refused_by_how_their_prompt_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Room for three rows with copies of the long prompt: sixteen share it; rows of a short one have copies."""
    model = AutoModelForCausalLM.from_config(CONFIGURATIONS["llama"])
    key, logits = drawing._bytes(model)
    monkeypatch.setattr(drawing, "CACHE_BYTES", 3 * (key * 320 + logits))
    _check_memory(model, [list(range(300))] * 16, 20)
    short = drawing.rows_at_once(model, 24)
    assert drawing.shared_rows_at_once(model, 4, 20) > short
    with pytest.raises(ValueError, match=f"which holds {4 * short}"):
        _check_memory(model, [[1, 2, 3, 4]] * (4 * short + 1), 20)


def test_stream_of_the_drawing_takes_the_cheaper_way() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGURATIONS["llama"]).eval()
    assert Stream(model, [[1, 2, 3] * 20] * 12, 8)._held is not None
    assert Stream(model, [[1, 2, 3] * 20], 8)._held is None


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("reader", [SharedPrompts, lambda model, rows: Stream(model, rows, 1)])
def test_what_prompts_begin_with_is_read_once(name: str, reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of three lengths behind one beginning, one of them that beginning itself; a window is not narrowed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGURATIONS[name]).double().eval()
    beginning = (1, 2, 3, 4, 5, 6, 1, 2)
    rows = [[*beginning, *rest] for rest in ((3, 1, 4, 2), (3, 2), (), (3, 1, 4, 2))]
    monkeypatch.setattr(prompt_reading, "FEWEST", 10)
    monkeypatch.setattr(drawing, "pays", lambda contexts, tokens: False)
    reading_of(model)  # which tries it out
    read: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, keywords: read.append(keywords["input_ids"].numel()), with_kwargs=True
    )
    stream = reader(model, [tuple(row) for row in rows])
    handle.remove()
    assert read == ([3 * 12] if name in ("sliding window", "two kinds of layers") else [7, 3 * 5])
    for step in range(4):
        plain = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
        torch.testing.assert_close(stream.logits, plain, atol=1e-9, rtol=0)
        tokens = torch.tensor([step, 3, 5, 6 - step])
        stream.advance(tokens)
        rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]


def test_beginnings_that_are_short_or_of_one_prompt_are_not_read_apart() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGURATIONS["llama"])
    long = tuple(range(100))
    assert prompt_reading.shared_beginning(model, [(*long, 1, 2), (*long, 1, 3), (*long, 1, 4, 5)]) == 101
    assert prompt_reading.shared_beginning(model, [long]) == 0
    assert prompt_reading.shared_beginning(model, [(1, 2, 3), (1, 2, 4)]) == 0
    assert prompt_reading.shared_beginning(model, [(*long, 1), (0, *long)]) == 0
