"""What it costs that an architecture cannot be packed: SmolLM2 read packed, and row by row as if it were recurrent.

    python benchmarks/row_by_row.py

Scoring texts behind a shared prompt, and drawing them: packed; row by row with forked caches; row by row where no cache
can be forked and every token reads its row anew. Prints CPU seconds, medians, float32, one thread.
"""

from __future__ import annotations

import argparse

import torch
from measure import cpu_seconds, machine, table

from llmppl import LM
from llmppl.distributions import AutoregressiveText
from llmppl.network import transformer

SHAPES = [(60, 16, 20), (400, 8, 16)]  # prompt, particles, tokens
READINGS = {
    "packed": transformer.Reading(True, True),
    "forked rows": transformer.Reading(False, False, forks=True),
    "rows read anew": transformer.Reading(False, False),
}


def read_as(lm: LM, name: str) -> None:
    transformer._readings[lm.transformer] = READINGS[name]
    lm.drawn.clear()


@torch.no_grad()
def scored(lm: LM, name: str, prompt: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    read_as(lm, name)
    return lm(prompt, max_tokens=texts.shape[-1]).log_prob(texts)


@torch.no_grad()
def drawn(lm: LM, name: str, prompt: torch.Tensor, particles: int, tokens: int) -> torch.Tensor:
    read_as(lm, name)
    return AutoregressiveText(lm, prompt, lm("x", max_tokens=tokens).law).sample((particles,))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    lm = LM.from_pretrained("smollm2-135m")
    print(machine(), flush=True)
    rows = []
    for length, particles, tokens in SHAPES[: options.shapes]:
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(1000, 40000, (length,), generator=generator)
        texts = torch.randint(1000, 40000, (particles, tokens), generator=generator)
        for task, run, names in (
            ("score", lambda name, p=prompt, t=texts: scored(lm, name, p, t), ("packed", "rows read anew")),
            ("draw", lambda name, p=prompt, k=particles, n=tokens: drawn(lm, name, p, k, n), READINGS),
        ):
            contenders = {name: lambda r=run, n=name: r(n) for name in names}
            seconds = cpu_seconds(contenders, options.repeats)
            ratios = [seconds[name] / seconds["packed"] if name in seconds else float("nan") for name in READINGS]
            rows.append((f"{task} {length}/{particles}/{tokens}", seconds["packed"], *ratios[1:]))
            print(rows[-1], flush=True)
    header = ("prompt/particles/tokens", "packed, s", *(f"{name}, times" for name in list(READINGS)[1:]))
    print("\n" + table(header, rows))


if __name__ == "__main__":
    main()
