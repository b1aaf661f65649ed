"""What a guide is told inside the plates of a program, and of programs whose number of sites varies."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from llmppl import LM, fit, importance
from llmppl.guides import AutoregressiveGuide
from llmppl.objectives import WakeSleep
from llmppl.programs.simulated_pair import SimulatedPair


@pytest.mark.parametrize("dim", [None, -1])
def test_an_argument_is_told_inside_the_programs_own_plate(lm: LM, dim: int | None) -> None:
    """Whether an argument carries the observation is seen by another run of the program, with plates of its own."""

    def program(beginnings: list[str], endings: list[str]) -> None:
        with pyro.plate("stories", len(beginnings), dim=dim):
            middle = pyro.sample("middle", lm(beginnings, max_tokens=2, stop="."))
            pyro.sample("ending", lm(beginnings, middle), obs=lm.encode(endings))

    told: list[Any] = []

    def prompt(beginnings: Any, endings: Any) -> list[Any]:
        told.append(endings)
        return [endings, beginnings]

    guide = AutoregressiveGuide(program, lm, prompt={"middle": prompt}, rank=2, seed=0)
    data = [(["ab", "b", "ba"], ["cd", "dc", "cc"])]
    fit(program, guide, data, WakeSleep(4, insomnia=0.0), 2, progress=False)
    told.clear()
    pyro.set_rng_seed(0)
    guide(*data[0], observations={"ending": lm.encode(["dd", "aa", "bb"])})
    assert all(isinstance(value, Tensor) for value in told)
    assert lm.decode(told[-1]) == ["dd", "aa", "bb"]
    assert importance(program, guide, 8)(*data[0]).batch_shape == (3,)


def looping(lm: LM) -> Any:
    def program(count: int, ending: str) -> None:
        pieces: list[Any] = ["a"]
        for n in range(1, count + 1):
            pieces.append(pyro.sample(f"part_{n}", lm(*pieces, max_tokens=2, stop=".")))
        pyro.sample("ending", lm(*pieces), obs=lm.encode(ending))

    return program


def test_prompts_may_name_more_turns_of_a_loop_than_there_are(lm: LM) -> None:
    prompts = {f"part_{n}": (lambda ending, n=n: [ending, "bc"[n % 2]]) for n in (1, 2, 3)}
    guide = AutoregressiveGuide(looping(lm), lm, prompt=prompts, rank=2, seed=0)
    assert set(guide(1, "cd")) == {"part_1"}
    assert set(guide(3, "cd")) == {"part_1", "part_2", "part_3"}
    wrong = AutoregressiveGuide(looping(lm), lm, prompt={"parts_1": lambda ending: [ending]}, rank=2, seed=0)
    with pytest.raises(ValueError, match=r"prompt= names \['parts_1'\]"):
        wrong(2, "cd")


def test_a_stored_pair_may_be_narrower_than_its_site(lm: LM) -> None:
    def program(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", lm(beginning, max_tokens=4, stop="."))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    guide = AutoregressiveGuide(program, lm, rank=2, seed=0)
    losses = []
    for middle in (torch.tensor([1, 0]), torch.tensor([1, 0, -1, -1])):
        pair = SimulatedPair.of(("ab", "cd"), {"middle": middle}, {"ending": lm.encode("cd")})
        losses.append(
            fit(program, guide, [pair], WakeSleep(1, insomnia=0.0), 1, progress=False, learning_rate=1e-9).loss
        )
    assert losses[0] == pytest.approx(losses[1])
