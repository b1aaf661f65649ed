"""A language model conditioned on a regular expression: who finds the evidence, and who says that they did not.

    python benchmarks/constrained_text.py
    python benchmarks/constrained_text.py --particles 10 50 200 --seeds 10

The program writes at most 20 tokens and an end token after a prompt, and a factor asks that the text match the
expression. The guide is masked decoding under the same expression. What makes it hard: the expression lets
three pairs of emojis stand in one place, and the first token of most of the mass is one that masked
decoding writes once in tens of thousands of texts.

The reference is the sum over the canonical tokenisations of the three texts, below log Z, and the enumeration
of all that the guide can write (optimal resampling that never had to drop anything). One thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import pyro
import torch
from measure import machine, table
from torch import Tensor

from llmppl import LM, Grammar, Posterior, importance, smc

PROMPT = "Here is my honest opinion:"
MIDDLES = ("🔥🔥", "😍😍", "🤌🤌")
TEXTS = [f" SMC is {middle} with LMs" for middle in MIDDLES]
EXPRESSION = f" SMC is ({'|'.join(MIDDLES)}) with LMs"
MAX_TOKENS = 20
QUOTED = {10: "−126.6 ± 10.5, reported ESS 9.2", 50: "−105.3 ± 6.9, reported ESS 46"}


def programs(lm: LM) -> tuple[Callable[[], None], Callable[[], None]]:
    """The conditioned program, and masked decoding as its guide."""
    end, grammar = int(lm.tokenizer.eos_token_id), Grammar.regex(EXPRESSION)
    wanted = set(TEXTS)

    def matches(text: Tensor) -> Tensor:
        rows = text.reshape(-1, text.shape[-1])
        ended = [lm.decode(row[row != end]) in wanted and bool((row == end).any()) for row in rows]
        return torch.tensor(ended).reshape(text.shape[:-1])

    def opinion() -> None:
        text = pyro.sample("text", lm(PROMPT, max_tokens=MAX_TOKENS, stop=[end]))
        pyro.factor("matches", torch.where(matches(text), 0.0, -torch.inf))

    def masked() -> None:
        pyro.sample("text", lm(PROMPT, max_tokens=MAX_TOKENS, grammar=grammar))

    return opinion, masked


def canonical(lm: LM) -> tuple[float, np.ndarray]:
    """Log-probability of the canonical tokenisations together, and the share of each text."""
    end = torch.tensor([lm.tokenizer.eos_token_id])
    scores = [float(lm(PROMPT).log_prob(torch.cat([lm.encode(text), end]))) for text in TEXTS]
    return float(np.logaddexp.reduce(scores)), np.exp(scores - np.logaddexp.reduce(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2-135m", help="a name or a folder; the figures quoted are of this one"
    )
    parser.add_argument("--particles", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = LM.from_pretrained(options.model)
    opinion, masked = programs(lm)
    print(machine())
    reference, shares = canonical(lm)
    print(
        f"canonical tokenisations: log Z ≥ {reference:.2f} nats, shares "
        + ", ".join(f"{middle} {share:.0%}" for middle, share in zip(MIDDLES, shares, strict=True))
    )
    methods: dict[str, Callable[[int], Callable[[], Posterior]]] = {
        "smc, as it comes": lambda count: smc(opinion, masked, count, progress=False),
        "smc, systematic": lambda count: smc(opinion, masked, count, resampling="systematic", progress=False),
        "importance": lambda count: importance(opinion, masked, count, progress=False),
    }
    rows = []
    for name, make in methods.items():
        for count in options.particles:
            found, start = [], time.process_time()
            for seed in range(options.seeds):
                pyro.set_rng_seed(seed)
                found.append(make(count)())
            seconds = (time.process_time() - start) / options.seeds
            estimates = np.array([float(p.log_evidence) for p in found])
            rows.append(
                [
                    name,
                    count,
                    f"{estimates.mean():.2f} ± {estimates.std():.2f}",
                    f"{estimates.mean() - reference:+.2f}",
                    f"{np.mean([p.ess for p in found]):.1f}",
                    "exact over the guide's support"
                    if found[-1].complete
                    else "; ".join(found[-1].doubts) or "no doubts",
                    f"{seconds:.1f}",
                ]
            )
    print(f"\nmean ± standard deviation over {options.seeds} seeds, nats\n")
    print(table(["method", "particles", "log Ẑ", "against canonical", "ESS", "what it says of itself", "CPU s"], rows))
    for count, text in QUOTED.items():
        print(f"engines quoted, {count} particles: {text}")
    last = smc(opinion, masked, max(options.particles), progress=False)()
    print("\nposterior: " + ", ".join(f"{text.strip()!r} {weight:.1%}" for text, weight in last.top("text", 3)))


if __name__ == "__main__":
    main()
