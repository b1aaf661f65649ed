"""Trains the keyword guide that the package ships: pairs simulated behind the shipped stories' beginnings and behind
beginnings that the language model writes itself.

    python benchmarks/train_keyword.py --pairs 3000 --steps 2000 --out llmppl/demo/adapters/keyword.safetensors

About 25 CPU minutes on one core, most of them for drawing. With ``--folder`` the pairs are kept, and read back the next
time.

    python benchmarks/train_keyword.py --minutes 2 5 15 60 --out guides

trains one guide on fresh pairs behind fresh beginnings instead, none of which is read twice, and saves it after each of
so many CPU minutes of one thread, drawing included: ``guides/2.safetensors`` and so on.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmppl import LM, fit, held_out_gain, simulate
from llmppl.demo import keyword as demo
from llmppl.guides import WordGuide
from llmppl.models import keyword
from llmppl.objectives import WakeSleep
from llmppl.training.history import History


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--held-out", type=int, default=240)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where the pairs are kept")
    parser.add_argument("--minutes", type=float, nargs="+", help="save after so many CPU minutes on fresh pairs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = LM.from_pretrained("smollm2-135m")
    program = keyword(lm)
    guide = WordGuide(program, lm, seed=options.seed)
    if options.minutes:
        by_minutes(lm, program, guide, sorted(options.minutes), options.held_out, options.out, options.seed)
        return
    start = time.process_time()
    texts = demo.beginnings() + demo.new_beginnings(lm, options.pairs // 4, options.seed)
    sets = {}
    for name, some, count in (
        ("training", texts, options.pairs),
        ("held out", demo.beginnings(held_out=True), options.held_out),
    ):
        folder = None if options.folder is None else options.folder / name.replace(" ", "_")
        data = [(text, demo.SOME_WORD) for text in some]
        sets[name] = simulate(program, data, count, seed=options.seed + len(sets), folder=folder)
    print(sets["training"], f"{time.process_time() - start:.0f} CPU s", flush=True)
    history = demo.train(program, guide, sets["training"], sets["held out"], options.steps, options.seed)
    print(history)
    for item in history.evaluations:
        print(f"step {item.step}: held-out gain {item.gain:.3f} ± {item.gain_error:.3f} nats, {item.seconds:.0f} s")
    print(held_out_gain(program, guide, sets["held out"]), f"{time.process_time() - start:.0f} CPU s in all")
    guide.save(options.out)
    print(f"saved to {options.out}")


class _TimeIsUp(Exception):
    """All budgets are spent."""


def by_minutes(
    lm: LM, program: Any, guide: WordGuide, minutes: list[float], held_out: int, folder: Path, seed: int
) -> None:
    """One training on fresh pairs, and what the guide is worth after each of so many CPU minutes."""
    data = [(text, demo.SOME_WORD) for text in demo.beginnings(held_out=True)]
    pairs = simulate(program, data, held_out, seed=seed + 1, progress=False)
    stream = simulate(program, fresh_beginnings(lm), seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    left = list(minutes)
    measuring, start = 0.0, time.process_time()

    def saved(step: int, history: History) -> None:
        nonlocal measuring
        now = time.process_time()
        if now - start - measuring < 60 * left[0]:
            return
        budget = left.pop(0)
        guide.save(folder / f"{budget:g}.safetensors")
        print(f"{budget:g} CPU minutes, step {step}, {stream.drawn} pairs: {held_out_gain(program, guide, pairs)}",
              flush=True)  # fmt: skip
        measuring += time.process_time() - now
        if not left:
            raise _TimeIsUp

    with contextlib.suppress(_TimeIsUp):
        fit(
            program,
            guide,
            stream,
            WakeSleep(1, insomnia=0.0, exhaust=["keyword"]),
            steps=10**6,
            batch_size=16,
            vectorize_data=True,
            learning_rate=3e-3,
            seed=seed,
            callback=saved,
        )


def fresh_beginnings(lm: LM, sentences: int = 4) -> Callable[[int], list[tuple[str, str]]]:
    """Arguments without end: every other beginning is a story's, every other the model writes itself.

    :param sentences: behind each beginning.
    """
    stories = demo.beginnings()

    def some(count: int) -> list[tuple[str, str]]:
        number = int(torch.randint(2**31, ()))
        wanted = -(-count // sentences)
        written = demo.new_beginnings(lm, wanted // 2, number) if wanted > 1 else []
        texts = written + [stories[n] for n in torch.randperm(len(stories))[: wanted - len(written)].tolist()]
        return [(text, demo.SOME_WORD) for text in texts for _ in range(sentences)][:count]

    return some


if __name__ == "__main__":
    main()
