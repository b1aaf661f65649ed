"""What a public signature declares is looked at first, in both twins: the argument is named, and what it must be."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpyro
import pyro
import pytest
import torch

import llmppl
import llmppl.numpyro as twin
from llmppl import guides, models, objectives
from llmppl.numpyro import guides as twin_guides
from llmppl.numpyro import objectives as twin_objectives
from llmppl.numpyro import testing as twin_testing
from llmppl.testing import tiny_lm
from llmppl.text.declared import declared

LM, TWIN = tiny_lm(), twin_testing.tiny_lm()
DATA = [("a", "b")]


def program(beginning: Any, ending: Any) -> None:
    middle = pyro.sample("middle", LM(beginning, max_tokens=2, stop="."))
    pyro.sample("ending", LM(beginning, middle), obs=LM.encode(ending))


def twin_program(beginning: Any, ending: Any) -> None:
    middle = numpyro.sample("middle", TWIN(beginning, max_tokens=2, stop="."))
    numpyro.sample("ending", TWIN(beginning, middle), obs=TWIN.encode(ending))


def posterior() -> llmppl.Posterior:
    return llmppl.importance(program, guides.PromptGuide(program, LM), 4, progress=False)("a", "b")


def both(name: str, **options: Any) -> list[Any]:
    """A call of ``fit``, ``importance`` or ``smc`` in each twin."""
    more = {"fit": (DATA, objectives.TrajectoryBalance(2), 1)}.get(name, ())
    twin_more = {"fit": (DATA, twin_objectives.TrajectoryBalance(2), 1)}.get(name, ())
    return [
        lambda: getattr(llmppl, name)(program, guides.PromptGuide(program, LM), *more, **options),
        lambda: getattr(twin, name)(twin_program, twin_guides.PromptGuide(twin_program, TWIN), *twin_more, **options),
    ]


CALLS: dict[str, tuple[list[Any], type[Exception], str]] = {
    "learning rate": (both("fit", learning_rate="x"), TypeError, "learning_rate must be a number, got 'x'"),
    "no rate": (both("fit", learning_rate=math.nan), ValueError, "learning_rate must be a number, got nan"),
    "below": (both("fit", weight_decay=-1.0), ValueError, "weight_decay must be at least 0, got -1.0"),
    "infinite": (both("fit", learning_rate=math.inf), ValueError, "learning_rate must be finite"),
    "seed": (both("fit", seed=-1), ValueError, r"seed must lie between 0 and 2\*\*32 - 1, got -1"),
    "seed of bytes": (both("fit", seed=b""), TypeError, "seed must be a whole number, got b''"),
    "schedule": (both("fit", schedule=["constant"]), TypeError, "schedule must be a string"),
    "callback": (both("fit", callback=3), TypeError, "callback must be a function, got 3"),
    "progress": (both("importance", progress="yes"), TypeError, "progress must be True or False, got 'yes'"),
    "huge": (both("smc", num_samples=10**12), ValueError, r"num_samples must be at most 2\*\*31 - 1"),
    "threshold": (both("smc", ess_threshold=[1]), TypeError, r"ess_threshold must be a number, got \[1\]"),
    "no data": (
        [
            lambda: llmppl.fit(program, program, 3, objectives.TrajectoryBalance(2), 1),
            lambda: twin.fit(twin_program, twin_program, 3, twin_objectives.TrajectoryBalance(2), 1),
            lambda: llmppl.Evaluation(data=3),
        ],
        TypeError,
        "data must be a list of the program's argument tuples, got 3",
    ),
    "rank": (
        [
            lambda: LM.adapt(rank=None),
            lambda: guides.AutoregressiveGuide(program, LM, rank="2"),
            lambda: twin_guides.AutoregressiveGuide(twin_program, TWIN, rank="2"),
        ],
        TypeError,
        "rank must be a whole number, got",
    ),
    "a class": (
        [
            lambda: llmppl.fit(
                program, program, DATA, objectives.TrajectoryBalance(2), 1, evaluation=DATA, progress=False
            )
        ],
        TypeError,
        "evaluation must be an Evaluation, got",
    ),
    "a grammar": ([lambda: LM("a", max_tokens=2, grammar="[ab]")], TypeError, "grammar must be a Grammar, got"),
    "particles": (
        [lambda: objectives.TrajectoryBalance("8"), lambda: twin_objectives.TrajectoryBalance("8")],
        TypeError,
        "num_particles must be a whole number, got '8'",
    ),
    "a range": (
        [lambda: llmppl.Behaviour(temperatures=(1.0,)), lambda: twin_objectives.Behaviour(temperatures=(1.0,))],
        ValueError,
        "temperatures must be 2 numbers",
    ),
    "fields": ([lambda: llmppl.Regularisation(input_noise="a")], TypeError, "input_noise must be a number, got 'a'"),
    "a model": ([lambda: llmppl.LM(3, LM.tokenizer)], TypeError, "model must be a causal language model"),
    "a posterior": (
        [lambda: llmppl.inference_gap(3), lambda: llmppl.ReplayBuffer().add(3)],
        TypeError,
        "posterior must be a Posterior, got 3",
    ),
    "a reference": (
        [lambda: llmppl.inference_gap(posterior(), 3)],
        TypeError,
        r"references\[0\] must be a Posterior, got 3",
    ),
    "resampled": ([lambda: posterior().resample(seed=0.5)], TypeError, "seed must be a whole number, got 0.5"),
    "no site": ([lambda: posterior().distinct_texts("x")], KeyError, r"no site 'x'.*\['middle'\]"),
    "examples": (
        [lambda: models.rationale(LM, ["a", "b"], examples=[("a", "b")])],
        TypeError,
        r"examples\[0\] must have three parts",
    ),
    "null": (
        [lambda: llmppl.SimulatedSet.load("a\0b"), lambda: guides.AutoregressiveGuide(program, LM, rank=1).save("\0")],
        ValueError,
        "must be a path, and .* holds a null character",
    ),
    "stop": ([lambda: LM("a", max_tokens=2, stop=0.5), lambda: TWIN("a", max_tokens=2, stop=0.5)], TypeError, "stop=0"),
    "allowed": ([lambda: LM("a", max_tokens=2, allowed={"a": 1})], TypeError, "allowed= must be a list of token ids"),
    "a name": (
        [lambda: llmppl.LM.from_pretrained("é"), lambda: twin.LM.from_pretrained("é")],
        ValueError,
        "name_or_folder='é' is no folder here, and no name of the hub",
    ),
    "pairs": (
        [lambda: llmppl.held_out_gain(program, guides.PromptGuide(program, LM), DATA)],
        TypeError,
        r"pairs\[0\] is .*no simulated pair",
    ),
    "rows": (
        [lambda: llmppl.SimulatedSet([("a", "b")], {"middle": torch.zeros(2, 1)}, {})],
        ValueError,
        r"latents\['middle'\] is shape \(2, 1\); it must be a tensor with a row for each of the 1 args",
    ),
    "described": ([lambda: models.described(3)], TypeError, "text must be a string, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_the_argument_is_named(case: str) -> None:
    calls, error, message = CALLS[case]
    for call in calls:
        with pytest.raises(error, match=message):
            call()


def test_arguments_that_a_program_does_not_take() -> None:
    inferences = [
        lambda: llmppl.importance(program, guides.PromptGuide(program, LM), 4)("a"),
        lambda: llmppl.exact_posterior(program)("a"),
        lambda: llmppl.simulate(program, [("a",)], 2, progress=False),
        lambda: twin.exact_posterior(twin_program)("a"),
    ]
    for call in inferences:
        with pytest.raises(TypeError, match=r"do not fit: (twin_)?program\(.* missing a required argument: 'ending'"):
            call()


def test_a_folder_where_a_file_belongs(tmp_path: Path) -> None:
    for guide in (
        guides.AutoregressiveGuide(program, LM, rank=1, seed=0),
        twin_guides.AutoregressiveGuide(twin_program, TWIN, rank=1, seed=0),
    ):
        with pytest.raises(IsADirectoryError, match="is a folder, and a file is to be written"):
            guide.save(tmp_path)


def test_what_a_signature_declares_is_what_it_takes() -> None:
    @declared
    def function(
        count: int, share: float = 0.5, names: Sequence[str] = (), flag: bool = False, width: int | None = None,  # noqa: F821
        path: str | os.PathLike[str] = "a", free: Anything = None, *rest: int, **more: int,  # noqa: F821
    ) -> Any:  # fmt: skip
        return count, share, names, flag, width, path, free, rest, more

    assert function(np.int64(3), 1, ["a"], np.bool_(True), 4, Path("b"), object, 1, 2, x="any")[0] == 3
    assert function(torch.tensor(3), torch.tensor(0.5), ("a",))[1] == 0.5
    assert function(1, math.inf)[1] == math.inf
    assert next(iter(inspect.signature(function).parameters)) == "count"
    for args in ((1.5,), (True,), (None,), (torch.zeros(2),), (torch.tensor(0.5),), (2**31,)):
        with pytest.raises((TypeError, ValueError), match="count must be"):
            function(*args)
    for share in ("0.5", None, True, math.nan, 1j, 10**400):
        with pytest.raises((TypeError, ValueError), match="share must be"):
            function(1, share)
    for names in ("ab", b"ab", [1], {"a": 1}, 3, np.array("a")):
        with pytest.raises(TypeError, match=r"names must be a list of strings"):
            function(1, names=names)
    with pytest.raises(TypeError, match="path must be a string, or a path, got b'a'"):
        function(1, path=b"a")
    with pytest.raises(TypeError, match=r"rest\[1\] must be a whole number, got 'x'"):
        function(1, 0.5, (), False, None, "a", None, 1, "x")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'count'"):
        function()
