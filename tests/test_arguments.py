"""Arguments that cannot be what they are called, in both twins: a named error with its mend."""

from __future__ import annotations

from typing import Any

import numpyro
import pyro
import pytest
from jax import random

import llmppl
import llmppl.numpyro as twin
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.numpyro import guides as twin_guides
from llmppl.numpyro import testing as twin_testing
from llmppl.objectives import TrajectoryBalance
from llmppl.testing import tiny_lm

LM, TWIN = tiny_lm(), twin_testing.tiny_lm()
DATA = [("b",)]


def program(ending: Any) -> None:
    middle = pyro.sample("middle", LM("a", max_tokens=2))
    pyro.sample("ending", LM(middle), obs=LM.encode(ending))


def twin_program(ending: Any) -> None:
    middle = numpyro.sample("middle", TWIN("a", max_tokens=2))
    numpyro.sample("ending", TWIN(middle), obs=TWIN.encode(ending))


GUIDE = PromptGuide(program, LM)
CALLS: dict[str, Any] = {
    "importance": lambda p, g: llmppl.importance(p, g, 4),
    "bounds": lambda p, g: llmppl.bounds(p, g, 4),
    "smc": lambda p, g: llmppl.smc(p, g, 4),
    "mcmc": lambda p, g: llmppl.mcmc(p, g),
    "decode": lambda p, g: llmppl.decode(p, g),
    "diagnose": lambda p, g: llmppl.diagnose(p, g, DATA),
    "calibrate": lambda p, g: llmppl.calibrate(p, g, DATA),
    "gap_report": lambda p, g: llmppl.gap_report(p, g, DATA),
    "fit": lambda p, g: llmppl.fit(p, g, DATA, TrajectoryBalance(2), 1, progress=False),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrong", [3, "x"])
def test_programs_and_guides_that_cannot_be_called(call: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a function, a module or a guide, got .*not what it returns"):
        CALLS[call](wrong, GUIDE)
    with pytest.raises(TypeError, match="guide must be a function, a module or a guide"):
        CALLS[call](program, wrong)


def test_programs_that_have_no_guide() -> None:
    for call in (lambda: llmppl.exact_posterior(3), lambda: llmppl.predict(3, "a"), lambda: PromptGuide(3, LM),
                 lambda: twin.exact_posterior(3), lambda: twin_guides.PromptGuide(3, TWIN)):  # fmt: skip
        with pytest.raises(TypeError, match="model must be a function, a module or a guide, got 3"):
            call()
    with pytest.raises(TypeError, match="program must be a function, a module or a guide, got 3"):
        llmppl.simulate(3, DATA, 2)


def test_numpyro_programs_and_guides_that_cannot_be_called() -> None:
    guide = twin_guides.PromptGuide(twin_program, TWIN)
    for name in ("importance", "bounds", "smc"):
        function = getattr(twin, name)
        with pytest.raises(TypeError, match="model must be a function, a module or a guide, got 3"):
            function(3, guide, 4)
        with pytest.raises(TypeError, match="guide must be a function, a module or a guide, got 'x'"):
            function(twin_program, "x", 4)
    with pytest.raises(TypeError, match="num_samples must be a whole number, got '4'"):
        twin.importance(twin_program, guide, "4")(random.key(0), "b")


@pytest.mark.parametrize(("number", "error"), [("4", TypeError), (2.5, TypeError), (True, TypeError), (0, ValueError)])
def test_numbers_that_count_nothing(number: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"num_samples must be .*, got {number!r}"):
        llmppl.importance(program, GUIDE, number)
    with pytest.raises(error, match=rf"steps must be .*, got {number!r}"):
        llmppl.fit(program, GUIDE, DATA, TrajectoryBalance(2), number, progress=False)
    with pytest.raises(error, match=rf"num_pairs must be .*, got {number!r}"):
        llmppl.simulate(program, DATA, number)


def test_layers_that_are_none() -> None:
    for make in (
        lambda names: AutoregressiveGuide(program, LM, target_modules=names),
        lambda names: twin_guides.AutoregressiveGuide(twin_program, TWIN, target_modules=names),
    ):
        for wrong in (1, "é", "q_proj", [1]):
            with pytest.raises(TypeError, match=r"target_modules.*name endings of layers, such as"):
                make(wrong)
        with pytest.raises(ValueError, match=r"target_modules names 'é', which is the end of no .*q_proj"):
            make(["é"])


def test_schemas_and_names_that_are_none() -> None:
    with pytest.raises(TypeError, match=r"schema=\{1\} is no JSON.*Give a dict"):
        llmppl.Grammar.json_schema({1})  # type: ignore[arg-type]
    for wrong in (b"ab", 3, None):
        for kind in (llmppl.LM, twin.LM):
            with pytest.raises(TypeError, match="name_or_folder must be a model's name or a folder's path, got"):
                kind.from_pretrained(wrong)  # type: ignore[attr-defined]
