"""What vLLM is asked for, with an engine that answers by what it was asked; vLLM itself is met in ``tests/vllm``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyro
import pytest
import torch
from conftest import Story
from safetensors.torch import load_file

from llmppl import LM, VLLM, Grammar, fit, importance
from llmppl.guides import AutoregressiveGuide
from llmppl.objectives import TrajectoryBalance

OFF = 0.5
"""What the stand-in adds to each token's log-probability: it is of another precision, much exaggerated."""


class Recorded:
    """``vllm.LLM`` as far as it is used: it reads the files that it is given, and draws by its parameters alone."""

    asked: list[Any] = []
    lora: list[Any] = []
    model: Any

    def __init__(self, model: str, **options: Any) -> None:
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)  # as vLLM does
        self.network = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.options = options
        self.known: dict[str, Any] = {}
        self.logits: dict[Any, torch.Tensor] = {}
        self.llm_engine = SimpleNamespace(remove_lora=lambda number: Recorded.lora.append(("removed", number)))

    def generate(self, prompts: Any, parameters: Any, use_tqdm: bool, lora_request: Any) -> list[Any]:
        assert not use_tqdm
        network = self.network if lora_request is None else self.adapted(lora_request.path)
        Recorded.asked += parameters
        return [self.one(network, row["prompt_token_ids"], own) for row, own in zip(prompts, parameters, strict=True)]

    def adapted(self, folder: str) -> Any:
        if folder not in self.known:
            self.known[folder] = self.read(folder)
        return self.known[folder]

    def read(self, folder: str) -> Any:
        from copy import deepcopy

        described = json.loads((Path(folder) / "adapter_config.json").read_text())
        tensors, network = load_file(Path(folder) / "adapter_model.safetensors"), deepcopy(self.network)
        assert described["r"] <= self.options["max_lora_rank"]
        for name, module in network.named_modules():
            key = f"base_model.model.{name}"
            if f"{key}.lora_A.weight" in tensors:
                assert name.rsplit(".", 1)[-1] in described["target_modules"]
                change = tensors.pop(f"{key}.lora_B.weight") @ tensors.pop(f"{key}.lora_A.weight")
                module.weight.data += described["lora_alpha"] / described["r"] * change
        assert not tensors
        return network

    @torch.no_grad()
    def one(self, network: Any, prompt: list[int], own: Any) -> Any:
        source, tokens, told = torch.Generator().manual_seed(own.seed), [], []
        while len(tokens) < own.max_tokens:
            read = (network, *prompt, *tokens)
            if read not in self.logits:
                self.logits[read] = network(torch.tensor([prompt + tokens])).logits[0, -1]
            logits = self.logits[read].clone()
            ids = getattr(own, "allowed_token_ids", None)
            if ids is not None:
                logits = torch.full_like(logits, -torch.inf).index_copy(0, torch.tensor(ids), logits[ids])
            stops = getattr(own, "stop_token_ids", [])
            if len(tokens) < getattr(own, "min_tokens", 0):
                logits[stops] = -torch.inf
            law = (logits / own.temperature).log_softmax(-1)
            token = int(torch.multinomial(law.exp(), 1, generator=source))
            tokens.append(token)
            told.append({token: SimpleNamespace(logprob=float(law[token]) + OFF)})
            if token in stops:
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=told)])


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    package, lora, distributed = ModuleType("vllm"), ModuleType("vllm.lora.request"), ModuleType("vllm.distributed")
    package.LLM, package.SamplingParams = Recorded, SimpleNamespace  # type: ignore[attr-defined]
    lora.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)  # type: ignore[attr-defined]
    distributed.cleanup_dist_env_and_memory = lambda: None  # type: ignore[attr-defined]
    for module in (package, lora, distributed):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    Recorded.asked, Recorded.lora = [], []
    return Recorded


LAWS: list[dict[str, Any]] = [
    {"max_tokens": 3, "stop": "."},
    {"max_tokens": 2, "stop": ".", "min_tokens": 2},
    {"max_tokens": 3, "stop": "ab"},
    {"max_tokens": 2, "allowed": [1, 2, 5], "temperature": 0.6},
]


def far(law: Any, count: int) -> float:
    """χ² of draws, by its degrees of freedom: about one where the law is right."""
    texts = law.enumerate_support()
    exact = law.log_prob(texts).detach().exp()
    drawn = law.sample((count,))
    same = (drawn[:, None] == texts[None]).all(-1)
    assert bool(same.any(-1).all())
    found = same.float().mean(0)
    return chi_squared(found, exact, count)


def chi_squared(found: torch.Tensor, exact: torch.Tensor, count: int) -> float:
    """By its degrees of freedom; texts that are expected fewer than ten times are one."""
    rare = count * exact < 10
    found, exact = (torch.cat([row[~rare], row[rare].sum()[None]]) for row in (found, exact))
    return float((count * (found - exact) ** 2 / exact.clamp(min=1e-9)).sum()) / (len(exact) - 1)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_what_is_asked_for_is_the_law(lm: LM, recorded: Any, law: dict[str, Any]) -> None:
    pyro.set_rng_seed(0)
    with VLLM(lm) as engine:
        assert far(lm("ab", **law), 1000) < 1.7
        assert engine.drawn == 1000
        value, log_prob = lm("ab", **law).sample_with_log_prob((4,))
    # The model's own, not what the engine says.
    assert torch.allclose(log_prob, lm("ab", **law).log_prob(value), atol=1e-9)
    assert engine.drift.mean == pytest.approx(float((OFF * (value >= 0).sum(-1)).mean()), rel=0.5)
    assert lm.engine is None


def test_guides_draw_there_and_their_adapters_follow_training(story: Story, recorded: Any) -> None:
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    with VLLM(story.lm, max_rank=2) as engine:
        fit(story.program, guide, [story.args], TrajectoryBalance(8), 3, learning_rate=0.05, seed=0, progress=False)
        law = pyro.poutine.trace(guide).get_trace(*story.args).nodes["middle"]["fn"]
        drawn, numbers = engine.drawn, [number for _, number in recorded.lora]
        assert drawn >= 24
        assert numbers == sorted(set(numbers))
        assert len(numbers) >= 2  # one for each step's weights, and the last is still there
        assert far(law, 1500) < 1.7
        posterior = importance(story.program, guide, num_samples=64, progress=False)(*story.args)
    assert float(posterior.ess) > 1
    assert engine.left == 0


def test_what_it_does_not_draw_the_model_does(lm: LM, recorded: Any) -> None:
    laws = [
        lm("ab", max_tokens=2, grammar=Grammar.regex("[a-c]b")),
        lm("ab", max_tokens=4, stop="ab", min_tokens=3),
        lm("ab", max_tokens=2, temperature=0.005),
    ]
    with VLLM(lm) as engine:
        for law in laws:
            law.sample((3,))
        assert engine.drawn == 0
        assert engine.left == 9
        lm("ab", max_tokens=2).sample((2,))
        assert engine.drawn == 2
        assert "2 texts drawn, 9 left" in repr(engine)


def test_seeds_repeat_and_generators_are_left_alone(lm: LM, recorded: Any) -> None:
    pyro.set_rng_seed(3)
    expected = torch.rand(2)
    pyro.set_rng_seed(3)
    with VLLM(lm):
        assert torch.equal(torch.rand(2), expected)
        drawn = []
        for _ in range(2):
            pyro.set_rng_seed(5)
            drawn.append(lm("ab", max_tokens=6).sample((4,)))
    assert torch.equal(*drawn)


def test_errors_name_what_to_do(lm: LM, recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="lm must be an LM, got str"):
        VLLM("smollm2-135m")
    for rank in (0, 1024):
        with pytest.raises(ValueError, match="max_rank"):
            VLLM(lm, max_rank=rank)
    with VLLM(lm) as engine:
        with pytest.raises(ValueError, match="draws for this model already"), VLLM(lm):
            pass
        assert lm.engine is engine
        with torch.no_grad():
            next(lm.transformer.parameters()).mul_(2)
        with pytest.raises(ValueError, match="weights have changed since VLLM was started|have changed since vLLM"):
            lm("ab", max_tokens=2).sample()
    with pytest.raises(RuntimeError, match="of the user"), VLLM(lm):
        raise RuntimeError("of the user")
    assert lm.engine is None

    def refuses(**options: Any) -> None:
        raise NotImplementedError("no such architecture")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", refuses)
    with pytest.raises(ValueError, match=r"vLLM does not start with this model \(llama\): no such"), VLLM(lm):
        pass
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-llmppl\[vllm\]'"), VLLM(lm):
        pass
    assert lm.engine is None
