"""(b) The joint of a program with several text sites against one forward pass over the same text.

    python benchmarks/program_joint.py

A beginning and 2, 3 or 5 observed texts, each conditioned on all before it; alone, and for a batch whose
rows share nothing. The forward pass reads the concatenation once and takes the log-probabilities of all
its tokens; the program adds tracing, packing and the laws of its sites. Prints CPU seconds, medians of
one run, one thread, float32.
"""

from __future__ import annotations

import argparse

import pyro
import torch
from measure import cpu_seconds, machine, table
from pyro import poutine

from llmppl import LM
from llmppl.programs.particles import compute_log_prob

BEGINNING, TEXT = 20, 20  # tokens


def program(lm: LM, beginning: torch.Tensor, texts: list[torch.Tensor]) -> None:
    for n, text in enumerate(texts):
        pyro.sample(f"text_{n}", lm(beginning, *texts[:n]), obs=text)


@torch.no_grad()
def joint(lm: LM, beginning: torch.Tensor, texts: list[torch.Tensor]) -> torch.Tensor:
    batch = beginning.shape[:-1]

    def in_plate() -> None:
        if batch:
            with pyro.plate("rows", batch[0]):
                program(lm, beginning, texts)
        else:
            program(lm, beginning, texts)

    trace = poutine.trace(in_plate).get_trace()
    compute_log_prob(trace)
    return sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample" and site["is_observed"])


@torch.no_grad()
def forward(lm: LM, beginning: torch.Tensor, texts: list[torch.Tensor]) -> torch.Tensor:
    ids = torch.cat([beginning, *texts], -1)
    ids = ids if ids.dim() > 1 else ids[None]
    logits = lm.transformer(input_ids=ids[:, :-1], use_cache=False).logits
    scores = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return scores[:, beginning.shape[-1] - 1 :].sum(-1)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=7)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    lm = LM.from_pretrained("smollm2-135m")
    print(machine(), flush=True)
    rows = []
    for sites in (2, 3, 5):
        for batch in ((), (4,)):
            generator = torch.Generator().manual_seed(0)
            beginning = torch.randint(1000, 40000, (*batch, BEGINNING), generator=generator)
            texts = [torch.randint(1000, 40000, (*batch, TEXT), generator=generator) for _ in range(sites)]
            given = (lm, beginning, texts)
            error = float((joint(*given) - forward(*given)).abs().max())
            contenders = {"forward": lambda g=given: forward(*g), "joint": lambda g=given: joint(*g)}
            seconds = cpu_seconds(contenders, options.repeats)
            ratio = seconds["joint"] / seconds["forward"]
            rows.append((sites, batch[0] if batch else 1, seconds["forward"], seconds["joint"], ratio, error))
            print(rows[-1], flush=True)
    header = ("text sites", "rows", "s one forward", "s program", "ratio", "largest difference, nats")
    print("\n" + table(header, rows))


if __name__ == "__main__":
    main()
