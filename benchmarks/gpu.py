"""Scoring, sampling and a training step with Llamas of random weights, of 135M and 1B parameters: no download.

    python benchmarks/gpu.py [--device cuda] [--peak 989] [--models 135m 1b]

bfloat16 weights on a GPU, float32 on a CPU (with ``--small`` a few layers, to see that it runs). Prints
tokens a second and, with the chip's dense peak in TFLOP/s as ``--peak``, the share of it that the
matrix products of these tokens are. For each model the four operations of the training step that take longest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import pyro
import torch
from measure import machine, table
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from llmppl import LM
from llmppl.guides import AutoregressiveGuide
from llmppl.objectives import SubTrajectoryBalance
from llmppl.testing import tiny_lm

SHAPES = {
    "135m": (49_152, 576, 1536, 30, 9, 3),
    "1b": (128_256, 2048, 8192, 16, 32, 8),
    "small": (1024, 64, 128, 2, 4, 2),
}
"""Vocabulary, widths, layers, heads, heads of keys and values: of SmolLM2 135M, Llama 3.2 1B, and one to try."""


def random_llama(name: str, device: str, dtype: torch.dtype) -> LM:
    """A model of one of these shapes, with 27 tokens' names for a vocabulary that is larger."""
    vocabulary, hidden, inner, layers, heads, pairs = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    return LM(model, tiny_lm(27).tokenizer)


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--small", action="store_true")
    arguments.add_argument("--models", nargs="+", choices=list(SHAPES), default=["135m", "1b"])
    arguments.add_argument("--peak", type=float, default=None, help="TFLOP/s")
    arguments.add_argument("--particles", type=int, default=64)
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    if options.device == "cpu" and not options.small:
        print("skipped: no GPU here. Pass --small to see that the script runs on the CPU.")
        return
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    print(machine())
    for name in ["small"] if options.small else options.models:
        measured(random_llama(name, options.device, dtype), options)


def measured(lm: LM, options: argparse.Namespace) -> None:
    print(f"\n{lm}\n")
    prompt = torch.randint(0, 27, (60,), device=options.device)
    suffix = torch.randint(0, 27, (12,), device=options.device)
    count, length = options.particles, 16

    def story() -> None:
        text = pyro.sample("text", lm(prompt, max_tokens=length, stop="."))
        pyro.sample("suffix", lm(prompt, text), obs=suffix)

    guide = AutoregressiveGuide(story, lm, rank=16, seed=0)
    objective = SubTrajectoryBalance(count)
    read: list[int] = []
    lm.transformer.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    texts = torch.randint(1, 27, (count, 200), device=options.device)
    parts = {
        "scoring": lambda: lm(prompt).log_prob(texts),
        "sampling": lambda: lm(prompt, max_tokens=64).sample((count,)),
        "SubTB step": lambda: objective.loss_and_grads(story, guide),
    }
    weights = sum(p.numel() for n, p in lm.transformer.named_parameters() if "lora_" not in n)
    rows = []
    for name, run in parts.items():
        run()
        read.clear()
        run()
        tokens = sum(read)
        taken = seconds(run, options.device, options.repeats)
        flops = 2 * weights * tokens / taken / 1e12
        rows.append((name, tokens, taken, tokens / taken, flops, f"{flops / options.peak:.0%}" if options.peak else ""))
    print(table(("part", "tokens read", "s", "tokens/s", "TFLOP/s of one forward pass", "share of peak"), rows))
    activities = [ProfilerActivity.CUDA] if options.device == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        parts["SubTB step"]()
    own = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
    slowest = sorted(profiled.key_averages(), key=lambda event: -getattr(event, own))[:4]
    total = sum(getattr(event, own) for event in profiled.key_averages())
    print()
    rows = [(event.key[:60], f"{getattr(event, own) / total:.0%}", event.count) for event in slowest]
    rows = [(event.key[:60], f"{getattr(event, own) / total:.0%}", event.count) for event in slowest]
    print(table(("operation", "share of the step", "calls"), rows))


if __name__ == "__main__":
    main()
