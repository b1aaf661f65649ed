"""(j) A gap of 6 to 10 tokens in a story, filled in a few steps: gap, ESS and cost beside other proposals.

    python benchmarks/gap_filling.py --save runs/gap
    python benchmarks/gap_filling.py --load runs/gap/balance.safetensors --sleep-seconds 0 --balance-seconds 0

The middle sentence of a story has 6 to 10 tokens and is latent, the ending is observed. A RefinementGuide on
SmolLM2's own transformer learns from simulated pairs first (sleep, in 4 and in other numbers of steps), then by
trajectory balance in 4 steps with a quarter of sleep, for given CPU seconds. Its samples in 1, 2, 4 and 10
steps are compared, on the same held-out stories, with the prior, with the language model told the ending, and
with the shipped autoregressive adapter, which was trained for longer on middles of up to 16 tokens. log Z stands for
the best log Ẑ of all proposals: a lower bound in expectation, and so are the gaps.

With ``--save`` the guide is kept after each phase, ``--load`` goes on from there. One thread.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import torch
from measure import machine, table

from llmppl import LM, Behaviour, Posterior, fit, importance
from llmppl.demo.infilling import make_guide, prior_guide, shipped_adapter, split, stories
from llmppl.diagnostics import inference_gap
from llmppl.guides import PromptGuide, RefinementGuide, TextGuide
from llmppl.models import ending_first
from llmppl.network.text_tensors import Piece
from llmppl.objectives import ParticleObjective, TrajectoryBalance, WakeSleep
from llmppl.posterior.inference_gap import best_log_evidence
from llmppl.programs.structure import Program

MIN_TOKENS, MAX_TOKENS = 6, 10
# The steps in which a simulated middle is scored, in turn: four most often, since that is what is asked of the guide.
SLEEP_STEPS = (4, 10, 4, 2)


def program(lm: LM) -> Program:
    def story(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", lm(beginning, max_tokens=MAX_TOKENS, min_tokens=MIN_TOKENS, stop="."))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    return story


def both_sides(beginning: Piece, ending: Piece) -> list[object]:
    """The ending is told where the language model understands it, in front, and where it stands."""
    return [*ending_first(beginning, ending), ..., ending]


def make(lm: LM, seed: int, rank: int) -> RefinementGuide:
    return RefinementGuide(
        program(lm),
        lm,
        steps=4,
        order="left-to-right",
        prompt={"middle": both_sides},  # type: ignore[dict-item]
        rank=rank,
        max_tokens=MAX_TOKENS,
        seed=seed,
    )


class _SpentError(Exception):
    """The CPU seconds of a phase are used up."""


def train(guide: RefinementGuide, lm: LM, options: argparse.Namespace) -> None:
    data, _ = split(stories(), 0)
    phases: list[tuple[str, ParticleObjective, float, float, int]] = [
        ("sleep", WakeSleep(2, insomnia=0.0), options.sleep_seconds, options.sleep_rate, 4),
        (
            "balance",
            TrajectoryBalance(options.particles, behaviour=Behaviour(sleep=0.25)),
            options.balance_seconds,
            options.balance_rate,
            2,
        ),
    ]
    for number, (name, objective, seconds, rate, stories_a_step) in enumerate(phases):
        if not seconds:
            continue
        start, plan = time.process_time(), guide.plan

        def callback(
            step: int, history: object, name: str = name, start: float = start, seconds: float = seconds
        ) -> None:
            if name == "sleep":
                guide.plan = replace(guide.plan, steps=SLEEP_STEPS[step % len(SLEEP_STEPS)])
            if step % 10 == 0:
                losses = history.loss[-10:]  # type: ignore[attr-defined]
                elbos = history.elbo[-10:]  # type: ignore[attr-defined]
                spent = time.process_time() - start
                print(
                    f"{name}: step {step}, loss {np.mean(losses):.2f}, ELBO {np.mean(elbos):.2f}, {spent:.0f} CPU s",
                    flush=True,
                )
                if options.save is not None and step % 50 == 0:
                    guide.save(options.save / f"{name}.safetensors")
            if time.process_time() - start > seconds:
                raise _SpentError

        with contextlib.suppress(_SpentError):
            fit(
                program(lm),
                guide,
                data,
                objective,
                steps=100_000,
                batch_size=stories_a_step,
                vectorize_data=True,
                learning_rate=rate,
                seed=options.seed + number,
                progress=False,
                callback=callback,
            )
        guide.plan = plan
        if options.save is not None:
            guide.save(options.save / f"{name}.safetensors")


def evaluate(guide: RefinementGuide, lm: LM, options: argparse.Namespace) -> None:
    story = program(lm)
    _, held_out = split(stories(), options.held_out)
    shipped = make_guide(story, lm)
    shipped.load(shipped_adapter())
    guides: dict[str, TextGuide] = {
        "prior": prior_guide(story, lm),
        "language model, told the ending": PromptGuide(story, lm, prompt={"middle": ending_first}),
        "autoregressive, shipped adapter": shipped,
        **{f"refinement, {steps} steps": guide.at(steps=steps) for steps in (1, 2, 4, MAX_TOKENS)},
        "refinement, 4 steps by confidence": guide.at(steps=4, order="confidence"),
        "refinement, 4 steps and AIS": guide.at(steps=4, refine="ais", temperatures=options.temperatures),
    }
    posteriors: dict[str, Posterior] = {}
    seconds = {}
    for name, proposal in guides.items():
        pyro.set_rng_seed(options.seed)
        start = time.process_time()
        run = importance(story, proposal, options.samples, vectorize_data=True, progress=False)
        posteriors[name] = run([b for b, _ in held_out], [e for _, e in held_out])
        seconds[name] = (time.process_time() - start) / posteriors[name].log_weights.size
        print(f"{name}: ELBO {posteriors[name].elbo.mean():.2f}, {seconds[name]:.2f} CPU s a sample", flush=True)
    references = list(posteriors.values())
    evidence, _ = best_log_evidence(references)
    rows = []
    for name, posterior in posteriors.items():
        gap = inference_gap(posterior, *references).gap
        error = gap.std(ddof=1) / np.sqrt(len(gap))
        rows.append(
            [
                name,
                f"{posterior.elbo.mean():.2f}",
                f"{posterior.log_evidence.mean():.2f}",
                f"{gap.mean():.2f} ± {error:.2f}",
                f"{posterior.ess.mean():.1f}",
                f"{seconds[name]:.2f}",
                f"{seconds[name] * posterior.num_samples / posterior.ess.mean():.2f}",
            ]
        )
    print(
        f"\n{len(held_out)} held-out stories, {options.samples} samples each, nats ± standard error over stories; "
        f"log Z at least {evidence.mean():.2f}.\n{machine()}\n"
    )
    print(table(["proposal", "ELBO", "log Ẑ", "gap", "ESS", "CPU s a sample", "CPU s an effective sample"], rows))
    for n in range(min(3, len(held_out))):
        print(f"\n{held_out[n][0]} ____{held_out[n][1]}")
        for text in posteriors["refinement, 4 steps"].row(n).decode("middle")[:4]:
            print(f"   {text.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sleep-seconds", type=float, default=900, help="CPU seconds of the first phase")
    parser.add_argument("--balance-seconds", type=float, default=900, help="CPU seconds of the second phase")
    parser.add_argument("--sleep-rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--balance-rate", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--temperatures", type=int, default=8, help="of annealed importance sampling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="folder for the guide after each phase")
    parser.add_argument("--load", type=Path, help="file of a guide to go on from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = LM.from_pretrained(options.model)
    guide = make(lm, options.seed, options.rank)
    print(guide, flush=True)
    if options.load is not None:
        guide.load(options.load)
    train(guide, lm, options)
    evaluate(guide, lm, options)


if __name__ == "__main__":
    main()
