"""Balance over every ended prefix, for several texts, other latents and factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story, kl
from torch import Tensor

from llmppl import LM, exact_posterior
from llmppl.guides import AutoregressiveGuide, GFlowNetGuide, PromptGuide
from llmppl.network.text_law import TextLaw
from llmppl.network.text_tensors import lengths
from llmppl.objectives import DetailedBalance, SubTrajectoryBalance
from llmppl.objectives.behaviour import Behaviour
from llmppl.objectives.prefix_states import prefixes
from llmppl.programs.particles import propose
from llmppl.programs.structure import structure
from llmppl.testing import tiny_lm

OBJECTIVES = [SubTrajectoryBalance(8), SubTrajectoryBalance(8, every=2), DetailedBalance(8)]


def two_texts(lm: LM) -> Callable[..., Tensor]:
    """A question and its answer, both latent, a factor on the first, and an observation after both."""

    def program(beginning: str, ending: str) -> Tensor:
        first = pyro.sample("first", lm(beginning, max_tokens=2, stop="."))
        second = pyro.sample("second", lm(beginning, first, max_tokens=2, stop="."))
        pyro.factor("taste", 0.7 * lengths(first).to(torch.float64))
        pyro.sample("ending", lm(beginning, first, second), obs=lm.encode(ending))
        return second

    return program


def joint(lm: LM, beginning: str, ending: str) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of texts and their log-joint, from the distributions directly."""
    texts = lm("a", max_tokens=2, stop=".").enumerate_support()
    first, second = texts.repeat_interleave(len(texts), 0), texts.repeat(len(texts), 1)
    total = lm(beginning, max_tokens=2, stop=".").log_prob(first) + 0.7 * lengths(first)
    total = total + lm(beginning, first, max_tokens=2, stop=".").log_prob(second)
    return first, second, total + lm(beginning, first, second).log_prob(lm.encode(ending))


def test_prefixes_of_a_text_are_its_ended_beginnings() -> None:
    law = TextLaw(6, 3, 0, torch.tensor([0, 5]))
    texts, valid = prefixes(torch.tensor([[3, 2, 5], [3, 2, 1], [0, -1, -1]]), law)
    assert texts[:, 0].tolist() == [[5, -1, -1], [3, 5, -1], [3, 2, 5], [3, 2, 5]]
    assert valid[:, 0].tolist() == [True, True, True, False]
    assert texts[:, 1].tolist() == [[0, -1, -1], [3, 0, -1], [3, 2, 0], [3, 2, 1]]
    assert valid[:, 1].tolist() == [True] * 4
    assert valid[:, 2].tolist() == [True, False, False, False]
    texts, valid = prefixes(torch.tensor([[3, 2, 5], [3, 2, 1], [0, -1, -1]]), law, every=2)
    assert texts[:, 0].tolist() == [[5, -1, -1], [3, 2, 5], [3, 2, 5]]
    assert valid[:, 0].tolist() == [True, True, False]
    assert texts[:, 1].tolist() == [[0, -1, -1], [3, 2, 0], [3, 2, 1]]
    assert valid[:, 1].tolist() == [True] * 3
    _, valid = prefixes(torch.tensor([[3, 2, 0]]), replace(law, min_tokens=2))
    assert valid[:, 0].tolist() == [False, True, True, False]  # a text of one token is too short


def test_prefixes_that_are_none(lm: LM) -> None:
    for wrong, error in ((0, ValueError), (1.5, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="every must be"):
            SubTrajectoryBalance(4, every=wrong)  # type: ignore[arg-type]
    program = two_texts(lm)
    with pytest.raises(ValueError, match=r"every=3 is beyond the text of site 'first', of max_tokens=2"):
        SubTrajectoryBalance(4, every=3).loss(program, PromptGuide(program, lm), "ab", "cd")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_over_several_texts_is_zero_at_the_posterior_alone(lm: LM, objective: SubTrajectoryBalance) -> None:
    """The exact posterior as a table guide: every state then weighs the same."""
    program = two_texts(lm)
    first, second, log_joint = joint(lm, "ab", "cd")
    table = log_joint.log_softmax(0)

    class Table(dist.TorchDistribution):
        arg_constraints = {}
        event_shape_ = torch.Size([2])

        def __init__(self, law, choose: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
            self.law, self.choose = law, choose
            super().__init__(torch.Size(shape), torch.Size([2]), validate_args=False)

    def posterior_loss(log_q: Tensor) -> float:
        index = torch.distributions.Categorical(logits=log_q).sample((8,))
        rows = {(*a, *b): n for n, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True))}
        total = []
        for k in index.tolist():
            a, b = first[k], second[k]
            states = []
            for which, text in (("first", a), ("second", b)):
                ended, valid = prefixes(text[None], TextLaw(6, 2, 0, torch.tensor([0])))
                for t, ok in zip(ended[:, 0], valid[:, 0], strict=True):
                    pair = (*t.tolist(), *b.tolist()) if which == "first" else (*a.tolist(), *t.tolist())
                    if bool(ok):
                        states.append(float(log_joint[rows[pair]] - log_q[rows[pair]]))
            total.append(max(states) - min(states))
        return max(total)

    assert posterior_loss(table) == pytest.approx(0.0, abs=1e-9)
    assert posterior_loss(torch.zeros_like(table).log_softmax(0)) > 0.1
    # And the objective's own weights are the very differences, computed apart from it.
    guide = GFlowNetGuide(program, lm, rank=2, seed=0)
    pyro.set_rng_seed(3)
    loss = objective.loss(program, guide, "ab", "cd")
    pyro.set_rng_seed(3)
    trace, _, _ = propose(program, guide, ("ab", "cd"), {}, 8)
    expected = []
    rows = {(*a, *b): n for n, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True))}
    for a, b in zip(trace.nodes["first"]["value"], trace.nodes["second"]["value"], strict=True):
        chain: list[tuple[int, ...]] = []
        for t in range(0, 3, objective.every):
            if t < int(lengths(a)) and (0 not in a[:t].tolist()):
                chain.append((*[*a[:t].tolist(), 0, -1][:2], *b.tolist()))
        if 0 not in a.tolist():
            chain.append((*a.tolist(), *b.tolist()))
        chain = [pair for pair in chain if pair[:2] != tuple(a.tolist())]
        for t in range(0, 3, objective.every):
            if t < int(lengths(b)) and (0 not in b[:t].tolist()):
                chain.append((*a.tolist(), *[*b[:t].tolist(), 0, -1][:2]))
        if (*a.tolist(), *b.tolist()) not in chain:
            chain.append((*a.tolist(), *b.tolist()))
        weights = []
        for pair in chain:
            values = torch.tensor(pair)
            log_q = lm.encode("cd")  # the guide is told the ending, then the beginning, then the first text
            q = lm(log_q, "ab", max_tokens=2, stop=".").log_prob(values[:2])
            q = q + lm(log_q, "ab", values[:2], max_tokens=2, stop=".").log_prob(values[2:])
            weights.append(float(log_joint[rows[pair]] - q))
        w = torch.tensor(weights, dtype=torch.float64)
        squares = (w[:, None] - w[None]).square()
        near = isinstance(objective, DetailedBalance)
        chosen = [(i, j) for i in range(len(w)) for j in range(i + 1, len(w)) if not near or j == i + 1]
        expected.append(sum(float(squares[i, j]) for i, j in chosen) / max(len(chosen), 1))
    assert loss == pytest.approx(sum(expected) / 8, rel=1e-4)


@pytest.mark.long
def test_a_guide_of_two_texts_reaches_the_exact_posterior() -> None:
    lm = tiny_lm(vocabulary=4)
    program = two_texts(lm)
    guide = AutoregressiveGuide(program, lm, rank=8, seed=0)
    behaviour = Behaviour(tempered=0.75, temperatures=(1.5, 3.0))
    elbo = SubTrajectoryBalance(12, behaviour=behaviour)(program, guide)
    optimizer = torch.optim.Adam(guide.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 200)
    for _ in range(200):
        optimizer.zero_grad()
        elbo("ab", "ca").backward()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    first, second, log_joint = joint(lm, "ab", "ca")
    posterior = exact_posterior(program)("ab", "ca")
    assert float(posterior.log_evidence) == pytest.approx(float(log_joint.logsumexp(0)), abs=1e-4)
    log_p = log_joint.log_softmax(0)
    with torch.no_grad():
        given = pyro.poutine.condition(guide, data={"first": first})
        trace = pyro.poutine.trace(given).get_trace("ab", "ca")
        log_q = trace.nodes["first"]["fn"].log_prob(first) + trace.nodes["second"]["fn"].log_prob(second)
        prior = lm("ab", max_tokens=2, stop=".").log_prob(first)
        prior = prior + lm("ab", first, max_tokens=2, stop=".").log_prob(second)
    assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-4)
    assert min(kl(prior, log_p), kl(log_p, prior)) > 0.3, "the prior is too good for this to be a test"
    assert max(kl(log_q, log_p), kl(log_p, log_q)) < 0.05, (kl(log_q, log_p), kl(log_p, log_q))


def test_other_latents_keep_their_values(story: Story) -> None:
    def program(beginning: str, ending: str) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        middle = story.program(beginning, ending)
        pyro.factor("taste", weight * lengths(middle))

    def others(beginning: str, ending: str) -> None:
        pyro.sample("weight", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    guide = AutoregressiveGuide(program, story.lm, others=others, rank=2, seed=0)
    loss = SubTrajectoryBalance(6).loss_and_grads(program, guide, *story.args)
    assert loss > 0
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in guide.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_texts_in_a_plate_are_one_configuration(lm: LM, objective: SubTrajectoryBalance) -> None:
    """Under a guide that is the prior, only the factor on the texts' lengths is left of the weights."""

    def program(beginning: str) -> None:
        with pyro.plate("texts", 3):
            middle = pyro.sample("middle", lm(beginning, max_tokens=3, stop="."))
            pyro.factor("taste", 0.7 * lengths(middle).double())
        # A site outside of it makes the plate part of one observation.
        pyro.sample("title", lm(beginning), obs=lm.encode("c"))

    guide = AutoregressiveGuide(program, lm, prompt={"middle": lambda beginning: [beginning]}, rank=2, seed=0)
    pyro.set_rng_seed(4)
    loss = objective.loss_and_grads(program, guide, "ab")
    pyro.set_rng_seed(4)
    trace, _, _ = propose(program, guide, ("ab",), {}, 8)
    expected = 0.0
    for texts in trace.nodes["middle"]["value"]:
        free = lengths(texts) - (texts == 0).any(-1).long()
        # All three are cut at once, as long as each has so many tokens; the sample as a whole comes last.
        reached = range(0, int(free.min()) + 1, objective.every)
        cut = [t for t in reached if t < 3 and not bool(((free == t) & (texts == 0).any(-1)).all())]
        weights = torch.tensor([0.7 * 3 * (t + 1) for t in cut] + [0.7 * float(lengths(texts).sum())])
        pairs = [(a, b) for a in range(len(weights)) for b in range(a + 1, len(weights))]
        chosen = [p for p in pairs if p[1] == p[0] + 1 or not isinstance(objective, DetailedBalance)]
        squares = [float(weights[a] - weights[b]) ** 2 for a, b in chosen]
        expected += sum(squares) / max(len(squares), 1) / 8
    assert expected > 0.1
    assert loss == pytest.approx(expected, rel=1e-4)


def test_a_joint_that_depends_on_lengths_in_python_is_refused(story: Story) -> None:
    lm = story.lm

    def cut(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", lm(beginning, max_tokens=3, stop="."))
        # Every particle is charged for the longest one.
        pyro.factor("long", -5.0 * (4 - lengths(middle)).max().double().expand(middle.shape[:-1]))

    guide = AutoregressiveGuide(cut, lm, prompt={"middle": lambda beginning: [beginning]}, rank=2)
    pyro.set_rng_seed(0)
    with pytest.raises(ValueError, match="depends in Python on the texts' lengths.*use TrajectoryBalance"):
        SubTrajectoryBalance(4).loss(cut, guide, *story.args)

    def branching(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", lm(beginning, max_tokens=3, stop="."))
        if len(middle.reshape(-1, 3)) > 8:
            raise IndexError("no ninth part")
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    guide = AutoregressiveGuide(branching, lm, rank=2)
    with pytest.raises(ValueError, match="cannot be run at prefixes of its texts.*Use TrajectoryBalance"):
        SubTrajectoryBalance(4).loss(branching, guide, *story.args)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_tokens": 3}, "has no stop token"), ({"max_tokens": 3, "grammar": "[ab]+"}, "has a grammar")],
)
def test_a_text_without_terminable_prefixes_is_refused(lm: LM, settings: dict, message: str) -> None:
    from llmppl import Grammar

    if "grammar" in settings:
        settings = {**settings, "grammar": Grammar.regex(settings["grammar"])}

    def program(ending: str) -> None:
        middle = pyro.sample("middle", lm("ab", **settings))
        pyro.sample("ending", lm("ab", middle), obs=lm.encode(ending))

    guide = AutoregressiveGuide(program, lm, rank=2)
    with pytest.raises(ValueError, match=f"{message}.*TrajectoryBalance"):
        SubTrajectoryBalance(4).loss(program, guide, "cd")


def test_every_prefix_costs_its_own_tokens_only(story: Story) -> None:
    """The guide reads its prompt and the samples, the program the samples' ended prefixes and endings."""
    guide = AutoregressiveGuide(story.program, story.lm, rank=2)
    objective = SubTrajectoryBalance(6)
    objective.loss(story.program, guide, *story.args)
    seen: list[int] = []
    story.lm.transformer.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    pyro.set_rng_seed(1)
    objective.loss_and_grads(story.program, guide, *story.args)
    passes = set(seen[-2:])
    pyro.set_rng_seed(1)
    with torch.no_grad():
        middles = structure_of(guide, story)
    rows_p, rows_q = set(), set()
    for row in middles.tolist():
        free = [t for t in row if t > 0]
        rows_q |= {tuple(free[:n]) for n in range(min(len(free), 2) + 1)}
        ended = [(*free[:n], 0) for n in range(min(len(free), 2) + 1)] + ([tuple(free)] if len(free) == 3 else [])
        for text in ended:
            rows_p |= {text[:n] for n in range(len(text) + 1)} | {(*text, 3)}
    # Prompts: "ab" of the program; "cd" and "ab" of the guide; the empty prefix is the prompt's last token.
    assert passes == {len(rows_q) + 3, len(rows_p) + 1}


def structure_of(guide: AutoregressiveGuide, story: Story) -> Tensor:
    trace, _, _ = propose(story.program, guide, story.args, {}, 6)
    assert "middle" in structure(guide, story.args, {}).nodes
    return trace.nodes["middle"]["value"]
