"""Masked text: its law is the law of its sampler, by enumeration of every path; its gradients."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pytest
import torch
from masked_toy import LAWS, PLANS, RANDOM, L, V, all_orders, given_orders, network, sampler_law, text_of

from llmppl.distributions.masked_text import MaskedText
from llmppl.network.text_tensors import lengths
from llmppl.network.unmasking import Plan
from llmppl.text import PAD

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


@pytest.mark.long
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


@pytest.mark.long
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
    monkeypatch.setattr("llmppl.network.unmasking.LOGITS", {"cpu": 3 * V * L, "cuda": 1})
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
