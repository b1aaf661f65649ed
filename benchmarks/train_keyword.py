"""Trains the keyword guide that the package ships: pairs simulated behind the shipped stories' beginnings and behind
beginnings that the language model writes itself.

    python benchmarks/train_keyword.py --pairs 3000 --steps 2000 --out llmppl/demo/adapters/keyword.safetensors

About 25 CPU minutes on one core, most of them for drawing. With ``--folder`` the pairs are kept, and read back the next
time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from llmppl import LM, held_out_gain, simulate
from llmppl.demo import keyword as demo
from llmppl.guides import WordGuide
from llmppl.models import keyword


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--held-out", type=int, default=240)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where the pairs are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = LM.from_pretrained("smollm2-135m")
    program = keyword(lm)
    guide = WordGuide(program, lm, seed=options.seed)
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


if __name__ == "__main__":
    main()
