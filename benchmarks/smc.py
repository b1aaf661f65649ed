"""The variance of log Ẑ at equal token cost: the prior as proposal against a trained guide, on held-out stories.

    python benchmarks/smc.py
    python benchmarks/smc.py --stories 4 --repeats 20 --particles 32

Every method estimates the evidence of the same held-out stories with the shipped adapter or without it. Its
cost is counted in tokens that went through the transformer, prompts and scoring included; the number of particles of
each method is set so that its tokens are those of importance sampling from the prior with ``--particles``
particles. A lower bound in expectation is better the higher it is, so the mean is printed as well. One thread.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import torch
from measure import machine, table

from llmppl import LM, importance, smc
from llmppl.demo import infilling as demo
from llmppl.models import infilling

Run = Callable[[int], Any]


@contextlib.contextmanager
def counted(lm: LM) -> Iterator[list[int]]:
    """Counts the tokens that go through the transformer, in a list of one number."""
    total = [0]

    def count(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        total[0] += 0 if ids is None else ids.numel()

    handle = lm.transformer.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield total
    finally:
        handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--particles", type=int, default=24)
    parser.add_argument("--methods", nargs="*", help="names of rows; all by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = LM.from_pretrained("smollm2-135m")
    story = infilling(lm)
    guide = demo.make_guide(story, lm)
    guide.load(demo.shipped_adapter())
    prior = demo.prior_guide(story, lm)
    held = demo.split(demo.stories(), options.stories)[1]
    print(machine())
    methods: dict[str, Run] = {
        "prior, importance": lambda k: importance(story, prior, k, progress=False),
        "prior, smc flows": lambda k: smc(story, None, k, "flows", progress=False),
        "guide, importance": lambda k: importance(story, guide, k, progress=False),
        "guide, smc prefixes": lambda k: smc(story, guide, k, "prefixes", progress=False),
        "guide, smc flows": lambda k: smc(story, guide, k, "flows", progress=False),
        "guide, smc flows, every token": lambda k: smc(story, guide, k, "flows", check_every=1, progress=False),
        "guide, smc flows, optimal": lambda k: smc(
            story, guide, k, "flows", resampling="optimal", check_every=4, progress=False
        ),
    }
    chosen = {name: make for name, make in methods.items() if not options.methods or name in options.methods}
    budget = None
    rows = []
    for name, make in chosen.items():
        with counted(lm) as tokens:
            for args in held:
                make(options.particles)(*args)
        cost = tokens[0] / len(held)
        budget = budget or cost
        particles = max(round(options.particles * budget / cost), 2)
        estimates = np.empty((options.repeats, len(held)))
        start = time.process_time()
        with counted(lm) as tokens:
            for n in range(options.repeats):
                for m, args in enumerate(held):
                    pyro.set_rng_seed(1000 * n + m)
                    estimates[n, m] = float(make(particles)(*args).log_evidence)
        seconds = (time.process_time() - start) / estimates.size
        rows.append([name, particles, round(tokens[0] / estimates.size), f"{seconds:.1f}", estimates])
    first = rows[0][-1].var(0, ddof=1).mean()
    shown = []
    for name, particles, spent, seconds, estimates in rows:
        variance = estimates.var(0, ddof=1).mean()
        shown.append(
            [name, particles, spent, seconds, f"{estimates.mean():.2f}", f"{variance:.3f}", f"{first / variance:.1f} x"]
        )
        print(name, "by story:", np.round(estimates.mean(0), 2), "±", np.round(estimates.std(0, ddof=1), 2))
    print(f"\n{len(held)} held-out stories, {options.repeats} runs each, nats\n")
    print(table(["proposal", "particles", "tokens", "CPU s", "mean log Ẑ", "variance", "lower than the first"], shown))


if __name__ == "__main__":
    main()
