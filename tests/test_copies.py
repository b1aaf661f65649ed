"""Copies of guides, models and distributions are independent: their own weights, and nobody else's."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from conftest import Story
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from llmppl import LM, Grammar, MaskedLM, fit, importance
from llmppl.guides import (
    AutoregressiveGuide,
    DirectGuide,
    GFlowNetGuide,
    PromptGuide,
    RefinementGuide,
    SemiAmortizedGuide,
    SoftPromptGuide,
    TextGuide,
)
from llmppl.objectives import LeaveOneOutELBO, WakeSleep
from llmppl.testing import tiny_lm

GUIDES: dict[str, Callable[..., TextGuide]] = {
    "autoregressive": lambda program, lm: AutoregressiveGuide(program, lm, rank=2, seed=0),
    "gflownet": lambda program, lm: GFlowNetGuide(program, lm, rank=2, seed=0),
    "soft prompt": lambda program, lm: SoftPromptGuide(program, lm, num_virtual_tokens=2, seed=0),
    "refinement": lambda program, lm: RefinementGuide(program, lm, max_tokens=3, rank=2, seed=0),
    "direct": lambda program, lm: DirectGuide(program, lm, max_tokens=3, rank=2, seed=0),
    "semi-amortized": lambda program, lm: SemiAmortizedGuide(program, lm, max_tokens=3, rank=2, refinements=1, seed=0),
    "from scratch": lambda program, lm: RefinementGuide(
        program, lm, network=MaskedLM.from_scratch(lm, max_tokens=3, width=8, layers=1, heads=2, seed=0)
    ),
}

MODULE = """
import pyro
from llmppl.testing import tiny_lm

lm = tiny_lm()


def story(beginning, ending):
    middle = pyro.sample("middle", lm(beginning, max_tokens=3, stop="."))
    pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))


def ending_first(beginning, ending):
    return [ending, beginning]
"""


def scores(guide: TextGuide, seed: int = 3) -> Tensor:
    """log q of texts that the prior draws, the same for every guide of a language model."""
    texts = guide.lm("ab", max_tokens=3, stop=".").enumerate_support()[::17]
    rows = []
    for text in texts:
        pyro.set_rng_seed(seed)  # a semi-amortized guide draws
        with torch.no_grad(), poutine.condition(data={"middle": text}):
            trace = poutine.trace(poutine.condition(guide, data={"middle": text})).get_trace("ab", "cd")
        rows.append(trace.log_prob_sum())
    return torch.stack(rows).detach()


def trained(program: Any, lm: LM, kind: str) -> TextGuide:
    """A guide that Pyro has registered and trained a little."""
    guide = GUIDES[kind](program, lm)
    fit(program, guide, [("ab", "cd")], LeaveOneOutELBO(4), steps=3, learning_rate=0.05, warmup_steps=0, progress=False)
    return guide


def shifted(guide: TextGuide) -> None:
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.ones_like(parameter))


@pytest.mark.long
@pytest.mark.parametrize("kind", GUIDES)
def test_a_deep_copy_is_a_snapshot_on_the_same_model(story: Story, kind: str) -> None:
    guide = trained(story.program, story.lm, kind)
    before = scores(guide)
    twin = copy.deepcopy(guide)
    assert twin.lm is guide.lm
    assert twin.model is guide.model
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in guide.parameters()}
    torch.testing.assert_close(scores(twin), before)
    shifted(twin)
    assert (scores(twin) - before).abs().max() > 1e-2, "the copy's weights are its own law"
    torch.testing.assert_close(scores(guide), before, msg="the original stays what it was")


@pytest.mark.long
@pytest.mark.parametrize("kind", GUIDES)
def test_a_copy_trains_alone(story: Story, kind: str) -> None:
    guide = trained(story.program, story.lm, kind)
    twin = copy.deepcopy(guide)
    before = scores(guide)
    options: dict[str, Any] = {"steps": 3, "learning_rate": 0.05, "warmup_steps": 0, "progress": False}
    fit(story.program, twin, [("ab", "cd")], LeaveOneOutELBO(4), **options)
    assert (scores(twin) - before).abs().max() > 1e-3
    torch.testing.assert_close(scores(guide), before)
    fit(story.program, guide, [("ab", "cd")], LeaveOneOutELBO(4), **options)
    assert (scores(guide) - before).abs().max() > 1e-3, "and the original can be trained on"


def test_training_goes_on_as_if_no_copy_had_been_made(story: Story) -> None:
    results = []
    for copying in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        lm = tiny_lm(dtype=torch.float64)

        def program(beginning: str, ending: str, lm: LM = lm) -> None:
            middle = pyro.sample("middle", lm(beginning, max_tokens=3, stop="."))
            pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

        guide = AutoregressiveGuide(program, lm, rank=2, seed=0)

        def snapshot(step: int, history: Any, guide: TextGuide = guide, copying: bool = copying) -> None:
            if copying:
                copy.deepcopy(guide)

        fit(program, guide, [("ab", "cd")], LeaveOneOutELBO(4), steps=4, seed=1, callback=snapshot, progress=False)
        results.append(scores(guide))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("kind", GUIDES)
def test_a_pickle_is_an_independent_guide_of_the_programs_own_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storybook = imported(tmp_path, monkeypatch)
    guide = trained(storybook.story, storybook.lm, kind)
    expected = scores(guide)
    again = pickle.loads(pickle.dumps(guide))
    assert again.lm is storybook.lm
    torch.testing.assert_close(scores(again), expected)
    shifted(again)
    assert (scores(again) - expected).abs().max() > 1e-2
    torch.testing.assert_close(scores(guide), expected)


@pytest.mark.long
def test_a_pickle_is_the_guide_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storybook = imported(tmp_path, monkeypatch)
    guides = [trained(storybook.story, storybook.lm, kind) for kind in ("autoregressive", "from scratch")]
    (tmp_path / "guides.pickle").write_bytes(pickle.dumps([(guide, scores(guide)) for guide in guides]))
    code = (
        "import pickle, sys, torch; torch.set_num_threads(1)\n"
        f"sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parent)!r}]\n"
        "import storybook\n"
        "from test_copies import scores, shifted\n"
        "from llmppl import importance\n"
        "from llmppl.guides import AutoregressiveGuide\n"
        f"for guide, expected in pickle.load(open({str(tmp_path / 'guides.pickle')!r}, 'rb')):\n"
        "    assert guide.lm is storybook.lm\n"
        "    torch.testing.assert_close(scores(guide), expected)\n"
        "    importance(storybook.story, guide, 4)('ab', 'cd')\n"
        "    AutoregressiveGuide(storybook.story, storybook.lm)\n"
        "    shifted(guide)\n"
        "    assert (scores(guide) - expected).abs().max() > 1e-2\n"
        "print('done')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "done", result.stderr


def imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A program that can be imported."""
    (folder / "storybook.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "storybook", raising=False)
    return importlib.import_module("storybook")


class Program:
    """A program that holds its language model, as a class of the user's might."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm

    def __call__(self, beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", self.lm(beginning, max_tokens=3, stop="."))
        pyro.sample("ending", self.lm(beginning, middle), obs=self.lm.encode(ending))


def test_guides_that_are_pickled_together_share_their_model(lm: LM) -> None:
    program = Program(lm)
    guides = [trained(program, lm, kind) for kind in ("autoregressive", "soft prompt")]
    again = pickle.loads(pickle.dumps(guides))
    assert again[0].lm is again[1].lm is again[0].model.lm
    assert again[0].lm is not lm
    for one, other in zip(guides, again, strict=True):
        torch.testing.assert_close(scores(other), scores(one))


def test_what_cannot_be_imported_is_said_so(story: Story) -> None:
    with pytest.raises(pickle.PicklingError, match="define them at the top of a module"):
        pickle.dumps(PromptGuide(Program(story.lm), story.lm, prompt={"middle": lambda beginning: [beginning]}))


def test_a_model_and_its_distributions_are_copied_after_training(story: Story) -> None:
    guide = trained(story.program, story.lm, "autoregressive")
    lm = story.lm
    texts = lm("ab", max_tokens=3, stop=".").enumerate_support()[:20]
    expected = lm("ab", max_tokens=3, stop=".").log_prob(texts)
    adapted = scores(guide)
    for again in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        assert again.transformer is not lm.transformer
        torch.testing.assert_close(again("ab", max_tokens=3, stop=".").log_prob(texts), expected)
        assert again.adapters.names == lm.adapters.names
        with torch.no_grad():
            for parameter in again.transformer.parameters():
                parameter.add_(0.1)
    torch.testing.assert_close(lm("ab", max_tokens=3, stop=".").log_prob(texts), expected)
    torch.testing.assert_close(scores(guide), adapted)
    grammar = Grammar.regex("(ab|c)a*")
    for law in ({"stop": "."}, {"grammar": grammar}):
        fn = lm("ab", max_tokens=3, **law)
        fn.sample()
        for again, same in ((copy.deepcopy(fn), True), (pickle.loads(pickle.dumps(fn)), False)):
            assert (again.lm is lm) is same
            support = fn.enumerate_support()[:9]
            torch.testing.assert_close(again.log_prob(support), fn.log_prob(support))
    # Scored with a graph, which no copy has.
    proposal = poutine.trace(guide).get_trace("ab", "cd").nodes["middle"]["fn"]
    proposal.log_prob(texts)
    torch.testing.assert_close(copy.deepcopy(proposal).log_prob(texts), proposal.log_prob(texts))
    assert copy.deepcopy(proposal).log_prob(texts).requires_grad


def test_a_guide_follows_the_copy_of_its_model(lm: LM) -> None:
    program = Program(lm)
    guide = trained(program, lm, "autoregressive")
    expected = scores(guide)
    other, twin = copy.deepcopy((lm, guide))
    assert twin.lm is other
    assert twin.adapter == guide.adapter
    torch.testing.assert_close(scores(twin), expected)
    shifted(twin)
    torch.testing.assert_close(scores(guide), expected)


def test_guides_of_other_sites_and_sampling_in_low_precision_are_copied(lm: LM) -> None:
    def program(ending: str) -> None:
        shift = pyro.sample("shift", pyro.distributions.Normal(0.0, 1.0))
        middle = pyro.sample("middle", lm("ab", max_tokens=3, stop="."))
        pyro.sample("ending", lm("ab", middle), obs=lm.encode(ending))
        pyro.factor("near", -((shift - 0.5) ** 2))

    others = AutoNormal(poutine.block(program, expose=["shift"]))
    guide = AutoregressiveGuide(program, lm, others=others, rank=2, sampling_dtype=torch.float32)
    fit(program, guide, [("cd",)], LeaveOneOutELBO(4), steps=2, progress=False)
    twin = copy.deepcopy(guide)
    assert twin.others is not others
    posterior = importance(program, twin, 8)("cd")
    assert posterior.log_weights.shape == (8,)
    fit(program, twin, [("cd",)], WakeSleep(4, insomnia=1.0), steps=2, learning_rate=0.1, progress=False)
    for (name, mine), its in zip(guide.others.named_parameters(), twin.others.parameters(), strict=True):
        assert mine is not its, name
        assert mine.item() != its.item(), name
