"""Options for models that are large: activations that are made again, adapters in full precision, an estimate."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from conftest import Story
from torch import Tensor

from llmppl import LM, Regularisation, fit
from llmppl.guides import AutoregressiveGuide
from llmppl.network import scoring
from llmppl.objectives import SubTrajectoryBalance, TrajectoryBalance, WakeSleep
from llmppl.testing import tiny_lm
from llmppl.training import memory

OBJECTIVES: dict[str, Callable[[], Any]] = {
    "balance": lambda: TrajectoryBalance(8),
    "prefixes": lambda: SubTrajectoryBalance(8),
    "sleep": lambda: WakeSleep(8, insomnia=0.5),
}


def gradients(lm: LM, objective: Any, learned: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    own = lm.adapt(rank=2) if learned else lm

    def program(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", own(beginning, max_tokens=3, stop="."))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    guide = AutoregressiveGuide(program, lm, rank=2, seed=0)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    parameters += lm.adapters.parameters(own.adapter).values() if own.adapter else []
    with torch.no_grad():  # an adapter that does something
        torch.manual_seed(1)
        for parameter in parameters:
            parameter += 0.1 * torch.randn_like(parameter)
    pyro.set_rng_seed(2)
    objective.loss_and_grads(program, guide, "ab", "cd")
    return [p.grad.clone() for p in parameters if p.grad is not None]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("learned", [False, True])
def test_activations_that_are_made_again_give_the_same_gradients(
    name: str, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scoring.MAX_NODES, "cpu", 7)  # several chunks, each given keys and values of another
    found = []
    for checkpointing in (False, True):
        lm = tiny_lm(dtype=torch.float64)
        lm.gradient_checkpointing = checkpointing
        passes, run = [], lm.network._run
        monkeypatch.setattr(lm.network, "_run", lambda *a, run=run, passes=passes: (passes.append(1), run(*a))[1])
        found.append((gradients(lm, OBJECTIVES[name](), learned), len(passes)))
    (kept, once), (again, twice) = found
    assert len(kept) == len(again) > 0
    assert any(float(g.abs().max()) > 1e-3 for g in kept)
    for gradient, other in zip(kept, again, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-12, atol=1e-12)
    assert twice > once, "nothing was run again"


def test_a_regularised_run_is_the_same_with_activations_made_again(story: Story) -> None:
    losses = []
    for checkpointing in (False, True):
        story.lm.gradient_checkpointing = checkpointing
        guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
        history = fit(story.program, guide, [story.args], TrajectoryBalance(4), 4, seed=0, progress=False,
                      regularisation=Regularisation(adapter_dropout=0.3, input_noise=0.2))  # fmt: skip
        losses.append(history.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_copies_keep_the_option(lm: LM) -> None:
    assert not lm.gradient_checkpointing
    lm.gradient_checkpointing = True
    for twin in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm)), lm.adapt(rank=2)):
        assert twin.gradient_checkpointing
    lm.gradient_checkpointing = False
    assert not lm.gradient_checkpointing


def test_adapters_of_a_model_in_half_precision_learn_in_single(lm: LM) -> None:
    half = tiny_lm(dtype=torch.bfloat16)

    def program(beginning: str) -> None:
        pyro.sample("text", half(beginning, max_tokens=3, stop="."))

    guide = AutoregressiveGuide(program, half, rank=2, seed=0)
    trained = [p for p in guide.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    before = [p.detach().clone() for p in trained]
    # Steps that half precision would round away: 1e-5 beside weights of about 0.1.
    fit(program, guide, [("ab",)], TrajectoryBalance(4), 1, learning_rate=1e-5, warmup_steps=1, seed=0, progress=False)
    moved = torch.cat([(p.detach() - b).abs().flatten() for p, b in zip(trained, before, strict=True)])
    assert 0 < float(moved.max()) < 1e-4
    text = half("ab", max_tokens=3, stop=".")
    assert text.log_prob(text.sample()).dtype == torch.float32


def test_a_step_that_does_not_fit_is_said_before_it_is_tried(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)

    def trained(particles: int) -> None:
        fit(story.program, guide, [story.args], TrajectoryBalance(particles), 1, seed=0, progress=False)

    trained(4)  # it fits
    # Of 3 tokens each and a context of 2.
    assert memory.scored_tokens(story.program, story.args, 4) == 4 * 3 + 2
    free = memory.step_memory(story.lm, 4 * 3 + 2)
    monkeypatch.setattr(memory, "available_memory", lambda device: free)
    trained(4)
    with pytest.warns(UserWarning, match="a step scores up to 17 tokens .* set lm.gradient_checkpointing = True; or"):
        trained(5)
    config = story.lm.transformer.config
    each = config.num_hidden_layers * (6 * config.hidden_size + 3 * config.intermediate_size) * 8
    assert memory.step_memory(story.lm, 20) - memory.step_memory(story.lm, 10) == 10 * (each + 3 * 6 * 4)
    story.lm.gradient_checkpointing = True
    assert memory.step_memory(story.lm, 2000) == memory.step_memory(story.lm, 1000)
    assert re.match(r"\d", str(memory.available_memory(torch.device("cpu"))))
