"""(c) Texts with their log-probabilities: ``transformers.generate`` with scores against ours.

    python benchmarks/sampling.py

A shared prompt, texts of a fixed number of tokens. ``generate`` returns the logits of each step, of
which the log-probabilities are taken; ours records them. Prints tokens per CPU second, medians of one
run, one thread, float32, and ours with a bfloat16 copy as the sampler.

    python benchmarks/sampling.py --long

Behind long prompts, which are kept once: CPU seconds of a draw beside those of reading the prompt alone, and of a draw
where every row has a copy of the prompt's keys and values.

    python benchmarks/sampling.py --beginnings

Different prompts that begin alike, as behind worked examples, which are read once: CPU seconds of a draw, and of one
that reads each prompt whole.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import torch
from measure import cpu_seconds, machine, table

from llmppl import LM
from llmppl.distributions import AutoregressiveText
from llmppl.network import drawing, prompt_reading

SHAPES = [(60, 16, 20), (60, 1, 20), (10, 16, 20), (200, 16, 20)]  # prompt, particles, tokens
BEGINNINGS = [(70, 15, 32, 8), (400, 30, 8, 16)]  # tokens of the beginning and of each rest, prompts, tokens drawn
LONG = [(400, 8, 16), (1600, 8, 16), (3000, 8, 16)]


@torch.no_grad()
def generate(lm: LM, prompt: torch.Tensor, particles: int, tokens: int) -> torch.Tensor:
    ids = prompt.expand(particles, -1)
    output = lm.transformer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    drawn = output.sequences[:, prompt.shape[-1] :]
    return torch.stack([
        step.float().log_softmax(-1).gather(-1, drawn[:, t, None])[:, 0] for t, step in enumerate(output.logits)
    ]).sum(0)  # fmt: skip


def ours(lm: LM, prompt: torch.Tensor, particles: int, tokens: int, dtype: torch.dtype | None) -> torch.Tensor:
    law = lm("x", max_tokens=tokens).law
    text = AutoregressiveText(lm, prompt, law, sampling_dtype=dtype)
    return text.sample_with_log_prob((particles,))[1]


@torch.no_grad()
def long_prompts(lm: LM, repeats: int) -> None:
    """Draws behind one long prompt: kept once, or copied for each row."""
    rows, steps = [], 0.0
    for length, particles, tokens in [(100, 8, 16), *LONG]:
        prompt = torch.randint(1000, 40000, (length,), generator=torch.Generator().manual_seed(0))
        given = (lm, prompt, particles, tokens, None)

        def copied(given: tuple[Any, ...] = given) -> None:
            with mock.patch.object(drawing, "pays", return_value=False):
                ours(*given)

        def read(prompt: torch.Tensor = prompt) -> None:
            lm.transformer(prompt[None], logits_to_keep=1)

        contenders = {"reading": read, "shared": lambda g=given: ours(*g), "copied": copied}
        seconds = cpu_seconds(contenders, repeats)
        if not rows:
            steps = seconds["shared"] - seconds["reading"]
        ratio = seconds["shared"] / (seconds["reading"] + steps)
        rows.append((f"{length}/{particles}/{tokens}", *seconds.values(), ratio))
        print(rows[-1], flush=True)
    header = (
        "prompt/particles/tokens",
        "reading alone, s",
        "kept once, s",
        "copied, s",
        "over reading and steps at 100",
    )
    print("\n" + table(header, rows))


@torch.no_grad()
def alike(lm: LM, repeats: int) -> None:
    """Draws behind different prompts that begin alike."""
    rows = []
    for common, own, prompts, tokens in BEGINNINGS:
        source = torch.Generator().manual_seed(0)
        beginning = torch.randint(1000, 40000, (common,), generator=source).expand(prompts, -1)
        prompt = torch.cat([beginning, torch.randint(1000, 40000, (prompts, own), generator=source)], -1)
        given = (lm, prompt, 1, tokens, None)

        def whole(given: tuple[Any, ...] = given) -> None:
            with mock.patch.object(prompt_reading, "FEWEST", 10**9):
                ours(*given)

        seconds = cpu_seconds({"once": lambda g=given: ours(*g), "whole": whole}, repeats)
        rows.append((f"{common}/{own}/{prompts}/{tokens}", *seconds.values(), seconds["whole"] / seconds["once"]))
        print(rows[-1], flush=True)
    print("\n" + table(("beginning/rest/prompts/tokens", "read once, s", "read whole, s", "ratio"), rows))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    arguments.add_argument("--long", action="store_true", help="long shared prompts")
    arguments.add_argument("--beginnings", action="store_true", help="different prompts that begin alike")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    lm = LM.from_pretrained("smollm2-135m")
    print(machine(), flush=True)
    if options.long:
        long_prompts(lm, options.repeats)
        return
    if options.beginnings:
        alike(lm, options.repeats)
        return
    rows = []
    for length, particles, tokens in SHAPES[: options.shapes]:
        prompt = torch.randint(1000, 40000, (length,), generator=torch.Generator().manual_seed(0))
        given = (lm, prompt, particles, tokens)
        contenders = {
            "generate": lambda g=given: generate(*g),
            "ours": lambda g=given: ours(*g, None),
            "bfloat16": lambda g=given: ours(*g, torch.bfloat16),
        }
        cpu_seconds(contenders, 1)  # warms up
        seconds = cpu_seconds(contenders, options.repeats)
        rate = {name: particles * tokens / value for name, value in seconds.items()}
        shape = f"{length}/{particles}/{tokens}"
        rows.append((shape, *rate.values(), rate["ours"] / rate["generate"], rate["bfloat16"] / rate["generate"]))
        print(rows[-1], flush=True)
    header = ("prompt/particles/tokens", "generate tok/s", "ours", "ours, bf16 sampler", "ratio", "ratio bf16")
    print("\n" + table(header, rows))


if __name__ == "__main__":
    main()
