"""Masked text: its law is the law of its sampler, by enumeration of every path; and the wrong ways stay wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from llmppl import LM, exact_posterior, importance
from llmppl.distributions.masked import MaskedText
from llmppl.guides import AutoregressiveGuide, PromptGuide, RefinementGuide
from llmppl.masked_lm import MaskedLM
from llmppl.objectives import Denoising
from llmppl.testing import tiny_lm
from llmppl.text import PAD, lengths
from llmppl.unmasking import Plan

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


# --- mass, and the law of the sampler -------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("plan", PLANS)
def test_probabilities_sum_to_one(plan: str, law: str) -> None:
    for kind in ("scratch", "adapted") if plan in ("confidence", "one pass") else ("scratch",):
        model = network(kind)
        for pieces in (("ab", ..., "cd"), ("b",), ("ab", ..., "d")):
            fn = text_of(model, *pieces, **PLANS[plan], **LAWS[law])
            with torch.no_grad():
                total = fn.log_prob(fn.enumerate_support()).exp().sum()
            assert float(total) == pytest.approx(1.0, abs=1e-12), (kind, pieces)


@pytest.mark.parametrize("plan", RANDOM)
def test_for_each_random_order_probabilities_sum_to_one(plan: str) -> None:
    for kind, law in (("scratch", "stop"), ("scratch", "no stop"), ("adapted", "min_tokens")):
        fn = text_of(network(kind), order="random", **RANDOM[plan], **LAWS[law])
        texts = fn.enumerate_support()
        found = [given_orders(fn, texts, [order]) for order in all_orders()]
        for log_q in found:
            assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-12)
        if plan != "one pass":
            assert float((found[0] - found[-1]).abs().max()) > 0.1, "the orders are all alike"


@pytest.mark.parametrize("plan", PLANS)
def test_log_prob_is_the_law_of_the_sampler_path_by_path(plan: str) -> None:
    """Against plain passes over one canvas at a time, and rules as they are defined."""
    for kind, law in (("scratch", "stop"), ("adapted", "allowed")):
        fn = text_of(network(kind), **PLANS[plan], **LAWS[law])
        texts = fn.enumerate_support()[::3]
        with torch.no_grad():
            torch.testing.assert_close(fn.log_prob(texts), sampler_law(fn, texts), rtol=0, atol=1e-9)


def test_log_prob_given_an_order_is_the_law_of_a_sampler_in_this_order() -> None:
    for plan in ("k = 1", "2+1"):
        fn = text_of(network(), order="random", **RANDOM[plan], **LAWS["temperature"])
        texts = fn.enumerate_support()[::2]
        for order in all_orders()[::2]:
            expected = sampler_law(fn, texts, order)
            torch.testing.assert_close(given_orders(fn, texts, [order]), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("plan", ["confidence", "random", "entropy 2", "mixture"])
def test_sample_and_log_prob_agree(plan: str) -> None:
    arguments = {
        "confidence": {},
        "random": {"order": "random", "steps": 2},
        "entropy 2": {"order": "entropy", "steps": 2},
        "mixture": {"order": "random", "num_orders": 2},
    }[plan]
    fn = text_of(network(), **arguments, stop=".", allowed=[0, 1, 2])
    texts = fn.enumerate_support()
    count = 3000
    drawn = fn.sample((count,))
    assert bool(fn.support.check(drawn).all())
    index = (drawn[:, None] == texts).all(-1).long().argmax(-1)
    if fn.plan.order == "random":
        single = text_of(fn.model, **{**arguments, "num_orders": 1}, stop=".", allowed=[0, 1, 2])
        p = torch.stack([given_orders(single, texts, [o]) for o in all_orders()]).exp().mean(0)
    else:
        with torch.no_grad():
            p = fn.log_prob(texts).exp()
    expected = p * count
    seen = torch.bincount(index, minlength=len(texts)).double()
    rare = expected < 5
    parts = [((seen - expected) ** 2 / expected)[~rare].sum()]
    if bool(rare.any()) and float(expected[rare].sum()) > 0:
        parts.append((seen[rare].sum() - expected[rare].sum()) ** 2 / expected[rare].sum())
    freedom = int((~rare).sum()) + len(parts) - 2
    # Mean and deviation of chi-square; 4 deviations: about one seed in 10 000 fails.
    assert float(sum(parts)) < freedom + 4 * math.sqrt(2 * freedom), (float(sum(parts)), freedom)


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scratch", "adapted"])
@pytest.mark.parametrize("plan", ["confidence", "margin 1+2", "left-to-right in 2", "one pass"])
def test_a_batch_is_its_rows_one_by_one_whatever_the_lengths_and_paddings(plan: str, kind: str) -> None:
    model = network(kind)
    lm = model.lm
    lefts, rights = ["ab", "d", "acbda"], ["c", "", "ddb"]
    left = torch.stack([torch.cat([lm.encode(t), torch.full((5 - len(t),), PAD)]) for t in lefts])
    right = torch.tensor([[PAD, 3, PAD, PAD], [PAD] * 4, [4, PAD, 4, 2]])
    left[1] = torch.tensor([PAD, PAD, 4, PAD, PAD])
    law = lm(torch.zeros(1, dtype=torch.long), max_tokens=L, stop=".").law
    together = MaskedText(model, left, right, law, Plan(**PLANS[plan]))
    texts = together.enumerate_support(expand=False).squeeze(1)[::2]
    assert len(set(lengths(texts).tolist())) == L
    with torch.no_grad():
        found = together.log_prob(texts[:, None].expand(-1, 3, -1))
        for n, (before, behind) in enumerate(zip(lefts, rights, strict=True)):
            pieces = (before, ..., behind) if behind else (before,)
            alone = torch.stack([text_of(model, *pieces, **PLANS[plan], stop=".").log_prob(t) for t in texts[::7]])
            torch.testing.assert_close(found[::7, n], alone, rtol=0, atol=1e-9)
    shuffled = torch.randperm(len(texts))
    with torch.no_grad():
        again = together.log_prob(texts[shuffled][:, None].expand(-1, 3, -1))
    torch.testing.assert_close(again, found[shuffled], rtol=0, atol=1e-9)


def test_parts_of_a_batch_make_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    fn = text_of(network("adapted"), stop=".")
    texts = fn.enumerate_support()
    whole = fn.log_prob(texts)
    grads = torch.autograd.grad(whole.exp().mean(), list(fn.model.parameters()))
    monkeypatch.setattr("llmppl.unmasking.LOGITS", {"cpu": 3 * V * L, "cuda": 1})
    other = text_of(fn.model, stop=".")
    in_parts = other.log_prob(texts)
    torch.testing.assert_close(in_parts, whole)
    other_grads = torch.autograd.grad(in_parts.exp().mean(), list(fn.model.parameters()))
    for a, b in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    pyro.set_rng_seed(3)
    value, recorded = other.sample_with_log_prob((20,))
    with torch.no_grad():
        torch.testing.assert_close(text_of(fn.model, stop=".").log_prob(value), recorded)


@pytest.mark.parametrize("arguments", [{}, {"order": "random"}, {"order": "random", "num_orders": 3, "steps": 2}])
def test_the_recorded_log_probability_is_the_rescored_one(arguments: dict[str, Any]) -> None:
    fn = text_of(network(), ["ab", "c"], ..., ["d", "aad"], stop=".", **arguments)
    value, recorded = fn.sample_with_log_prob((30,))
    assert recorded.shape == (30, 2)
    with torch.no_grad():
        assert torch.equal(fn.log_prob(value), recorded)
    fn._memo.value = None  # scored anew, but in the order in which it was drawn
    torch.testing.assert_close(fn.log_prob(value).detach(), recorded, rtol=0, atol=1e-9)
    heat = torch.full((30, 1), 3.0)
    hot, recorded = fn.sample_with_log_prob((30,), temperature=heat)
    fn._memo.value = None
    torch.testing.assert_close(fn.log_prob(hot).detach(), recorded, rtol=0, atol=1e-9)


def test_rows_that_were_drawn_keep_their_orders_beside_rows_that_were_not() -> None:
    fn = text_of(network(), order="random", stop=".")
    value, recorded = fn.sample_with_log_prob((40,))
    mixed = value.clone()
    mixed[::2] = fn.enumerate_support()[-20:]  # as if from a replay buffer
    own = (mixed == value).all(-1)
    found = fn.log_prob(mixed).detach()
    assert 20 <= int(own.sum()) < 40
    torch.testing.assert_close(found[own], recorded[own], rtol=0, atol=1e-9)
    # What was scored once keeps the order of that time.
    fn._memo.value = None
    torch.testing.assert_close(fn.log_prob(mixed).detach(), found, rtol=0, atol=1e-9)


def test_a_rule_is_applied_anew_when_the_network_has_changed() -> None:
    fn = text_of(network(), stop=".")
    texts = fn.enumerate_support()
    with torch.no_grad():
        fn.log_prob(texts)
        for p in fn.model.parameters():
            p.add_(0.5 * torch.randn(p.shape, dtype=p.dtype))
        again = fn.log_prob(texts)
        torch.testing.assert_close(again, text_of(fn.model, stop=".").log_prob(texts))
    assert float(again.exp().sum()) == pytest.approx(1.0, abs=1e-12)


# --- E[w] = Z ---------------------------------------------------------------------------------------


def story(lm: LM) -> Any:
    def program(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", lm(beginning, max_tokens=L, allowed=[0, 1, 2]))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    return program


def proposed(guide: RefinementGuide) -> MaskedText:
    from llmppl.tracing import structure

    return structure(guide, ("ab", "cd"), {}).nodes["middle"]["fn"]


def exact(model: MaskedLM) -> tuple[Any, Tensor, Tensor, float]:
    program = story(model.lm)
    posterior = exact_posterior(program, "ab", "cd")
    texts = torch.as_tensor(posterior.samples["middle"])
    return program, texts, torch.as_tensor(posterior.log_weights), float(posterior.log_evidence)


@pytest.mark.parametrize("plan", PLANS)
def test_importance_weights_are_unbiased_for_every_unmasking_order(plan: str) -> None:
    """E[w]/Z = 1: over every path of the sampler, the weight that the library gives the path's text."""
    model = network("adapted")
    program, texts, log_joint, log_z = exact(model)
    fn = proposed(RefinementGuide(program, model.lm, network=model, **{"order": "confidence", **PLANS[plan]}))
    with torch.no_grad():
        weights = log_joint - fn.log_prob(texts)
    assert float((sampler_law(fn, texts) + weights - log_z).exp().sum()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("plan", ["k = 1", "2+1", "1+2"])
def test_importance_weights_are_unbiased_for_random_orders(plan: str) -> None:
    model = network()
    program, texts, log_joint, log_z = exact(model)
    arguments = {"tokens_per_step": 1, **RANDOM[plan]}
    fn = proposed(RefinementGuide(program, model.lm, network=model, order="random", **arguments))
    total = 0.0
    for order in all_orders():
        weights = log_joint - given_orders(fn, texts, [order])
        total += float((sampler_law(fn, texts, order) + weights - log_z).exp().sum()) / 6
    assert total == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("num_orders", [2, 3])
def test_importance_weights_are_unbiased_for_mixtures_over_orders(num_orders: int) -> None:
    model = network()
    program, texts, log_joint, log_z = exact(model)
    guide = RefinementGuide(program, model.lm, network=model, order="random", tokens_per_step=1, num_orders=num_orders)
    fn, single = proposed(guide), proposed(guide.at(num_orders=1))
    orders = all_orders()
    drawn = [given_orders(single, texts, [order]) for order in orders]
    chosen = list(itertools.product(range(6), repeat=num_orders))
    total = 0.0
    for indices in chosen:
        log_q = (
            given_orders(fn, texts, [orders[i] for i in indices])
            if num_orders == 2
            else torch.stack([drawn[i] for i in indices]).logsumexp(0) - math.log(num_orders)
        )
        # Filled in the first order, whatever the others are.
        total += float((drawn[indices[0]] + log_joint - log_q - log_z).exp().sum()) / len(chosen)
    assert total == pytest.approx(1.0, abs=1e-9)
    some = chosen[17]
    mean = torch.stack([drawn[i] for i in some]).logsumexp(0) - math.log(num_orders)
    torch.testing.assert_close(given_orders(fn, texts, [orders[i] for i in some]), mean, rtol=0, atol=1e-9)


def test_importance_reaches_the_evidence() -> None:
    # Untrained it predicts nearly as the causal model does; the others' weights have no useful error.
    model = MaskedLM.adapted(tiny_lm(vocabulary=V, dtype=torch.float64), max_tokens=L, rank=2, seed=0)
    program, _, _, log_z = exact(model)
    for arguments in ({"order": "entropy"}, {"order": "random", "num_orders": 2}):
        guide = RefinementGuide(program, model.lm, network=model, **arguments)
        posterior = importance(program, guide, 800)("ab", "cd")
        assert posterior.exactness == guide.exactness == ("conditional" if "num_orders" in arguments else "marginal")
        error = float(posterior.log_evidence_error)
        assert error < 0.3
        assert float(posterior.log_evidence) == pytest.approx(log_z, abs=4 * error)


# --- wrong ways, which stay wrong -----------------------------------------------------------------


def toy() -> tuple[MaskedText, Tensor, Tensor]:
    """A masked text, the texts of its support, and a target to weigh them against: the law of the causal model."""
    model = network("adapted")
    fn = text_of(model, tokens_per_step=1)
    texts = fn.enumerate_support()
    with torch.no_grad():
        return fn, texts, model.lm("ab", max_tokens=L).log_prob(texts)


def test_keeping_the_best_of_drawn_tokens_and_scoring_the_product_is_biased() -> None:
    """All open positions are drawn, and the likeliest draw is kept: which one is kept depends on the draws."""
    fn, texts, target = toy()
    expectation = 0.0
    index = {tuple(t): n for n, t in enumerate(texts.tolist())}

    def go(canvas: list[int | None], path: float, scored: float) -> None:
        nonlocal expectation
        open_ = [i for i, t in enumerate(canvas) if t is None]
        if not open_:
            expectation += math.exp(path + float(target[index[tuple(canvas)]]) - scored)  # type: ignore[index]
            return
        predicted = {i: naive_log_probs(fn, canvas, i) for i in open_}
        kept: dict[tuple[int, int], float] = {}
        for draws in itertools.product(range(V), repeat=len(open_)):
            values = [float(predicted[i][t]) for i, t in zip(open_, draws, strict=True)]
            best = max(range(len(open_)), key=lambda n: values[n])
            key = (open_[best], draws[best])
            kept[key] = kept.get(key, 0.0) + math.exp(sum(values))
        for (i, t), p in kept.items():
            filled = list(canvas)
            filled[i] = t
            go(filled, path + math.log(p), scored + float(predicted[i][t]))

    go([None] * L, 0.0, 0.0)
    print(f"E[w]/Z of sample-then-commit: {expectation:.3f}")
    assert abs(expectation - 1) > 0.1


def test_counting_an_order_without_its_reverse_is_six_times_too_large() -> None:
    """Weights p(z) / (π(σ) q(z|σ)) sum an order's probability away that nothing puts back: 3! for 3 tokens."""
    fn, texts, target = toy()
    random = text_of(fn.model, order="random", tokens_per_step=1)
    expectation = 0.0
    for order in all_orders():
        log_q = given_orders(random, texts, [order])
        expectation += float((log_q + target - (log_q - math.log(6))).exp().sum()) / 6
    assert expectation == pytest.approx(6.0, abs=1e-9)


def test_a_last_step_by_argmax_is_biased() -> None:
    """A text that is not the likeliest at its last step is never drawn: its mass is missing."""
    fn, texts, target = toy()
    ltr = text_of(fn.model, order="left-to-right")
    expectation = 0.0
    with torch.no_grad():
        scores = ltr.token_log_prob(texts)
    for first in sorted({tuple(t[:2]) for t in texts.tolist()}):
        rows = (texts[:, :2] == torch.tensor(first)).all(-1).nonzero()[:, 0]
        best = rows[scores[rows, 2].argmax()]
        path = scores[best, :2].sum()
        expectation += float((path + target[best] - path).exp())
    print(f"E[w]/Z of an argmax last step: {expectation:.3f}")
    assert expectation < 0.9


# --- gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scratch", "adapted"])
def test_the_gradient_of_log_prob_is_that_of_finite_differences(kind: str) -> None:
    model = network(kind)
    texts = text_of(model, stop=".").enumerate_support()[3::11]
    # By a rule the order jumps where two merits cross; these do not look. The norms of the network compute in
    # float32, hence the large differences.
    for arguments in ({"order": "left-to-right", "steps": 2}, {"steps": 1}):
        text_of(model, stop=".", **arguments).log_prob(texts).sum().backward()
        generator = torch.Generator().manual_seed(4)
        for parameter in model.parameters():
            gradient, parameter.grad = parameter.grad, None
            direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.add_(sign * 1e-3 * direction)
                    values.append(text_of(model, stop=".", **arguments).log_prob(texts).sum())
                    parameter.sub_(sign * 1e-3 * direction)
            expected = float((values[0] - values[1]) / 2e-3)
            found = 0.0 if gradient is None else float((gradient * direction).sum())
            assert found == pytest.approx(expected, rel=0.01, abs=0.02)


def test_the_denoising_loss_is_minus_the_expected_log_probability_over_random_orders() -> None:
    fn = text_of(network(), order="random", stop=".")
    texts = fn.enumerate_support()[::4]
    exact_loss = -torch.stack([given_orders(fn, texts, [order]) for order in all_orders()]).mean(0)
    with torch.no_grad():
        draws = torch.stack([fn.denoising_loss(texts, num_masks=3) for _ in range(80)])
    error = draws.std(0) / len(draws) ** 0.5
    # 36 texts at 4.5 standard errors each.
    assert bool(((draws.mean(0) - exact_loss).abs() < 4.5 * error + 1e-9).all())
    assert float(error.max()) < 0.35
    whole = torch.stack([fn.denoising_loss(texts, 1) for _ in range(2)])
    assert whole.requires_grad
    assert not torch.equal(whole[0], whole[1])


def test_the_denoising_loss_lies_above_the_entropy() -> None:
    fn = text_of(network(), order="random", stop=".")
    texts = fn.enumerate_support()
    prior = fn.lm("ab", max_tokens=L, stop=".")
    with torch.no_grad():
        log_p = prior.log_prob(texts)
        loss = torch.stack([fn.denoising_loss(texts, 4) for _ in range(20)]).mean(0)
    assert float((log_p.exp() * loss).sum()) > float(-(log_p.exp() * log_p).sum()) + 0.05


# --- cost ---------------------------------------------------------------------------------------------


def test_sampling_costs_a_pass_a_step_and_scoring_one_batch() -> None:
    model = network("adapted")
    passes: list[tuple[int, ...]] = []
    lm = model.lm
    assert model._shared[2].splits  # probes the network once
    lm.transformer.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    for steps in (1, 2, 3):
        fn = text_of(model, steps=steps)
        passes.clear()
        value = fn.sample((16,))
        assert len(passes) == 1 + steps  # both contexts, once; and the steps
        assert passes[0] == (1, 3)
        passes.clear()
        with torch.no_grad():
            fn.log_prob(value)
        assert not passes  # recorded while drawing
        fn.log_prob(value).sum().backward()
        assert len(passes) == 2  # both contexts, and all steps of all texts in one batch
        assert passes[1][0] == 16 * steps
    passes.clear()
    text_of(model, stop=".", steps=2).sample((16,))
    assert len(passes) <= 1 + 1 + 2  # one more for the length


# --- bad input ----------------------------------------------------------------------------------------


def test_malformed_arguments_are_refused_with_the_mend() -> None:
    model = network()
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "order='best' is no unmasking order. Use one of", {"order": "best"}),
        (ValueError, "top_k= truncates the law", {"top_k": 5}),
        (ValueError, "top_p= truncates the law", {"top_p": 0.9}),
        (TypeError, "unknown argument beam=", {"beam": 3}),
        (ValueError, "steps must be a whole number of at least 1, got 0", {"steps": 0}),
        (ValueError, "two ways", {"steps": 2, "tokens_per_step": 1}),
        (ValueError, "tokens_per_step= is empty", {"tokens_per_step": ()}),
        (ValueError, "num_orders=2 is for order='random'", {"num_orders": 2}),
        (ValueError, "temperature must be positive", {"temperature": 0.0}),
        (ValueError, "matches no token", {"stop": "§"}),
    ]
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            text_of(model, **arguments)
    with pytest.raises(ValueError, match="max_tokens=4 is outside the trained range: the network knows gaps of 1 to 3"):
        model("ab", max_tokens=4)
    with pytest.raises(ValueError, match="more than one gap"):
        model("a", ..., "b", ..., max_tokens=2)
    with pytest.raises(ValueError, match="max_tokens must be a whole number of at least 1"):
        MaskedLM.from_scratch(model.lm, max_tokens=0)
    with pytest.raises(ValueError, match="heads=3"):
        MaskedLM.from_scratch(model.lm, width=16, heads=3)
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
        MaskedLM.adapted(model.lm, rank=0)
    fn = text_of(model, stop=".")
    with pytest.raises(ValueError, match="stop token stands before its end"):
        fn.log_prob(torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="cannot be learned"):
        fn.denoising_loss(torch.tensor([1, 0, 1]))
    assert float(MaskedText(model, fn.context, fn.right, fn.law, fn.plan, False).log_prob(torch.tensor([1, 0, 1]))) == (
        -torch.inf
    )


FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {},
    "mamba": None,
    "bloom": None,
}


def tiny_of(family: str) -> LM:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32} if family == "gpt2" else {}
    if not sizes:
        sizes = {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "n_layer": 1,
            "n_head": 2,
        }  # fmt: skip
    config = AutoConfig.for_model(family, vocab_size=V, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    for key, value in {**sizes, **(FAMILIES[family] or {})}.items():
        setattr(config, key, value)
    if family.startswith("qwen"):
        config.layer_types = ["full_attention"]
    torch.manual_seed(0)
    return LM(AutoModelForCausalLM.from_config(config), tiny_lm(V).tokenizer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_are_made_bidirectional_or_refused_by_name(family: str) -> None:
    lm = tiny_of(family)
    if FAMILIES[family] is None:
        with pytest.raises(ValueError, match=f"attention of {family.title()}ForCausalLM cannot be made bidirectional"):
            MaskedLM.adapted(lm, max_tokens=L, rank=2)
        # A network of its own has none of the base model's limits.
        fn = MaskedLM.from_scratch(lm, max_tokens=L, width=8, layers=1, heads=2)("ab", ..., "c", max_tokens=2)
    else:
        fn = MaskedLM.adapted(lm, max_tokens=L, rank=2)("ab", ..., "c", max_tokens=2)
    texts = fn.enumerate_support()
    with torch.no_grad():
        assert float(fn.log_prob(texts).exp().sum()) == pytest.approx(1.0, abs=1e-4)
    if FAMILIES[family] is not None:
        other = fn.model("ab", ..., "d", max_tokens=2)
        with torch.no_grad():
            assert float((other.log_prob(texts) - fn.log_prob(texts)).abs().max()) > 1e-6, "the right side is not seen"


def test_reduced_precision_keeps_what_it_recorded() -> None:
    lm = tiny_lm(vocabulary=V, dtype=torch.bfloat16)
    for model in (MaskedLM.from_scratch(lm, L, width=8, layers=1, heads=2), MaskedLM.adapted(lm, L, rank=2)):
        fn = model("ab", ..., "c", max_tokens=L, stop=".")
        value, recorded = fn.sample_with_log_prob((50,))
        assert recorded.dtype == torch.float32
        with torch.no_grad():
            assert torch.equal(fn.log_prob(value), recorded)
            assert float(fn.log_prob(fn.enumerate_support()).exp().sum()) == pytest.approx(1.0, abs=0.1)


def test_an_autoregressive_guide_of_a_masked_prior_is_refused_and_a_refinement_guide_sees_its_right_side() -> None:
    model = network()

    def program(ending: str) -> None:
        middle = pyro.sample("middle", text_of(model, "ab", ..., "cc"))
        pyro.sample("ending", model.lm(middle), obs=model.lm.encode(ending))

    with pytest.raises(ValueError, match="written from left to right with .* Propose it by a RefinementGuide"):
        AutoregressiveGuide(program, model.lm, rank=2)("d")
    fn = pyro.poutine.trace(RefinementGuide(program, model.lm, network=model)).get_trace("d").nodes["middle"]["fn"]
    decode = lambda side: model.lm.codec.decode([t for t in side.tolist() if t >= 0])  # noqa: E731
    assert (decode(fn.context), decode(fn.right)) == ("ab", "ccd")
    # The prior's own network, told of the observation on the left, is a proposal as any other.
    assert PromptGuide(program, model.lm)("d")["middle"].shape == (L,)


# --- the small network as a prior ---------------------------------------------------------------------


def test_a_network_trained_from_scratch_on_the_programs_own_text_is_a_prior_like_the_language_model() -> None:
    from llmppl import fit

    lm = tiny_lm(vocabulary=4)

    def program(beginning: str) -> None:
        pyro.sample("middle", lm(beginning, max_tokens=2, stop="."))

    masked = MaskedLM.from_scratch(lm, max_tokens=2, width=16, layers=1, heads=2, seed=0)
    prior, texts = lm("ab", max_tokens=2, stop="."), lm("ab", max_tokens=2, stop=".").enumerate_support()

    def divergence() -> float:
        with torch.no_grad():
            log_p = prior.log_prob(texts)
            return float((log_p.exp() * (log_p - masked("ab", max_tokens=2, stop=".").log_prob(texts))).sum())

    before = divergence()
    guide = RefinementGuide(program, lm, network=masked)
    fit(
        program, guide, [("ab",)], Denoising(32, 4), steps=80, learning_rate=2e-2, schedule="cosine", seed=0,
        progress=False,
    )  # fmt: skip
    after = divergence()
    print(f"KL(lm‖masked): {before:.3f} before, {after:.3f} after")
    assert before > 0.3
    assert after < 0.05
