"""Prefix-tree scoring: equal to separate scoring, every prefix once, memory bounded."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import Story
from pyro import poutine

from llmppl import LM
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.network.scoring import Request, score
from llmppl.network.text_law import TextLaw
from llmppl.programs.particles import compute_log_prob
from llmppl.programs.plates import in_particles
from llmppl.testing import tiny_lm
from llmppl.text.trie import Trie


def stream(lm: LM) -> TextLaw:
    return TextLaw(lm.vocabulary, None, 0, torch.empty(0, dtype=torch.long))


def forward_sizes(lm: LM) -> list[int]:
    """Tokens that each forward pass of the trunk reads from now on."""
    seen: list[int] = []
    lm.transformer.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return seen


def test_every_distinct_prefix_is_one_node() -> None:
    rows = [[1, 2, 3], [1, 2, 4], [1, 2, 3], [5]]
    trie = Trie.of(rows)
    assert len(trie) == 5  # 1, 12, 123, 124, 5
    assert trie.paths[0] == trie.paths[2]
    assert [[trie.tokens[node] for node in path] for path in trie.paths] == rows
    for path in trie.paths:
        assert trie.ancestors(path[-1]) == path[:-1]


@pytest.mark.parametrize("max_nodes", [1, 2, 3, 7, 1000])
def test_cutting_the_trie_into_chunks_changes_no_score(lm: LM, max_nodes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    contexts = [torch.randint(6, (n % 5 + 1,), generator=generator).tolist() for n in range(12)]
    texts = [torch.randint(6, (n % 4 + 1,), generator=generator).tolist() for n in range(12)]
    assert lm.network.packs  # probes the network
    seen = forward_sizes(lm)
    (packed,) = score(lm.network, [Request(stream(lm), contexts, texts, 4)], max_nodes=max_nodes)
    assert max(seen) <= max_nodes
    for row, context, text in zip(packed, contexts, texts, strict=True):
        logits = lm.transformer(torch.tensor([context + text])).logits[0].log_softmax(-1)
        expected = logits[len(context) - 1 : -1].gather(-1, torch.tensor(text)[:, None])[:, 0]
        torch.testing.assert_close(row[: len(text)], expected)
        assert (row[len(text) :] == 0).all()


@pytest.mark.parametrize("max_nodes", [3, 1000])
def test_no_token_is_read_twice_however_the_trie_is_cut(lm: LM, max_nodes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    contexts = [[1, 2, 3, *torch.randint(3, (n % 3,), generator=generator).tolist()] for n in range(20)]
    texts = [torch.randint(3, (4,), generator=generator).tolist() for _ in range(20)]
    lm.network.logits(torch.zeros(1, 32, dtype=torch.float64))  # probes the network
    seen = forward_sizes(lm)
    score(lm.network, [Request(stream(lm), contexts, texts, 4)], max_nodes=max_nodes)
    prefixes = {(*c, *t[:n]) for c, t in zip(contexts, texts, strict=True) for n in range(-len(c) + 1, 4)}
    prefixes |= {tuple(c[:n]) for c in contexts for n in range(1, len(c) + 1)}
    assert sum(seen) == len({p for p in prefixes if p})


@pytest.mark.parametrize("max_nodes", [4, 1000])
def test_gradients_flow_through_every_chunk(lm: LM, max_nodes: int) -> None:
    lm.adapters.add("guide", rank=2, alpha=4.0)
    for name, parameter in lm.adapters.parameters("guide").items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    contexts = [[1, 2, 3]] * 4 + [[1, 4]]
    texts = [[1, 2, 0], [1, 2, 3], [1, 1, 1], [2, 2, 2], [3, 3, 0]]
    gradients = []
    for packed in (True, False):
        lm.transformer.zero_grad()
        with lm.using("guide"):
            if packed:
                total = score(lm.network, [Request(stream(lm), contexts, texts, 3)], max_nodes=max_nodes)[0].sum()
            else:
                total = torch.zeros((), dtype=torch.float64)
                for context, text in zip(contexts, texts, strict=True):
                    logits = lm.transformer(torch.tensor([context + text])).logits[0].log_softmax(-1)
                    total = total + logits[len(context) - 1 : -1].gather(-1, torch.tensor(text)[:, None]).sum()
            total.backward()
        gradients.append([p.grad.clone() for p in lm.adapters.parameters("guide").values()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)  # RMSNorm is float32


def test_logits_made_again_in_the_backward_pass_give_the_same_gradients(
    lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.adapters.add("guide", rank=2, alpha=4.0)
    for name, parameter in lm.adapters.parameters("guide").items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    contexts = [[n % 5 + 1, 2] for n in range(10)]
    texts = [[1, 2, 0], [3, 3, 3]] * 5
    gradients = []
    for rows in (2, 1000):
        monkeypatch.setattr("llmppl.network.scoring.HEAD_ROWS", rows)
        lm.transformer.zero_grad()
        with lm.using("guide"):
            score(lm.network, [Request(stream(lm), contexts, texts, 3)])[0].sum().backward()
        gradients.append([p.grad.clone() for p in lm.adapters.parameters("guide").values()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)  # RMSNorm is float32


def test_requests_of_several_laws_share_their_prefixes_and_keep_their_laws(lm: LM) -> None:
    stops = TextLaw(lm.vocabulary, 3, 2, torch.tensor([0]), temperature=0.7)
    requests = [
        Request(stops, [[1, 2]] * 2, [[3, 0], [3, 3, 1]], 3),
        Request(stream(lm), [[1, 2, 3, 0]], [[4, 4]], 2),
    ]
    lm.network.logits(torch.zeros(1, 32, dtype=torch.float64))
    seen = forward_sizes(lm)
    together = score(lm.network, requests)
    assert seen == [6]  # 1 2 3 0 4, and the 3 of the second text
    for scores, request in zip(together, requests, strict=True):
        torch.testing.assert_close(scores, score(lm.network, [request])[0])


def test_a_network_that_scales_its_logits_is_found_out(lm: LM) -> None:
    """Running its trunk and its vocabulary layer alone would leave the scale out."""
    expected = lm("ab").log_prob(lm.encode("cd"))
    tempered = lm("ab", max_tokens=9, temperature=2.0).token_log_prob(lm.encode("cdaaaaaaa"))[:2].sum()
    whole = lm.transformer.forward

    def halved(*args: object, **kwargs: object) -> object:
        output = whole(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    halved.__signature__ = inspect.signature(whole)  # type: ignore[attr-defined]
    lm.transformer.forward = halved
    other = LM(lm.transformer, lm.tokenizer)
    changed = other("ab").log_prob(other.encode("cd"))
    assert float(changed) == pytest.approx(float(tempered))
    assert float(changed) != pytest.approx(float(expected))


def test_a_network_that_ignores_the_mask_is_read_by_rows_and_never_packed() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    tokenizer = tiny_lm().tokenizer
    config = BloomConfig(vocab_size=6, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.5)
    lm = LM(BloomForCausalLM(config).eval(), tokenizer)
    ids = lm.encode("abcd")
    logits = lm.transformer(ids[None], use_cache=False).logits[0].log_softmax(-1)
    found = lm("ab", max_tokens=2).token_log_prob(lm.encode("cd"))
    torch.testing.assert_close(found, logits[1:3].gather(-1, ids[2:, None])[:, 0])
    with pytest.raises(ValueError, match="4-D attention mask"):
        lm.network.states([0], [0], torch.ones(1, 1) > 0, [0])


def test_particles_share_their_prompt_in_one_forward_pass(lm: LM) -> None:
    lm.network.logits(torch.zeros(1, 32, dtype=torch.float64))
    seen = forward_sizes(lm)
    lm("abcabc").log_prob(lm.encode(["de", "dd", "de", "ee"]))
    # The prompt, and "d" and "e" once each; the last token of a text is never read.
    assert seen == [8]


def test_the_sites_of_a_program_share_their_context_in_one_forward_pass(story: Story) -> None:
    from llmppl.programs.particles import run_particles

    guide = PromptGuide(story.program, story.lm)
    run_particles(story.program, guide, story.args, {}, 4)  # probes the network
    with torch.no_grad():
        particles = run_particles(story.program, guide, story.args, {}, 4)
    seen = forward_sizes(story.lm)
    middles = particles.model_trace.nodes["middle"]["value"]
    given = poutine.condition(story.program, data={"middle": middles})
    trace = poutine.trace(in_particles(given, 4, 0)).get_trace(*story.args)
    compute_log_prob(trace)
    rows = {(*story.lm.encode("ab").tolist(), *(t for t in m if t >= 0), 3) for m in middles.tolist()}
    assert seen == [len({row[:n] for row in rows for n in range(1, len(row) + 1)})]
    for name in ("middle", "ending"):
        site = trace.nodes[name]
        alone = site["fn"].with_context(site["fn"].context, None).log_prob(site["value"])
        torch.testing.assert_close(site["log_prob"], alone)


def test_scores_made_together_carry_their_gradient_once(story: Story) -> None:
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    trace = poutine.trace(in_particles(guide, 4, 0)).get_trace(*story.args)
    fn, value = trace.nodes["middle"]["fn"], trace.nodes["middle"]["value"]
    compute_log_prob(trace)
    trace.nodes["middle"]["log_prob"].sum().backward()
    again = fn.log_prob(value)
    again.sum().backward()  # of a graph of its own
    torch.testing.assert_close(again, trace.nodes["middle"]["log_prob"])
    with torch.no_grad():
        assert not fn.log_prob(value).requires_grad
