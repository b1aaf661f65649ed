"""Prefix-tree scoring: equal to separate scoring, every prefix once, memory bounded."""

from __future__ import annotations

import pytest
import torch

from llmppl import LM
from llmppl.scoring import Forest, forests, score
from llmppl.stopping import TextLaw


def stream(lm: LM) -> TextLaw:
    return TextLaw(lm.vocabulary, None, 0, torch.empty(0, dtype=torch.long))


def test_every_distinct_prefix_is_one_node() -> None:
    rows = [[1, 2, 3], [1, 2, 4], [1, 2, 3], [5]]
    forest = Forest()
    paths = [forest.insert(row) for row in rows]
    assert len(forest.tokens) == 5  # 1, 12, 123, 124, 5
    assert paths[0] == paths[2]
    assert forest.missing([1, 2, 3, 9]) == 1


@pytest.mark.parametrize("max_nodes", [1, 7, 1000])
def test_packing_into_several_forests_changes_no_score(lm: LM, max_nodes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    contexts = [torch.randint(6, (n % 5 + 1,), generator=generator).tolist() for n in range(12)]
    texts = [torch.randint(6, (n % 4 + 1,), generator=generator).tolist() for n in range(12)]
    packed = score(lm.transformer, stream(lm), contexts, texts, 4, max_nodes=max_nodes)
    for row, context, text in zip(packed, contexts, texts, strict=True):
        logits = lm.transformer(torch.tensor([context + text])).logits[0].log_softmax(-1)
        expected = logits[len(context) - 1 : -1].gather(-1, torch.tensor(text)[:, None])[:, 0]
        torch.testing.assert_close(row[: len(text)], expected)
        assert (row[len(text) :] == 0).all()


def test_forests_hold_no_more_nodes_than_asked() -> None:
    rows = [[n, n + 1, n + 2] for n in range(20)]
    sizes = [len(forest.tokens) for forest, _ in forests(rows, 10)]
    assert max(sizes) <= 10
    assert sum(sizes) == 60


def test_particles_share_their_prompt_in_one_forward_pass(lm: LM) -> None:
    seen: list[int] = []
    handle = lm.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    lm("abcabc").log_prob(lm.encode(["de", "dd", "de", "ee"]))
    handle.remove()
    # The prompt, and "d" and "e" once each; the last token of a text is never read.
    assert seen == [8]
