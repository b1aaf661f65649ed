"""What else has been proposed for latent reasoning, and where it converges to: not to the posterior.

Tables over the enumerated texts of a tiny model take the place of guides, so that what remains is the objective's own
bias. Beside each stands the objective of this library that has none. See ``docs/papers.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import kl
from torch import Tensor

from llmppl import exact_posterior
from llmppl.models import rationale
from llmppl.testing import tiny_lm

LONGEST = 3


@dataclass(frozen=True)
class Table:
    """Every text with its length, log p(z) and log p(x|z)."""

    texts: Tensor
    lengths: Tensor
    log_prior: Tensor
    log_likelihood: Tensor

    @property
    def log_posterior(self) -> Tensor:
        return (self.log_prior + self.log_likelihood).log_softmax(0)


@pytest.fixture(scope="module")
def table() -> Table:
    lm = tiny_lm(vocabulary=4, dtype=torch.float64)
    law = lm("ab", max_tokens=LONGEST, stop=".")
    texts = law.enumerate_support()
    likelihood = lm("ab", texts).log_prob(lm.encode("ca."))
    return Table(texts, (texts >= 0).sum(1), law.log_prob(texts).detach(), likelihood.detach())


def minimised(loss: Callable[[], Tensor], parameters: list[Tensor]) -> float:
    optimizer = torch.optim.LBFGS(parameters, max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
    return float(loss().detach())


# --- a log-ratio that is divided by the length (FlowRL) ------------------------------------------------


def test_dividing_by_the_length_is_another_target_and_its_log_partition_is_not_the_evidence(table: Table) -> None:
    """(log Z + (log q − log p)/|z| − r)² is zero at p(z) exp(|z| (r − log Z)), with the log Z that makes it sum to one.

    The reward r is the log-likelihood, β = 1.
    """
    logits = torch.zeros(len(table.texts), dtype=torch.float64, requires_grad=True)
    log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    reward = table.log_likelihood

    def loss() -> Tensor:
        ratio = (logits.log_softmax(0) - table.log_prior) / table.lengths
        return (log_z + ratio - reward).square().mean()

    assert minimised(loss, [logits, log_z]) < 1e-10
    reached = logits.detach().log_softmax(0)
    named = table.log_prior + table.lengths * (reward - log_z.detach())
    torch.testing.assert_close(reached, named, atol=1e-4, rtol=0)
    assert float(named.logsumexp(0)) == pytest.approx(0.0, abs=1e-4)
    # What it is taken for, and what it is taken for normalising.
    evidence = float((table.log_prior + table.log_likelihood).logsumexp(0))
    assert abs(float(log_z.detach()) - evidence) > 0.1
    assert kl(table.log_posterior, reached) > 0.1

    def balance() -> Tensor:
        return (log_z + logits.log_softmax(0) - table.log_prior - reward).square().mean()

    assert minimised(balance, [logits, log_z]) < 1e-10
    assert float(log_z.detach()) == pytest.approx(evidence, abs=1e-4)
    assert kl(table.log_posterior, logits.detach().log_softmax(0)) < 1e-8


# --- a clipped trajectory weight beside a token-mean residual ---------------------------------------------


def test_a_clipped_weight_beside_a_mean_over_tokens_weighs_two_different_things(table: Table) -> None:
    """w = min(q/q_old, c) makes old draws count as new ones, text by text; a residual that is a mean over tokens has
    another fixed point for every weighting where the family cannot reach zero, and clipping chooses among them."""
    excess = (table.log_posterior - table.log_prior).detach()
    old = table.log_prior

    def reached(clip: float, per_token: bool) -> float:
        """A family of one parameter: p(z) exp(t |z|) / Z(t), which the posterior is not in."""
        slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for _ in range(3000):
            log_q = (table.log_prior + slope * table.lengths).log_softmax(0)
            weight = (log_q - old).exp().clamp(max=clip).detach()
            residual = log_q - table.log_prior - excess
            residual = residual / table.lengths if per_token else residual
            centred = residual - (old.exp() * weight * residual).sum().detach() / (old.exp() * weight).sum()
            loss = (old.exp() * weight * centred.square()).sum()
            (gradient,) = torch.autograd.grad(loss, [slope])
            with torch.no_grad():
                slope -= 0.05 * gradient
        return float(slope.detach())

    def exact() -> float:
        slope = torch.zeros((), dtype=torch.float64, requires_grad=True)

        def reverse_kl() -> Tensor:
            log_q = (table.log_prior + slope * table.lengths).log_softmax(0)
            return (log_q.exp() * (log_q - table.log_posterior)).sum()

        minimised(reverse_kl, [slope])
        return float(slope.detach())

    whole = reached(math.inf, per_token=False)
    # VarGrad on draws that are weighed back has the gradient of the reverse KL.
    assert whole == pytest.approx(exact(), abs=1e-5)
    clipped, per_token = reached(0.1, per_token=False), reached(math.inf, per_token=True)
    assert abs(clipped - whole) > 0.05
    assert abs(per_token - whole) > 0.2
    # The two biases are not those of two parts of one mistake: a clip moves the one fixed point far more.
    assert abs(reached(0.1, per_token=True) - per_token) < 0.4 * abs(clipped - whole)


# --- rewards between every λ-th prefix (LaCoT) ----------------------------------------------------------------

State = tuple[int, float]
"""Which text a prefix is once it is ended, and the log-reward that it is given."""


def states_of(table: Table, every: int, interpolated: bool) -> list[list[State]]:
    """The states of the trajectory to each text: every so many tokens and the end, or all, the others' rewards on a
    straight line between their neighbours' (every = 2)."""
    row = {tuple(t for t in text if t >= 0): n for n, text in enumerate(table.texts.tolist())}
    log_joint = (table.log_prior + table.log_likelihood).tolist()
    found = []
    for text in row:
        tokens = tuple(t for t in text if t > 0)  # without the stop token, id 0
        ended = [row[tokens] if t == LONGEST else row[(*tokens[:t], 0)] for t in range(len(tokens) + 1)]
        rewards = [log_joint[n] for n in ended]
        between = [t for t in range(len(tokens)) if t % every]
        if interpolated:
            for t in between:
                rewards[t] = (rewards[t - 1] + rewards[t + 1]) / 2
        kept = [t for t in range(len(ended)) if interpolated or t not in between]
        found.append([(ended[t], rewards[t]) for t in kept])
    return found


def sub_trajectory(trajectories: list[list[State]], log_q: Tensor) -> Tensor:
    """Eq. 3 of Hu et al. 2024 with all trajectories weighed alike."""
    pairs = [(i, j) for states in trajectories for n, i in enumerate(states) for j in states[n + 1 :]]
    (first, first_reward), (last, last_reward) = (zip(*column, strict=True) for column in zip(*pairs, strict=True))
    difference = torch.tensor(first_reward) - torch.tensor(last_reward) - log_q[list(first)] + log_q[list(last)]
    return difference.square().mean()


def test_interpolated_rewards_move_the_fixed_point_and_every_second_prefix_does_not(table: Table) -> None:
    reached = {}
    for name, every, interpolated in (("all", 1, False), ("every second", 2, False), ("interpolated", 2, True)):
        trajectories = states_of(table, every, interpolated)
        logits = torch.zeros(len(table.texts), dtype=torch.float64, requires_grad=True)
        least = minimised(lambda t=trajectories, x=logits: sub_trajectory(t, x.log_softmax(0)), [logits])
        at_posterior = float(sub_trajectory(trajectories, table.log_posterior))
        reached[name] = kl(table.log_posterior, logits.detach().log_softmax(0))
        if interpolated:
            assert least > 0.01
            assert at_posterior > least + 0.01
        else:
            assert at_posterior < 1e-12
            assert least < 1e-8
    assert reached["all"] < 1e-6
    assert reached["every second"] < 1e-6
    assert reached["interpolated"] > 0.02


# --- only draws that are right (rejection fine-tuning, STaR) -------------------------------------------------------


def test_keeping_right_draws_is_harmless_to_balance_and_turns_em_to_easy_questions(table: Table) -> None:
    """Two questions that want different texts, and a program of one parameter: its texts are longer or shorter."""
    length = table.lengths.double()
    right = {"easy": table.lengths == 1, "hard": table.lengths == LONGEST}
    shift = torch.tensor(0.0, dtype=torch.float64)

    def law(slope: Tensor | float) -> Tensor:
        return (table.log_prior + slope * length).log_softmax(0)

    def log_evidence(slope: Tensor) -> dict[str, Tensor]:
        return {name: law(slope)[own].logsumexp(0) for name, own in right.items()}

    shares = {name: float(value.exp()) for name, value in log_evidence(shift).items()}
    assert shares["easy"] > 1.5 * shares["hard"]

    def fixed_point(by_question: bool) -> float:
        """EM: each question's right draws share one weight; or all right draws are alike, as in a filtered set."""
        slope = torch.zeros((), dtype=torch.float64)
        for _ in range(3000):
            log_p = law(slope)
            gradient = torch.zeros((), dtype=torch.float64)
            for own in right.values():
                kept = log_p.exp() * own
                weight = kept / kept.sum() if by_question else kept
                gradient = gradient + (weight * (length - (log_p.exp() * length).sum())).sum()
            slope = slope + 0.05 * gradient
        return float(slope.detach())

    def best() -> float:
        slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
        minimised(lambda: -sum(log_evidence(slope).values(), torch.zeros((), dtype=torch.float64)), [slope])
        return float(slope.detach())

    exact, em, filtered = best(), fixed_point(True), fixed_point(False)
    assert em == pytest.approx(exact, abs=1e-3)
    assert abs(filtered - exact) > 0.5
    ahead = {name: float(value) for name, value in log_evidence(torch.tensor(exact)).items()}
    behind = {name: float(value) for name, value in log_evidence(torch.tensor(filtered)).items()}
    assert behind["easy"] > ahead["easy"]
    assert sum(behind.values()) < sum(ahead.values()) - 0.5

    # Balance compares the draws that are there, whatever was thrown away.
    own = right["hard"]
    logits = torch.zeros(len(length), dtype=torch.float64, requires_grad=True)

    def balance() -> Tensor:
        excess = (logits.log_softmax(0) - table.log_prior - table.log_likelihood)[own]
        return excess.var()

    assert minimised(balance, [logits]) < 1e-10
    reached = logits.detach()[own].log_softmax(0)
    torch.testing.assert_close(reached, table.log_posterior[own].log_softmax(0), atol=1e-4, rtol=0)


# --- a guide that is not told the answer -------------------------------------------------------------------------


def test_a_guide_that_is_not_told_the_answer_has_the_mutual_information_for_a_gap() -> None:
    """Of all q(z|x) the best is E_y p(z|x, y) = p(z|x), whose gap is I(z; y | x); told y there is none."""
    lm = tiny_lm(dtype=torch.float64)
    options = ["a", "c"]
    program = rationale(lm, options, before="a", between="d", max_tokens=2, stop=".")
    posteriors = [exact_posterior(program)("c", option) for option in options]
    texts = torch.as_tensor(posteriors[0].samples["rationale"])
    assert all((torch.as_tensor(own.samples["rationale"]) == texts).all() for own in posteriors)
    evidence = torch.tensor([float(own.log_evidence) for own in posteriors], dtype=torch.float64)
    assert float(evidence.exp().sum()) == pytest.approx(1.0)
    given = torch.stack([torch.as_tensor(own.log_weights).double().log_softmax(0) for own in posteriors])

    def gap(log_q: Tensor) -> Tensor:
        return sum(evidence[n].exp() * (given[n].exp() * (given[n] - log_q)).sum() for n in range(2))  # type: ignore[return-value]

    prior = lm("ca", max_tokens=2, stop=".").log_prob(texts).detach()
    information = float(gap(prior))
    assert information > 0.1
    logits = torch.zeros(len(texts), dtype=torch.float64, requires_grad=True)
    assert minimised(lambda: gap(logits.log_softmax(0)), [logits]) == pytest.approx(information, abs=1e-6)
    assert kl(prior, logits.detach().log_softmax(0)) < 1e-4
    # Told, the gap of each label is a guide's own to close.
    told = [torch.zeros(len(texts), dtype=torch.float64, requires_grad=True) for _ in options]

    def gap_told() -> Tensor:
        laws = [own.log_softmax(0) for own in told]
        return sum(evidence[n].exp() * (given[n].exp() * (given[n] - laws[n])).sum() for n in range(2))  # type: ignore[return-value]

    assert minimised(gap_told, told) < 1e-4
