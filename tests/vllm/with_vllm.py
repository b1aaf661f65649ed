"""vLLM itself, on a model that can be enumerated and on the packaged one: ``make test-vllm``.

The laws that it is asked for are tested where it is not installed, too, in ``tests/test_vllm_engine.py``; here it is
the engine that answers. Run as a script it prints what it costs and how far its log-probabilities are from the model's.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import pyro
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmppl import LM, VLLM, importance
from llmppl.guides import AutoregressiveGuide
from llmppl.testing import tiny_lm

DRAWS = 20_000


@pytest.fixture(scope="module")
def lm() -> LM:
    """Six tokens; vLLM's attention on CPUs wants heads of at least 32 dimensions."""
    small = tiny_lm(vocabulary=6, seed=0)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return LM(LlamaForCausalLM(config), small.tokenizer)


@pytest.fixture(scope="module")
def engine(lm: LM) -> Any:
    with VLLM(lm, max_rank=4) as engine:
        yield engine


LAWS: list[dict[str, Any]] = [
    {"max_tokens": 2},
    {"max_tokens": 3, "stop": "."},
    {"max_tokens": 3, "stop": ".", "min_tokens": 2},
    {"max_tokens": 3, "stop": "ab", "temperature": 1.7},
    {"max_tokens": 2, "allowed": [1, 2, 5], "temperature": 0.6},
]


def frequencies(law: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the texts of a law's support: how often each is drawn, and its probability."""
    texts = law.enumerate_support()
    drawn = law.sample((DRAWS,))
    same = (drawn[:, None] == texts[None]).all(-1)
    assert bool(same.any(-1).all())
    return same.float().mean(0), law.log_prob(texts).detach().exp()


def far(found: torch.Tensor, exact: torch.Tensor) -> float:
    """χ² by its degrees of freedom: about one where the law is right."""
    rare = DRAWS * exact < 10  # such texts are one
    found, exact = (torch.cat([row[~rare], row[rare].sum()[None]]) for row in (found, exact))
    return float((DRAWS * (found - exact) ** 2 / exact.clamp(min=1e-9)).sum()) / (len(exact) - 1)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_what_is_drawn_has_the_law_of_the_model(lm: LM, engine: VLLM, law: dict[str, Any]) -> None:
    pyro.set_rng_seed(0)
    before = engine.drawn
    found, exact = frequencies(lm("ab", **law))
    assert engine.drawn - before == DRAWS
    assert far(found, exact) < 1.6
    assert engine.drift.largest < 1e-4


def test_an_adapter_is_handed_over_and_again_when_it_has_changed(lm: LM, engine: VLLM) -> None:
    def program() -> None:
        pyro.sample("text", lm("ab", max_tokens=2))

    guide = AutoregressiveGuide(program, lm, prompt={"text": lambda: ["ab"]}, rank=4, seed=0)
    (name,) = lm.adapters.names
    law = pyro.poutine.trace(guide).get_trace().nodes["text"]["fn"]
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in lm.adapters.parameters(name).values():
                parameter.add_(0.3 * torch.randn_like(parameter))
        pyro.set_rng_seed(seed)
        found, exact = frequencies(law)
        assert far(found, exact) < 1.6
        prior = lm("ab", max_tokens=2)
        assert far(exact, prior.log_prob(prior.enumerate_support()).exp()) > 50  # the adapter says something else
    assert engine.drift.largest < 1e-4


def test_a_seed_repeats_what_is_drawn_and_nothing_else_is_disturbed(lm: LM, engine: VLLM) -> None:
    texts = []
    for _ in range(2):
        pyro.set_rng_seed(7)
        texts.append((lm("ab", max_tokens=8).sample((5,)), torch.rand(3)))
    assert torch.equal(texts[0][0], texts[1][0])
    assert torch.equal(texts[0][1], texts[1][1])
    assert len(texts[0][0].unique(dim=0)) > 1


def test_evidence_agrees_with_enumeration(lm: LM, engine: VLLM) -> None:
    def program(ending: str) -> None:
        middle = pyro.sample("middle", lm("ab", max_tokens=2))
        pyro.sample("ending", lm("ab", middle), obs=lm.encode(ending))

    law = lm("ab", max_tokens=2)
    texts = law.enumerate_support()
    exact = (law.log_prob(texts) + lm("ab", texts).log_prob(lm.encode("cd"))).logsumexp(0)

    def guide(ending: str) -> None:
        pyro.sample("middle", lm("ab", max_tokens=2))

    posterior = importance(program, guide, num_samples=4000, progress=False)("cd")
    assert abs(float(posterior.log_evidence) - float(exact)) < 0.1


def measure(count: int, tokens: int) -> None:
    torch.set_num_threads(1)
    lm = LM.from_pretrained("smollm2-135m")
    stories = ["Anna was thirsty.", "Two dogs ran into the garden at night.", "The old king had no children."]

    def timed(work: Any) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def draw() -> None:
        for story in stories:
            lm(story, max_tokens=tokens).sample((count,))

    draw()
    own = [timed(draw) for _ in range(3)]
    for dtype in (torch.float32, torch.bfloat16):
        with VLLM(lm, dtype=dtype) as engine:
            draw()
            theirs = [timed(draw) for _ in range(3)]
            alone = [timed(lambda: [engine.draw(lm(s, max_tokens=tokens).law, [lm.encode(s).tolist()] * count, None)
                                    for s in stories]) for _ in range(3)]  # fmt: skip
            print(
                f"{dtype}: {3 * count} texts of {tokens} tokens: own {min(own):.1f} s, vLLM {min(theirs):.1f} s, "
                f"of which drawing {min(alone):.1f}; {engine.drift!r}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64, help="texts of each of three prompts")
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    measure(options.count, options.tokens)
