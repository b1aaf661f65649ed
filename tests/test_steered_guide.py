"""A guide whose proposals are the language model's, twisted by features of the text so far."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import character_lm

from llmppl import LM, Grammar, exact_posterior, fit, importance
from llmppl.distributions import TwistedText
from llmppl.distributions.state_twist import StateTwist
from llmppl.guides import SteeredGuide
from llmppl.objectives import TrajectoryBalance, WakeSleep
from llmppl.text.prompts import checked_pieces

GOALS = Grammar.regex(r"[ab]{1,3}")


def counted(told: str, text: str) -> list[float]:
    """How many letters of a text are the one that it is told, and whether the last is."""
    return [float(text.count(told or "a")), float(text.endswith(told or "a"))]


def twisted(lm: LM, told: list[str], seed: int = 0) -> TwistedText:
    torch.manual_seed(seed)
    twist = StateTwist(counted, hidden=4).double()
    with torch.no_grad():
        for parameter in twist.parameters():
            parameter.add_(torch.randn_like(parameter))
    prior = lm(["m"] * len(told), grammar=GOALS, max_tokens=4)
    return TwistedText(lm, prior.context, prior.law, lm.encode(told), twist)


@pytest.fixture(scope="module")
def letters() -> LM:
    return character_lm("abm.", ".")


def test_the_steered_law_sums_to_one_and_is_the_formula(letters: LM) -> None:
    fn = twisted(letters, ["a", "b"])
    prior = letters("m", grammar=GOALS, max_tokens=4)
    texts = prior.enumerate_support()
    assert len(texts) == 14
    for row, told in enumerate("ab"):
        log_q = fn.rows(torch.tensor([row])).log_prob(texts).detach()
        assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-12)
        for text, found in zip(texts, log_q, strict=True):
            ids, expected, written = [t for t in text.tolist() if t >= 0], 0.0, ""
            for n, token in enumerate(ids):
                law = letters(torch.cat([letters.encode("m"), text[:n]]), max_tokens=1).log_prob
                everything = torch.arange(letters.vocabulary)[:, None]
                signs = letters.decode(everything)
                may = [(s in ("a", "b") and n < 3) or (s == "." and n > 0) for s in signs]
                base = law(everything).detach()[torch.tensor(may)].log_softmax(-1)
                seen = []
                for sign, p in zip([s for s, m in zip(signs, may, strict=True) if m], base, strict=True):
                    ends = sign == "."
                    numbers = counted(told, written if ends else written + sign)
                    none = [0.0, 0.0]
                    first, second = (none, numbers) if ends else (numbers, none)
                    seen.append([*first, *second, float(ends), float(not ends), n / 4, max(float(p), -20.0) / 10])
                terms = base + fn.twist(torch.tensor(seen, dtype=torch.float64)).detach()
                own = [s for s, m in zip(signs, may, strict=True) if m].index(letters.decode(torch.tensor([token])))
                expected += float(terms[own] - terms.logsumexp(-1))
                written += letters.decode(torch.tensor([token]))
            assert float(found) == pytest.approx(expected, abs=1e-9)


def test_features_that_count_from_the_start(letters: LM) -> None:
    """Before any training a law is the prior's with the given coefficients, apart for texts that end, and anew after a
    reset."""
    twist = StateTwist(counted, 4, ((0.5, 0.0), (-1.0, 2.0))).double()
    prior = letters(["m"], grammar=GOALS, max_tokens=4)
    for again in (False, True):
        if again:
            with torch.no_grad():
                twist.linear.weight.zero_()
            twist.reset_parameters()
        fn = TwistedText(letters, prior.context, prior.law, letters.encode(["a"]), twist)
        first, after = (fn.log_prob(letters.encode([text]))[0].detach() for text in ("a.", "b."))
        laws = {}
        for begun in ("a", "b"):
            context = torch.cat([letters.encode("m"), letters.encode(begun)])
            law = letters(context, max_tokens=1).log_prob(letters.encode(["a", "b", "."]))
            laws[begun] = [float(p) for p in law.log_softmax(-1).detach()]
        begins = letters("m", max_tokens=1).log_prob(letters.encode(["a", "b"])).log_softmax(-1).detach()
        begins = torch.tensor([float(begins[0]) + 0.5, float(begins[1])]).log_softmax(-1)
        ends = {
            "a": torch.tensor([laws["a"][0] + 1.0, laws["a"][1] + 0.5, laws["a"][2] - 1.0 + 2.0]).log_softmax(-1)[2],
            "b": torch.tensor([laws["b"][0] + 0.5, laws["b"][1], laws["b"][2]]).log_softmax(-1)[2],
        }
        assert float(first) == pytest.approx(float(begins[0] + ends["a"]), abs=1e-5)
        assert float(after) == pytest.approx(float(begins[1] + ends["b"]), abs=1e-5)
    with pytest.raises(ValueError, match="must be two sequences of 2 numbers"):
        StateTwist(counted, 4, ((1.0,), (1.0,)))
    program = letters_counted(letters)
    with pytest.raises(ValueError, match=r"start= names \['txt'\]"):
        SteeredGuide(program, letters, {"text": counted}, {"text": lambda: ["a"]}, start={"txt": ((0, 0), (0, 0))})
    told = {"text": lambda: ["a"]}
    started = SteeredGuide(program, letters, {"text": counted}, told, start={"text": ((0.5, 0.0), (-1.0, 2.0))})
    assert started.twist["text"].linear.weight[0, :4].tolist() == [0.5, 0.0, -1.0, 2.0]


@pytest.mark.long
def test_steered_draws_follow_the_law_and_are_recorded(letters: LM) -> None:
    fn = twisted(letters, ["a", "b"])
    pyro.set_rng_seed(1)
    drawn = fn.sample((1500,))
    recorded = fn._memo.take(False).sum(-1)
    torch.testing.assert_close(recorded, twisted(letters, ["a", "b"]).log_prob(drawn).detach())
    again = TwistedText(letters, fn.context, fn.law, fn.told, fn.twist)
    assert again.pending(drawn) is None, "what was drawn need not be read"
    torch.testing.assert_close(again.log_prob(drawn), twisted(letters, ["a", "b"]).log_prob(drawn))
    texts = letters("m", grammar=GOALS, max_tokens=4).enumerate_support()
    for row in (0, 1):
        q = fn.rows(torch.tensor([row])).log_prob(texts).detach().exp()
        count = (drawn[:, row, None] == texts).all(-1).sum(0).double()
        common = q * 1500 > 5
        statistic = ((count - 1500 * q)[common] ** 2 / (1500 * q[common])).sum()
        assert float(statistic) < int(common.sum()) + 4 * (2 * int(common.sum())) ** 0.5, "chi-square, four deviations"


def test_the_gradient_of_a_steered_text(letters: LM) -> None:
    """Against finite differences of the twist's parameters."""
    fn = twisted(letters, ["a"])
    text = letters.encode("ab.")[None]
    fn.log_prob(text).sum().backward()
    for parameter in fn.twist.parameters():
        flat, slope = parameter.data.view(-1), parameter.grad.view(-1)
        for n in range(0, len(flat), 5):
            values = []
            for step in (1e-6, -1e-6):
                other = twisted(letters, ["a"])
                same = dict(zip(fn.twist.parameters(), other.twist.parameters(), strict=True))[parameter]
                same.data.view(-1)[n] += step
                values.append(float(other.log_prob(text).sum().detach()))
            assert float(slope[n]) == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6)


# --- the guide -----------------------------------------------------------------------------------


TEXTS = ["", *("".join(signs) for n in (1, 2, 3) for signs in itertools.product("ab", repeat=n))]


def toward(told: str, text: str) -> list[float]:
    """Every text so far by itself, for each of four counts: enough to be the posterior exactly."""
    here = [0.0] * 4 * len(TEXTS)
    here[len(TEXTS) * int(told or 0) + TEXTS.index(text)] = 1.0
    return here


def letters_counted(lm: LM) -> Any:
    """A text with so many times the letter a, more or less."""

    def program(count: Any) -> None:
        text = pyro.sample("text", lm("m", grammar=GOALS, max_tokens=4))
        found = lm.map(lambda written: float(written.count("a")), text, returns=float)
        pyro.sample("count", dist.Normal(found, 0.3), obs=count)

    return program


def steered(lm: LM, program: Any, **keywords: Any) -> SteeredGuide:
    told = {"text": lambda count: [lm.map(lambda n: str(min(max(round(n), 0), 3)), count)]}
    return SteeredGuide(program, lm, {"text": toward}, told, seed=0, **keywords)


@pytest.mark.long
def test_a_steered_guide_learns_the_posterior(numbered: LM) -> None:
    program = letters_counted(numbered)
    guide = steered(numbered, program)
    rows = [(torch.tensor(float(n)),) for n in (0, 1, 2, 3)]
    before = [importance(program, guide, 400, progress=False)(*row).ess for row in rows]
    objective = WakeSleep(16, insomnia=0.0)
    fit(program, guide, rows, objective, 80, 4, learning_rate=1e-1, schedule="cosine", seed=0, progress=False)
    for row in rows:
        exact = exact_posterior(program)(*row)
        pyro.set_rng_seed(0)
        posterior = importance(program, guide, 400)(*row)
        assert abs(posterior.log_evidence - exact.log_evidence) < 4 * posterior.log_evidence_error + 0.01
        with pyro.poutine.trace() as run:
            guide(*row)
        by_text = dict(zip(exact.decode("text"), exact.weights, strict=True))
        texts = numbered.encode(list(by_text))
        q = run.trace.nodes["text"]["fn"].log_prob(texts).detach().exp().numpy()
        distance = 0.5 * np.abs(q - np.array(list(by_text.values()))).sum() + 0.5 * (1 - q.sum())
        assert distance < 0.2, "total variation"
        assert posterior.ess > 330
    assert max(before) < 300


@pytest.fixture(scope="module")
def numbered() -> LM:
    return character_lm("abm.0123456789", ".")


def test_rows_are_steered_as_one_by_one(numbered: LM) -> None:
    program = letters_counted(numbered)
    guide = steered(numbered, program)
    fit(program, guide, [(torch.tensor(2.0),)], TrajectoryBalance(8), 5, learning_rate=5e-2, seed=0, progress=False)
    pyro.set_rng_seed(0)
    with pyro.plate("rows", 2):
        run = pyro.poutine.trace(guide).get_trace(torch.tensor([1.0, 3.0]))
    texts = run.nodes["text"]["value"]
    both = run.nodes["text"]["fn"].log_prob(texts)
    for n, count in enumerate((1.0, 3.0)):
        own = pyro.poutine.trace(guide).get_trace(torch.tensor(count)).nodes["text"]["fn"]
        torch.testing.assert_close(own.log_prob(texts[n]), both[n])
    assert own.log_prob(texts[0]) != both[0]


def test_copies_and_files(numbered: LM, tmp_path: Path) -> None:
    program = letters_counted(numbered)
    rows = [(torch.tensor(2.0),)]
    guide = steered(numbered, program)
    assert "features of ['text'], 4,156 parameters" in repr(guide)
    fit(program, guide, rows, TrajectoryBalance(8), 3, learning_rate=5e-2, seed=0, progress=False)
    guide.save(tmp_path / "steered.safetensors", torch.float64)
    other = steered(numbered, program)
    other.load(tmp_path / "steered.safetensors")
    before = {name: tensor.detach().clone() for name, tensor in guide.tensors().items()}
    for name, tensor in other.tensors().items():
        torch.testing.assert_close(tensor, before[name])
    twin = copy.deepcopy(guide)
    fit(program, twin, rows, TrajectoryBalance(8), 1, learning_rate=5e-2, progress=False)
    assert any(not torch.equal(twin.tensors()[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(guide.tensors()[name], tensor) for name, tensor in before.items())
    one = SteeredGuide(program, numbered, {"text": lambda told, text: [1.0]}, guide.told)
    with pytest.raises(ValueError, match="features"):
        one.load(tmp_path / "steered.safetensors")
    twist = pickle.loads(pickle.dumps(StateTwist(toward, 4)))
    seen = twist.seen("1", "b", ["a", "."], torch.zeros(2), ".", 0.5)
    assert seen.nonzero().tolist() == [[0, 20], [0, 121], [0, 122], [1, 77], [1, 120], [1, 122]]


def test_what_cannot_be_steered(numbered: LM) -> None:
    program = letters_counted(numbered)
    with pytest.raises(ValueError, match="Give both for each site"):
        SteeredGuide(program, numbered, {"text": toward}, {})
    with pytest.raises(ValueError, match="as many for every text"):
        SteeredGuide(
            program, numbered, {"text": lambda told, text: [0.0] * (1 + len(text))}, {"text": lambda count: ["1"]}
        )(torch.tensor(1.0))
    wide = character_lm("".join(map(chr, range(0x4E00, 0x4E00 + 300))) + "m")
    free = SteeredGuide(
        lambda: pyro.sample("z", wide("m", max_tokens=2)), wide, {"z": lambda told, text: [0.0]}, {"z": lambda: ["m"]}
    )
    with pytest.raises(ValueError, match="at most 256"):
        free()


def test_a_told_string_is_a_piece_and_stands_in_no_other() -> None:
    goal = "ab"
    assert checked_pieces("told", [goal, "c"], {"goal": goal}, str) == ["ab", "c"]
    with pytest.raises(TypeError, match="told writes 'goal', which is str here, into a string"):
        checked_pieces("told", [goal, f"c{goal}"], {"goal": goal}, str)
