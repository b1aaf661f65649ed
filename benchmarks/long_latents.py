"""Rationales of hundreds of tokens: what a training step costs, and what is left of the weights.

    python benchmarks/long_latents.py

8 latents of 512 tokens before an observed sentence, on SmolLM2: CPU seconds and peak memory of the passes of a step of
``SubTrajectoryBalance(every=16)`` and of ``WakeSleep`` (drawing left out), against cross-entropy on the same tokens by
``transformers`` and ``peft``, row by row, each in a process of its own; at half and a quarter of the length, too, for
the memory. Then the effective sample size of 16 particles at every one of 256 tokens, proposed by a prompt that is told
the ending, with resampling and without. A line of ``--out`` is written for each, and what is there already is not run
again; ``--plot`` draws them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from measure import keep, machine, records, table

from llmppl import LM, smc
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.objectives import SubTrajectoryBalance, WakeSleep
from llmppl.objectives.behaviour import Mixed
from llmppl.text import PAD

BEGINNING = "Anna was thirsty. She thought about what she could do."
ENDING = " So she drank a glass of cold water."
PARTICLES = 8
OBJECTIVES = {
    "WakeSleep": lambda: WakeSleep(PARTICLES, insomnia=1.0),
    "SubTrajectoryBalance(every=16)": lambda: SubTrajectoryBalance(PARTICLES, every=16),
}
CASES = ("cross-entropy", *OBJECTIVES)
RESAMPLED = {0.0: "never resampled", 0.5: "resampled below half"}


def program_of(lm: LM, tokens: int) -> Any:
    def story(beginning: Any, ending: Any) -> None:
        text = pyro.sample("thought", lm(beginning, max_tokens=tokens, stop="<|im_end|>"))
        pyro.sample("ending", lm(beginning, text), obs=lm.encode(ending))

    return story


def step(case: str, tokens: int) -> dict[str, Any]:
    """The passes of one step at texts that are there."""
    torch.set_num_threads(1)
    lm = LM.from_pretrained("smollm2-135m")
    program = program_of(lm, tokens)
    guide = AutoregressiveGuide(program, lm, {"thought": lambda beginning, ending: [ending, beginning]}, rank=8, seed=0)
    texts = torch.randint(1000, 20000, (PARTICLES, tokens), generator=torch.Generator().manual_seed(0))
    if case == "cross-entropy":
        prompt = lm.encode(ENDING + BEGINNING).expand(PARTICLES, -1)
        start = time.process_time()
        with lm.adapters.active(lm.adapters.names[0]):
            for row in torch.cat([prompt, texts], 1):
                logits = lm.transformer(row[None]).logits[0, prompt.shape[1] - 1 : -1]
                torch.nn.functional.cross_entropy(logits, row[prompt.shape[1] :]).backward()
    else:
        lm.gradient_checkpointing = True
        objective, start = OBJECTIVES[case](), 0.0
        short = torch.full_like(texts, PAD)
        short[:, :20], short[:, 20] = texts[:, :20], lm.encode("<|im_end|>", special=True)
        for values in (short, texts):  # what is done once for a program is done with the short ones
            start = time.process_time()
            with Mixed(torch.ones(PARTICLES), {"thought": values}, torch.ones(PARTICLES, dtype=torch.bool)):
                objective.differentiable_loss(program, guide, BEGINNING, ENDING).backward()
    seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"case": case, "tokens": tokens, "seconds": seconds, "GB": peak}


def effective(tokens: int, threshold: float) -> dict[str, Any]:
    """At each token: of what a prompt draws that is told the ending, against the prior of the text so far."""
    torch.set_num_threads(1)
    lm = LM.from_pretrained("smollm2-135m")
    program = program_of(lm, tokens)
    told = PromptGuide(program, lm, {"thought": lambda beginning, ending: ["It ends: ", ending, "\n", beginning]})
    start = time.process_time()
    found = smc(program, told, 16, targets="prefixes", ess_threshold=threshold, seed=0, progress=False)(
        BEGINNING, ENDING
    )
    return {
        "case": RESAMPLED[threshold], "tokens": tokens, "history": [float(ess) for ess in found.ess_history],
        "ancestors": int(found.distinct_ancestors), "log Z": float(found.log_evidence),
        "error": float(found.log_evidence_error), "length": found.mean_tokens, "doubts": found.doubts,
        "seconds": time.process_time() - start,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("long_latents.jsonl"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 256, 128])
    parser.add_argument("--plot", type=Path, help="a picture of both")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(step(options.one[0], int(options.one[1]))))
        return
    print(machine(), flush=True)
    done = {(record["case"], record["tokens"]) for record in records(options.out)}
    for tokens in options.tokens:
        for case in CASES:
            if (case, tokens) not in done:
                called = [sys.executable, __file__, "--one", case, str(tokens)]
                said = subprocess.run(called, capture_output=True, text=True, check=True).stdout
                keep(options.out, json.loads(said.splitlines()[-1]))
    for threshold, case in RESAMPLED.items():
        if (case, 256) not in done:
            keep(options.out, effective(256, threshold))
    if options.plot:
        plot(records(options.out), options.plot)
    found = [record for record in records(options.out) if record["case"] in CASES]
    plain = {record["tokens"]: record["seconds"] for record in found if record["case"] == "cross-entropy"}
    rows = [[r["case"], r["tokens"], r["seconds"], r["seconds"] / plain[r["tokens"]], r["GB"]] for r in found]
    print(table(["passes of", "tokens", "CPU s", "of cross-entropy's", "peak, GB"], rows))
    texts = [r for r in records(options.out) if r["case"] in RESAMPLED.values()]
    rows = [
        [r["case"], min(r["history"]), r["ancestors"], r["log Z"], r["error"], r["length"], r["seconds"]] for r in texts
    ]
    heads = ["SMC over 256 tokens", "smallest ESS", "ancestors", "log Ẑ", "±", "tokens a text", "CPU s"]
    print("", table(heads, rows), *(f"{r['case']}: {r['doubts']}" for r in texts), sep="\n")


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Peak memory over the length, and the effective sample size over the tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for case in CASES:
        own = sorted((r["tokens"], r["GB"]) for r in found if r["case"] == case)
        left.plot(*zip(*own, strict=True), marker="o", label=case)
    left.set(xlabel="tokens of each of 8 latents", ylabel="peak memory, GB", ylim=(0, None))
    left.legend(fontsize=8, frameon=False)
    for case in RESAMPLED.values():
        (own,) = (r["history"] for r in found if r["case"] == case)
        right.plot(range(1, len(own) + 1), own, label=case)
    right.set(xlabel="looks, one a token", ylabel="effective sample size of 16", ylim=(0, 16.5))
    right.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
