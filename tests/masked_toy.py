"""A small masked law and its sampler written out naively, for the tests of masked text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmppl.distributions.masked_text import MaskedText
from llmppl.masked_lm import MaskedLM
from llmppl.network.text_tensors import lengths
from llmppl.network.unmasking import Plan
from llmppl.testing import tiny_lm
from llmppl.text import PAD

L, V = 3, 5
PLANS: dict[str, dict[str, Any]] = {
    "one pass": {"steps": 1},
    "left-to-right": {"order": "left-to-right"},
    "left-to-right in 2": {"order": "left-to-right", "steps": 2},
    "confidence": {"order": "confidence"},
    "confidence 2+1": {"order": "confidence", "tokens_per_step": (2, 1)},
    "margin": {"order": "margin"},
    "margin 1+2": {"order": "margin", "tokens_per_step": (1, 2)},
    "entropy": {"order": "entropy"},
    "entropy in 2": {"order": "entropy", "steps": 2},
}
RANDOM: dict[str, dict[str, Any]] = {
    "k = 1": {},
    "2+1": {"tokens_per_step": (2, 1)},
    "1+2": {"tokens_per_step": (1, 2)},
    "one pass": {"steps": 1},
}
LAWS: dict[str, dict[str, Any]] = {
    "stop": {"stop": "."},
    "no stop": {},
    "min_tokens": {"stop": ".", "min_tokens": 2},
    "temperature": {"stop": ".", "temperature": 0.6},
    "allowed": {"stop": ".", "allowed": [0, 1, 3]},
}


def network(kind: str = "scratch", seed: int = 1) -> MaskedLM:
    """Imperfect: random weights, whose predictions of different canvases differ by whole nats."""
    lm = tiny_lm(vocabulary=V, seed=0, dtype=torch.float64)
    made = (
        MaskedLM.from_scratch(lm, max_tokens=L, width=16, layers=1, heads=2)
        if kind == "scratch"
        else MaskedLM.adapted(lm, max_tokens=L, rank=2)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            scale = 1.0 if "head" in name else 0.4
            if p.dim() > 1:
                p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return made


def text_of(model: MaskedLM, *pieces: Any, **arguments: Any) -> MaskedText:
    return model(*(pieces or ("ab", ..., "cd")), max_tokens=L, **arguments)


def naive_log_probs(fn: MaskedText, canvas: list[int | None], column: int) -> Tensor:
    """The law of one token of a canvas (``None`` is a mask): one plain pass over one row, without caches."""
    model, law, count = fn.model, fn.law, len(canvas)
    left, right = ([t for t in side.tolist() if t != PAD] for side in (fn.context, fn.right))
    before, last = left[:-1], left[-1]
    shown = [model.mask if t is None else t for t in canvas]
    tokens = [*before, *right, last, *shown, model.end]
    behind = len(left) + model.max_tokens + 1
    places = [*range(len(before)), *range(behind, behind + len(right)), *range(len(before), len(left) + count + 1)]
    known = len(before) + len(right)
    visible = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, j in itertools.product(range(len(tokens)), repeat=2):
        if i < known:
            visible[i, j] = j <= i
        else:
            visible[i, j] = j < known or i == j or tokens[j] != model.mask
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    with torch.no_grad(), model.using():
        logits = model.transformer(
            input_ids=torch.tensor([tokens]), position_ids=torch.tensor([places]), attention_mask=mask[None, None]
        ).logits[0, known + column, :V]
    logits = logits / law.temperature
    stops = law.stop.tolist()
    for token in range(V):
        allowed = law.allowed is None or bool(law.allowed[token])
        ends = column == count - 1
        if token in stops and not ends:
            allowed = False
        if stops and ends and count < L and token not in stops:
            allowed = False
        if not allowed:
            logits[token] = -torch.inf
    return logits.log_softmax(-1)


def next_positions(plan: Plan, predicted: dict[int, Tensor], open_: list[int], quota: int) -> list[int]:
    """The rule, from its definition."""

    def merit(column: int) -> float:
        p = predicted[column].exp().sort(descending=True).values
        if plan.order == "confidence":
            return float(p[0])
        if plan.order == "margin":
            return float(p[0] - p[1])
        return float((p * p.clamp(min=1e-300).log()).sum())

    if plan.order == "left-to-right":
        return open_[:quota]
    return sorted(open_, key=lambda c: -merit(c))[:quota]


def paths(fn: MaskedText, count: int, order: tuple[int, ...] | None = None) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every path of a sampler that fills ``count`` tokens: the text, and the probability of the path."""
    quotas = fn.plan.quota(count)

    def go(canvas: list[int | None], step: int, log_p: float) -> Iterator[tuple[tuple[int, ...], float]]:
        if step == len(quotas):
            yield tuple(t for t in canvas if t is not None), log_p
            return
        open_ = [i for i, t in enumerate(canvas) if t is None]
        predicted = {i: naive_log_probs(fn, canvas, i) for i in open_}
        if order is None:
            now = next_positions(fn.plan, predicted, open_, quotas[step])
        else:
            now = list(order[sum(quotas[:step]) : sum(quotas[: step + 1])])
        choices = [[(i, t, float(v)) for t, v in enumerate(predicted[i]) if v > -torch.inf] for i in now]
        for chosen in itertools.product(*choices):
            filled = list(canvas)
            for i, t, _ in chosen:
                filled[i] = t
            yield from go(filled, step + 1, log_p + sum(v for _, _, v in chosen))

    yield from go([None] * count, 0, 0.0)


def sampler_law(fn: MaskedText, texts: Tensor, orders: dict[int, tuple[int, ...]] | None = None) -> Tensor:
    """Log-probabilities ``(n,)`` of texts, of the sampler as it is described, path by path."""
    left, right = fn._flat(torch.Size([1]))
    with torch.no_grad():
        of_length = fn.model.length_log_probs(fn.model.read(left, right), fn.law)[0]
    found: dict[tuple[int, ...], float] = {}
    for count in sorted(set(lengths(texts).tolist())):
        for text, log_p in paths(fn, count, None if orders is None else orders[count]):
            assert text not in found, "two paths lead to one text"
            found[text] = log_p + float(of_length[count - 1])
    return torch.tensor([found[tuple(t for t in row if t != PAD)] for row in texts.tolist()], dtype=torch.float64)


def steps_in(plan: Plan, texts: Tensor, orders: dict[int, tuple[int, ...]]) -> Tensor:
    """The step of each token of texts that are filled in a given order of each length."""
    steps = torch.full(texts.shape, -1)
    for n, count in enumerate(lengths(texts).tolist()):
        number = [t for t, k in enumerate(plan.quota(count)) for _ in range(k)]
        for rank, position in enumerate(orders[count]):
            steps[n, position] = number[rank]
    return steps


def all_orders() -> list[dict[int, tuple[int, ...]]]:
    """A permutation of the longest text makes one of every shorter text; all are equally probable."""
    return [
        {n: tuple(i for i in order if i < n) for n in range(1, L + 1)} for order in itertools.permutations(range(L))
    ]


def given_orders(fn: MaskedText, texts: Tensor, orders: list[dict[int, tuple[int, ...]]]) -> Tensor:
    """``log_prob`` of texts that were drawn in these orders."""
    fn._memo.value = None
    fn._keep(texts, torch.stack([steps_in(fn.plan, texts, o) for o in orders]), texts.shape[:-1])
    with torch.no_grad():
        return fn.log_prob(texts)
