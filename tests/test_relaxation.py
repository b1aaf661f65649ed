"""The gradient of a program's joint through the one-hot codes of its latent texts."""

from __future__ import annotations

import pyro
import pytest
import torch
from conftest import Story
from torch import Tensor

from llmppl import LM
from llmppl.guides import AutoregressiveGuide
from llmppl.network import scoring
from llmppl.network.text_tensors import left_aligned
from llmppl.programs.provenance import Tracked, origins, track
from llmppl.programs.relaxation import sensitivity
from llmppl.text import PAD


def by_hand(lm: LM, beginning: Tensor, value: Tensor, ending: Tensor, temperature: float = 1.0) -> Tensor:
    """The gradient of log p(middle) + log p(ending) in the middle's one-hot code, (T, V), by a plain pass."""
    table = lm.transformer.get_input_embeddings().weight
    code = torch.nn.functional.one_hot(value, 6).double().requires_grad_()
    embedded = torch.cat([table[beginning], code @ table, table[ending]])
    with lm.using(None):
        logits = lm.transformer(inputs_embeds=embedded[None]).logits[0]
    before, until = len(beginning), len(beginning) + len(value)
    own = (code * (logits[before - 1 : until - 1] / temperature).log_softmax(-1)).sum()
    read = logits[until - 1 : until - 1 + len(ending)].log_softmax(-1).gather(-1, ending[:, None]).sum()
    (gradient,) = torch.autograd.grad(own + read, code)
    return gradient


def test_it_is_the_gradient_through_the_one_hot_code(story: Story) -> None:
    lm = story.lm
    AutoregressiveGuide(story.program, lm, rank=2, seed=0)  # layers are wrapped, and the adapter is off
    texts = torch.tensor([[1, 2, 3], [4, 0, PAD], [1, 2, 0]])
    found = sensitivity(lm, story.program, story.args, {}, {"middle": texts})["middle"]
    total, count = torch.zeros(3, 6).double(), torch.zeros(3, 1)
    for text in texts:
        value = text[text != PAD]
        total[: len(value)] += by_hand(lm, lm.encode("ab"), value, lm.encode("cd"))
        count[: len(value)] += 1
    torch.testing.assert_close(found.own + found.others, total / count, atol=1e-10, rtol=0)
    assert found.reached.tolist() == [1.0, 1.0, pytest.approx(2 / 3)]
    # The own part is the law itself: a distribution at each prefix.
    alone = sensitivity(lm, story.program, story.args, {}, {"middle": texts[:1]})["middle"]
    torch.testing.assert_close(alone.own.exp().sum(-1), torch.ones(3).double())


def test_a_temperature_and_forbidden_tokens_belong_to_the_law(lm: LM) -> None:
    def program(ending: str) -> None:
        middle = pyro.sample("middle", lm("ab", max_tokens=3, temperature=0.5))
        pyro.sample("ending", lm("ab", middle), obs=lm.encode(ending))

    texts = torch.tensor([[1, 2, 3]])
    found = sensitivity(lm, program, ("cd",), {}, {"middle": texts})["middle"]
    expected = by_hand(lm, lm.encode("ab"), texts[0], lm.encode("cd"), temperature=0.5)
    torch.testing.assert_close(found.own + found.others, expected, atol=1e-10, rtol=0)

    def masked(ending: str) -> None:
        pyro.sample("middle", lm("ab", max_tokens=3, allowed=[1, 2, 3]))

    found = sensitivity(lm, masked, ("cd",), {}, {"middle": texts})["middle"]
    assert (found.own[:, [0, 4, 5]] == 0).all()
    torch.testing.assert_close(found.own[:, 1:4].exp().sum(-1), torch.ones(3).double())


def test_batches_and_small_passes_give_the_rows_own_gradients(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = story.lm

    def rows(beginnings: list[str], endings: list[str]) -> None:
        with pyro.plate("rows", 2):
            story.program(beginnings, endings)

    texts = torch.tensor([[[1, 2, 3], [4, 0, PAD]], [[5, 5, 0], [2, 2, 2]]])
    args = (["ab", "cde"], ["cd", "ea"])
    together = sensitivity(lm, rows, args, {}, {"middle": texts})["middle"]
    monkeypatch.setitem(scoring.MAX_NODES, "cpu", 7)
    apart = sensitivity(lm, rows, args, {}, {"middle": texts})["middle"]
    torch.testing.assert_close(together.others, apart.others)
    torch.testing.assert_close(together.own, apart.own)
    for n in range(2):
        single = sensitivity(lm, story.program, (args[0][n], args[1][n]), {}, {"middle": texts[:, n]})["middle"]
        torch.testing.assert_close(single.own, together.own[n])
        torch.testing.assert_close(single.others, together.others[n])


def test_a_text_is_followed_wherever_the_program_takes_it(lm: LM) -> None:
    """Sliced, joined, repeated in a plate, copied into another text's context."""

    def program() -> None:
        first = pyro.sample("first", lm("a", max_tokens=2))
        second = pyro.sample("second", lm(first[..., 1:], "b", first, max_tokens=2))
        with pyro.plate("rows", 2):
            moved = torch.cat([second[..., None, :], first[..., None, :].clone()], -1)
            pyro.sample("seen", lm(["c", "dd"], left_aligned(moved)), obs=lm.encode(["e.", "ab"]))

    values = {"first": torch.tensor([[[1, 2]]]), "second": torch.tensor([[[3, 4]]])}
    found = sensitivity(lm, program, (), {}, {k: v[:, 0] for k, v in values.items()})
    table = lm.transformer.get_input_embeddings().weight
    codes = {k: torch.nn.functional.one_hot(v[0, 0], 6).double().requires_grad_() for k, v in values.items()}
    one, two = codes["first"] @ table, codes["second"] @ table

    def text(string: str) -> Tensor:
        return table[lm.encode(string)]

    def last(*parts: Tensor) -> Tensor:
        return lm.transformer(inputs_embeds=torch.cat(parts)[None]).logits[0].log_softmax(-1)

    total = (last(text("a"), one)[0:2] * codes["first"]).sum()
    total = total + (last(one[1:], text("b"), one, two)[3:5] * codes["second"]).sum()
    for start, end in (("c", "e."), ("dd", "ab")):
        laws = last(text(start), two, one, text(end))[-3:-1]
        total = total + laws.gather(-1, lm.encode(end)[:, None]).sum()
    for name, gradient in zip(codes, torch.autograd.grad(total, list(codes.values())), strict=True):
        torch.testing.assert_close(found[name].own + found[name].others, gradient, atol=1e-10, rtol=0)


def test_factors_have_no_gradient_and_do_not_count(story: Story) -> None:
    def program(beginning: str, ending: str) -> None:
        middle = story.program(beginning, ending)
        pyro.factor("long", -3.0 * (middle == PAD).any(-1).double())

    texts = {"middle": torch.tensor([[1, 2, 3], [4, 0, PAD]])}
    with_factor = sensitivity(story.lm, program, story.args, {}, texts)["middle"]
    without = sensitivity(story.lm, story.program, story.args, {}, texts)["middle"]
    assert torch.equal(with_factor.others, without.others)


def test_tokens_keep_their_numbers_where_they_are_moved_and_lose_them_where_they_are_computed_with() -> None:
    tokens = track(torch.tensor([[5, 6, PAD], [7, 8, 9]]), torch.tensor([[0, 1, -1], [3, 4, 5]]))
    assert origins(tokens[1:, ::2]).tolist() == [[3, 5]]
    assert origins(torch.stack([tokens[0], torch.tensor([1, 2, 3])])).tolist() == [[0, 1, -1], [-1, -1, -1]]
    assert origins(torch.nn.functional.pad(tokens, (1, 0), value=7))[1].tolist() == [-1, 3, 4, 5]
    assert origins(tokens.masked_fill(tokens == 8, 2))[1].tolist() == [3, -1, 5]
    assert origins(torch.where(tokens > 7, tokens, torch.zeros_like(tokens)))[1].tolist() == [-1, 4, 5]
    assert [origins(part).tolist() for part in tokens.split(1)] == [[[0, 1, -1]], [[3, 4, 5]]]
    assert not isinstance(tokens + 1, Tracked)
    assert not isinstance(tokens.double(), Tracked)
    assert not isinstance(torch.arange(10)[tokens], Tracked)
