"""Data as people have it: tuples, mappings by name, datasets; what is none of these is refused with the mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from conftest import Story

from llmppl import LM, Evaluation, diagnose, fit, gap_report, simulate
from llmppl.guides import AutoregressiveGuide
from llmppl.objectives import TrajectoryBalance
from llmppl.training.minibatches import checked

TUPLES = [("ab", "cd"), ("b", "e"), ("ca", "d")]
NAMED = [{"ending": ending, "beginning": beginning, "number": n} for n, (beginning, ending) in enumerate(TUPLES)]


class Rows(torch.utils.data.Dataset):
    """A map-style dataset, which raises no IndexError at its end."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return self.rows[place % len(self.rows)]


class Columns:
    """As ``datasets.Dataset``: columns within, rows as mappings outside."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns_ = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns_.values())))

    def __getitem__(self, place: int) -> dict[str, Any]:
        if not 0 <= place < len(self):
            raise IndexError(place)
        return {name: column[place] for name, column in self.columns_.items()}


KINDS: dict[str, Callable[[], Any]] = {
    "mappings": lambda: NAMED,
    "dataset of tuples": lambda: Rows(TUPLES),
    "dataset of mappings": lambda: Rows(NAMED),
    "columns": lambda: Columns(beginning=[b for b, _ in TUPLES], ending=[e for _, e in TUPLES], id=[7, 8, 9]),
    "iterator": lambda: iter(TUPLES),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_rows_trains_as_tuples_do(story: Story, kind: str) -> None:
    losses = []
    for data in (TUPLES, KINDS[kind]()):
        guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
        history = fit(story.program, guide, data, TrajectoryBalance(4), steps=3, batch_size=2, seed=0, progress=False)
        losses.append(history.loss)
    assert losses[0] == losses[1]


@pytest.mark.long
def test_all_that_takes_data_takes_mappings(story: Story) -> None:
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    pairs = [simulate(story.program, data, 5, seed=0, progress=False) for data in (TUPLES, NAMED)]
    assert pairs[0].args == pairs[1].args
    gaps = [
        gap_report(story.program, guide, data, held_out=data[:1], num_samples=16, steps=2, progress=False, seed=0)
        for data in (TUPLES[:2], NAMED[:2])
    ]
    assert repr(gaps[0]) == repr(gaps[1])
    found = [
        diagnose(story.program, guide, data, num_samples=22, simulations=2, progress=False) for data in (TUPLES, NAMED)
    ]
    assert found[0].verdict == found[1].verdict
    evaluated = []
    for data in (TUPLES, NAMED):
        history = fit(story.program, guide, TUPLES, TrajectoryBalance(2), steps=1, seed=0, progress=False,
                      learning_rate=0.0, evaluation=Evaluation(data, every=1, simulations=0))  # fmt: skip
        evaluated.append(history.evaluations[0].elbo)
    assert evaluated[0] == evaluated[1]


@pytest.mark.long
def test_numpyro_takes_them_too() -> None:
    import numpyro

    from llmppl.numpyro import fit
    from llmppl.numpyro.guides import AutoregressiveGuide
    from llmppl.numpyro.objectives import TrajectoryBalance
    from llmppl.numpyro.testing import tiny_lm

    lm = tiny_lm()

    def program(beginning: Any, ending: Any) -> None:
        middle = numpyro.sample("middle", lm(beginning, max_tokens=2, stop="."))
        numpyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    guide = AutoregressiveGuide(program, lm, rank=2, seed=0)
    history = fit(program, guide, NAMED, TrajectoryBalance(2), steps=1, progress=False)
    assert len(history.loss) == 1
    with pytest.raises(ValueError, match=r"data\[0\] has \['beginning'\], and not the program's argument 'ending'"):
        fit(program, guide, [{"beginning": "ab"}], TrajectoryBalance(2), steps=1, progress=False)


def test_defaults_stand_for_what_a_row_lacks() -> None:
    def program(beginning: str, ending: str = "cd", count: int = 3, *, other: int = 0) -> None:
        pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))

    rows = [{"beginning": "a"}, {"beginning": "b", "count": 5}, {"beginning": "c", "ending": "d", "other": 1}]
    assert checked(rows, program=program) == [("a",), ("b", "cd", 5), ("c", "d")]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.utils.data.DataLoader(Rows(TUPLES)), TypeError, "is a DataLoader, .* Pass its dataset"),
        ({"beginning": ["a"], "ending": ["b"]}, TypeError, "is a mapping of columns"),
        ("ab", TypeError, "is a string"),
        ([], ValueError, "data is empty"),
        (Rows([["ab", "cd"]]), TypeError, r"data\[0\] is a list"),
        ([{"beginning": "ab", "end": "cd"}], ValueError, r"data\[0\] has \['beginning', 'end'\], and not .* 'ending'"),
    ],
)
def test_what_are_no_rows_is_refused_with_the_mend(story: Story, data: Any, error: type, message: str) -> None:
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    with pytest.raises(error, match=message):
        fit(story.program, guide, data, TrajectoryBalance(2), steps=1, progress=False)


def test_integers_are_numbers_to_mapped_functions_in_batches_too(lm: LM) -> None:
    """int64 is text everywhere: a batch of integers is int32."""
    seen = set()

    def word(number: Any) -> str:
        seen.add((type(number), number))
        return "ab"[int(number) % 2]

    def program(number: Any, ending: Any) -> None:
        beginning = lm.map(word, number, max_tokens=1)
        middle = pyro.sample("middle", lm(beginning, max_tokens=2, stop="."))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    simulate(program, [(1, "c"), (2, "c"), (1, "d")], num_pairs=3, progress=False)
    assert {value for _, value in seen} == {1, 2}
    assert not any(isinstance(value, str) for _, value in seen)
    with pytest.raises(TypeError, match="argument 0 has integers of more than 31 bits"):
        simulate(program, [(1 << 40, "c"), (2, "c")], num_pairs=2, progress=False)
