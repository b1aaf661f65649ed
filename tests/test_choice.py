"""The finite distribution over given strings."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate

from llmppl import LM, exact_posterior
from llmppl.guides import PromptGuide
from llmppl.text import PAD


def test_weights_are_the_normalised_stream_probabilities(lm: LM) -> None:
    options = ["a.", "bc", "e"]
    choice = lm.choice(["d", "ab"], options=options)
    assert choice.batch_shape == (2,)
    stream = torch.stack([lm(["d", "ab"]).log_prob(lm.encode(o)) for o in options], -1)
    torch.testing.assert_close(choice.logits, stream.log_softmax(-1))
    torch.testing.assert_close(choice.log_prob(choice.enumerate_support()).exp().sum(0), torch.ones(2).double())


def test_samples_follow_the_weights(lm: LM) -> None:
    choice = lm.choice("d", options=["a", "b", "c"])
    draws = choice.sample((5000,))
    share = torch.stack([(draws == option).all(-1).double().mean() for option in choice.options])
    # Standard error of a share is at most 0.007.
    torch.testing.assert_close(share, choice.logits.exp(), atol=0.03, rtol=0)


def test_options_of_different_lengths_are_padded(lm: LM) -> None:
    choice = lm.choice("d", options=["abc", "e"])
    assert choice.options.tolist() == [[1, 2, 3], [5, PAD, PAD]]
    assert choice.support.check(lm.encode("e")).item()
    assert not choice.support.check(lm.encode("a")).item()


def test_trace_enum_elbo_is_the_exact_evidence(lm: LM) -> None:
    def model(ending: str) -> None:
        plan = pyro.sample("plan", lm.choice("ab", options=["c", "de", "."]))
        pyro.sample("ending", lm("ab", plan), obs=lm.encode(ending))

    def guide(ending: str) -> None:
        pass

    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(config_enumerate(model), guide, "ed")
    assert -loss == pytest.approx(exact_posterior(model)("ed").log_evidence.item(), abs=1e-9)


def test_trace_enum_elbo_sums_a_choice_out_while_a_text_guide_proposes_the_rest(lm: LM) -> None:
    def model(ending: str) -> None:
        middle = pyro.sample("middle", lm("ab", max_tokens=2, stop="."))
        plan = pyro.sample("plan", lm.choice("ab", middle, options=["c", "de"]), infer={"enumerate": "parallel"})
        pyro.sample("ending", lm("ab", plan), obs=lm.encode(ending))

    guide = PromptGuide(model, lm, {"middle": lambda: ["ab"]})
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=2000, vectorize_particles=True)
    texts = lm("ab", max_tokens=2, stop=".").enumerate_support()
    log_q = lm("ab", max_tokens=2, stop=".").log_prob(texts)
    options = lm.encode(["c", "de"])
    plan = lm.choice("ab", texts[:, None], options=["c", "de"]).log_prob(options)
    likelihood = (plan + lm("ab", options).log_prob(lm.encode("ed"))).logsumexp(-1)
    exact = (log_q.exp() * likelihood).sum().item()  # prior and proposal cancel
    assert -elbo.loss(model, guide, "ed") == pytest.approx(exact, abs=0.1)


def test_trace_enum_elbo_inside_a_plate(lm: LM) -> None:
    def model(endings: list[str]) -> None:
        with pyro.plate("rows", len(endings)):
            plan = pyro.sample("plan", lm.choice(["ab", "c"], options=["c", "de"]))
            pyro.sample("ending", lm(["ab", "c"], plan), obs=lm.encode(endings))

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(model), lambda endings: None, ["ed", "a"])
    assert -loss == pytest.approx(exact_posterior(model)(["ed", "a"]).log_evidence.sum(), abs=1e-9)
    svi = SVI(
        config_enumerate(model),
        lambda endings: None,
        pyro.optim.Adam({}),
        TraceEnum_ELBO(max_plate_nesting=1),
    )
    assert svi.evaluate_loss(["ed", "a"]) == pytest.approx(loss)


def test_given_probabilities_stand_in_for_the_models(lm: LM) -> None:
    """In the program; a guide's proposal on the same options is the model's."""
    choice = lm.choice(["d", "ab"], options=["a.", "bc", "e"], probs=[1, 1, 2])
    torch.testing.assert_close(choice.logits.exp().double(), torch.tensor([[0.25, 0.25, 0.5]] * 2).double())
    assert choice.expand((3, 2)).log_prob(lm.encode("e")).exp().tolist() == [[0.5, 0.5]] * 3
    assert "probs=[0.25, 0.25, 0.5]" in repr(choice)
    pyro.set_rng_seed(0)
    assert abs((choice.sample((4000,)) == lm.encode("e")[0]).any(-1).double().mean() - 0.5) < 0.03

    def model(ending: str) -> None:
        plan = pyro.sample("plan", lm.choice("ab", options=["c", "de"], probs=[3, 1]))
        pyro.sample("ending", lm("ab", plan), obs=lm.encode(ending))

    likelihood = torch.stack([lm("ab" + plan).log_prob(lm.encode("ed")) for plan in ("c", "de")])
    expected = (likelihood + torch.tensor([0.75, 0.25]).log()).logsumexp(0)
    assert exact_posterior(model)("ed").log_evidence == pytest.approx(float(expected), abs=1e-6)
    proposal = pyro.poutine.trace(PromptGuide(model, lm, {"plan": lambda: ["d"]})).get_trace("ed").nodes["plan"]["fn"]
    torch.testing.assert_close(proposal.logits, lm.choice("d", options=["c", "de"]).logits)


@pytest.mark.parametrize("probs", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_probabilities_that_are_none(lm: LM, probs: list[float]) -> None:
    with pytest.raises(ValueError, match="must be a positive number for each of the 2 options"):
        lm.choice("a", options=["b", "c"], probs=probs)


def test_a_tilt_is_added_before_the_options_are_normalised(lm: LM) -> None:
    """As a law, as a guide that learns, and in plates."""
    options, tilt = ["c", "de"], torch.tensor([[0.0, 0.0], [1.0, -1.0], [3.0, 0.5]], dtype=torch.float64)
    plain, choice = lm.choice("ab", options=options), lm.choice("ab", options=options, tilt=tilt)
    assert choice.batch_shape == (3,)
    weights = plain.logits.exp() * tilt.exp()
    expected = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(choice.logits.exp(), expected)
    torch.testing.assert_close(choice.log_prob(choice.enumerate_support()).exp().T, expected)
    torch.testing.assert_close(choice.expand((2, 3)).logits.exp(), expected.expand(2, 3, 2))
    both = lm.choice(["ab", "d", "e"], options=options, probs=[1, 3], tilt=tilt[1])
    torch.testing.assert_close(
        both.logits.exp().double(), torch.tensor([[torch.e**2, 3]] * 3).double() / (torch.e**2 + 3)
    )
    assert repr(choice).endswith(", tilted)")
    assert "tilted" not in repr(plain)
    drawn = (choice.sample((4000,)) == choice.options[0]).all(-1).double().mean(0)
    torch.testing.assert_close(drawn, expected[:, 0], atol=0.04, rtol=0)  # standard error at most 0.008

    def program(endings: list[str]) -> None:
        with pyro.plate("rows", len(endings), dim=-1):
            plan = pyro.sample("plan", lm.choice("ab", options=options))
            pyro.sample("ending", lm("ab", plan), obs=lm.encode(endings))

    scores = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)

    def guide(endings: list[str]) -> None:
        with pyro.plate("rows", len(endings), dim=-1):
            pyro.sample("plan", lm.choice("ab", options=options, tilt=scores), infer={"enumerate": "parallel"})

    # The posterior's tilt is the log-likelihood, where the ELBO is the evidence and its gradient is none.
    endings = ["ed", "a."]
    likelihood = torch.stack([
        torch.stack([lm("ab" + plan).log_prob(lm.encode(ending)) for plan in options]) for ending in endings
    ])  # fmt: skip
    evidence = float((plain.logits + likelihood).logsumexp(-1).sum())
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(program, guide, endings)
    (before,) = torch.autograd.grad(loss, scores)
    assert float(-loss.detach()) < evidence - 1e-3
    assert float(before.abs().max()) > 1e-3
    scores.data = likelihood.detach() + torch.tensor([[5.0], [-3.0]])  # whatever they share
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(program, guide, endings)
    (after,) = torch.autograd.grad(loss, scores)
    assert float(-loss.detach()) == pytest.approx(evidence, abs=1e-8)
    assert float(after.abs().max()) < 1e-8
    proposal = choice.with_context(lm.context("d"), None)
    torch.testing.assert_close(proposal.logits, lm.choice("d", options=options).logits)


@pytest.mark.parametrize(
    ("tilt", "said"),
    [
        ([1.0, 2.0, 3.0], r"tilt= has shape \(3,\)"),
        (torch.zeros(()), r"tilt= has shape \(\)"),
        (torch.zeros(3, 2), r"tilt= has shape \(3, 2\).*: \(2, 2\), or \(2,\)"),
        ([1.0, float("nan")], "no finite floating point number"),
        ([1.0, -float("inf")], "no finite floating point number"),
        (torch.tensor([1, 2]), "no finite floating point number"),
    ],
)
def test_a_tilt_of_another_shape_or_none_is_refused(lm: LM, tilt: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lm.choice(["a", "d"], options=["b", "c"], tilt=tilt)  # type: ignore[arg-type]


def test_given_probabilities_have_the_models_precision(lm: LM) -> None:
    assert lm.dtype == torch.float64
    fn = lm.choice("a", options=["b", "cd"], probs=[0.25, 0.75])
    assert fn.log_prob(fn.enumerate_support()).dtype == torch.float64
