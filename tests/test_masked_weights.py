"""Weights of masked text are exact, by enumeration; and the wrong ways stay wrong."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pytest
import torch
from masked_toy import PLANS, RANDOM, L, V, all_orders, given_orders, naive_log_probs, network, sampler_law, text_of
from torch import Tensor

from llmppl import LM, exact_posterior, importance
from llmppl.distributions.masked_text import MaskedText
from llmppl.guides import RefinementGuide
from llmppl.masked_lm import MaskedLM
from llmppl.testing import tiny_lm

# --- E[w] = Z ---------------------------------------------------------------------------------------


def story(lm: LM) -> Any:
    def program(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", lm(beginning, max_tokens=L, allowed=[0, 1, 2]))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    return program


def proposed(guide: RefinementGuide) -> MaskedText:
    from llmppl.programs.structure import structure

    return structure(guide, ("ab", "cd"), {}).nodes["middle"]["fn"]


def exact(model: MaskedLM) -> tuple[Any, Tensor, Tensor, float]:
    program = story(model.lm)
    posterior = exact_posterior(program)("ab", "cd")
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
