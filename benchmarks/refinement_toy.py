"""(k) A refinement guide for many observations, against the exact posterior of each: 4 tokens of 6 symbols.

    python benchmarks/refinement_toy.py
    python benchmarks/refinement_toy.py --seeds 0 1 2
    python benchmarks/refinement_toy.py --only denoising --steps 4500 --balance-steps 0
    python benchmarks/refinement_toy.py --only denoising --steps 300 --balance-steps 0 --temperatures 0 2 8 32

A latent text of exactly 4 tokens stands between a fixed beginning and an observed ending of 3 tokens, under the
six-token model. Every text can be enumerated, so that for each ending KL(q‖p), KL(p‖q) and the true relative
effective sample size 1/E_q[(p/q)²] are exact. A small network from scratch is trained by denoising on simulated pairs,
then by trajectory balance with a quarter of sleep; it is judged on endings drawn from the program that trajectory
balance has not seen (a simulated pair may repeat one). Beside it: balance from the start on the guide's own samples
alone, which leaves modes out, and an autoregressive adapter by the same two phases. One thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import pyro
import torch
from measure import machine, table

from llmppl import LM, Behaviour, fit, importance
from llmppl.guides import AutoregressiveGuide, RefinementGuide, TextGuide
from llmppl.masked_lm import MaskedLM
from llmppl.objectives import Denoising, ParticleObjective, TrajectoryBalance, WakeSleep
from llmppl.programs.particles import compute_log_prob
from llmppl.programs.structure import Program
from llmppl.testing import tiny_lm

BEGINNING, TOKENS, OBSERVED = "ab", 4, 3


def program(lm: LM) -> Program:
    def story(ending: str) -> None:
        middle = pyro.sample("middle", lm(BEGINNING, max_tokens=TOKENS))
        pyro.sample("ending", lm(BEGINNING, middle), obs=lm.encode(ending))

    return story


def endings(lm: LM, count: int, seed: int) -> list[str]:
    """Observations drawn from the program."""
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        middles = lm(BEGINNING, max_tokens=TOKENS).sample((count,))
        return list(lm.decode(lm(BEGINNING, middles, max_tokens=OBSERVED).sample()))


class Exact:
    """The joint of every text with each of some endings, and what a guide makes of it."""

    def __init__(self, lm: LM, held_out: Sequence[str]) -> None:
        prior = lm(BEGINNING, max_tokens=TOKENS)
        self.lm, self.held_out, self.texts = lm, list(held_out), prior.enumerate_support()
        with torch.no_grad():
            log_prior = prior.log_prob(self.texts)
            likelihood = lm(BEGINNING, self.texts[:, None])
            joint = log_prior[:, None] + likelihood.log_prob(lm.encode(self.held_out))
        self.log_evidence = joint.logsumexp(0)  # (endings,)
        self.log_posterior = joint.log_softmax(0)  # (texts, endings)
        self.log_prior = log_prior

    def divergences(self, guide: TextGuide | None) -> np.ndarray:
        """KL(q‖p), KL(p‖q) in nats and relative ESS of each ending, ``(3, endings)``; of the prior without a guide."""
        columns = []
        for n, ending in enumerate(self.held_out):
            log_p = self.log_posterior[:, n]
            log_q = self.log_prior if guide is None else self._log_q(guide, ending)
            ratio = (log_p - log_q).clamp(max=60)
            columns.append(
                [
                    float((log_q.exp() * -ratio).sum()),
                    float((log_p.exp() * ratio).sum()),
                    float(1 / (log_p + ratio).exp().sum()),
                ]
            )
        return np.array(columns).T

    @torch.no_grad()
    def _log_q(self, guide: TextGuide, ending: str) -> torch.Tensor:
        trace = pyro.poutine.trace(guide).get_trace(ending)
        site = trace.nodes["middle"]
        site["value"] = self.texts
        compute_log_prob(trace)
        return site["log_prob"]


def refined(exact: Exact, story: Program, guide: RefinementGuide, options: argparse.Namespace) -> str:
    """The gap of the guide in one step, refined by annealed importance sampling, on the first eight endings."""
    rows = []
    for temperatures in options.temperatures:
        pyro.set_rng_seed(0)
        start = time.process_time()
        run = importance(story, guide.at(steps=1, refine="ais", temperatures=temperatures), 64, progress=False)
        posteriors = [run(ending) for ending in exact.held_out[:8]]
        cost = (time.process_time() - start) / 64 / len(posteriors)
        gaps = exact.log_evidence[: len(posteriors)].numpy() - np.array([float(p.elbo) for p in posteriors])
        errors = np.array([float(p.elbo_error) for p in posteriors])
        gap = f"{gaps.mean():.2f} ± {np.sqrt(np.square(errors).sum()) / len(errors):.2f}"
        ess = np.mean([float(p.ess) for p in posteriors]) / 64
        rows.append([str(temperatures), gap, f"{ess:.2f}", f"{1000 * cost:.1f}"])
    return table(["temperatures", "gap of 1 step (nats)", "ESS a sample", "CPU ms a sample"], rows)


def train(
    guide: TextGuide, story: Program, phases: Sequence[tuple[ParticleObjective, list[tuple[str]], int, int, float]]
) -> float:
    """Train by each (objective, data, batch size, steps, learning rate) in turn; CPU seconds."""
    start = time.process_time()
    for objective, data, batch_size, steps, rate in phases:
        if steps:
            fit(
                story,
                guide,
                data,
                objective,
                steps=steps,
                batch_size=batch_size,
                vectorize_data=True,
                learning_rate=rate,
                schedule="cosine",
                weight_decay=0.0,
                progress=False,
            )
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of denoising")
    parser.add_argument("--balance-steps", type=int, default=400, help="of trajectory balance")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rates", type=float, nargs=2, default=(3e-3, 1e-3), help="learning rates of the two phases")
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--temperatures", type=int, nargs="+", default=[], help="of annealed importance sampling")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="contenders to run, by the beginning of their names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = tiny_lm(vocabulary=6, seed=0)
    story = program(lm)
    drawn = list(dict.fromkeys(endings(lm, 400, seed=1)))
    exact, data = Exact(lm, drawn[: options.held_out]), [(x,) for x in drawn[options.held_out :]]
    print(f"{len(data)} endings to train on, {options.held_out} held out. {machine()}\n", flush=True)

    rows: dict[str, list[np.ndarray]] = {"none (the prior)": [exact.divergences(None)]}
    seconds: dict[str, list[float]] = {}
    denoise, sleep_rate, balance_rate = Denoising(128), *options.rates
    balance = TrajectoryBalance(16, behaviour=Behaviour(sleep=0.25))
    on_policy = TrajectoryBalance(16)
    total = options.steps + options.balance_steps
    for seed in options.seeds:

        def refinement(seed: int = seed) -> RefinementGuide:
            network = MaskedLM.from_scratch(lm, max_tokens=TOKENS, width=options.width, layers=3, seed=seed)
            return RefinementGuide(story, lm, steps=4, network=network)

        first, second = (data[:1], 1, options.steps, sleep_rate), (data, 8, options.balance_steps, balance_rate)
        both, alone = refinement(), refinement()
        contenders: dict[str, tuple[TextGuide, list]] = {
            "denoising, then balance" if options.balance_steps else "denoising": (
                both,
                [(denoise, *first), (balance, *second)],
            ),
            "balance on its own samples alone": (alone, [(on_policy, data, 8, total, balance_rate)]),
            "autoregressive: sleep, then balance": (
                AutoregressiveGuide(story, lm, seed=seed),
                [(WakeSleep(128, insomnia=0.0), *first), (balance, *second)],
            ),
        }
        for name, (guide, phases) in contenders.items():
            if options.only and not any(name.startswith(only) for only in options.only):
                continue
            pyro.set_rng_seed(seed)
            found = [("", guide, phases)]
            if guide is both and options.balance_steps:
                found = [(": after denoising", guide, phases[:1]), ("", guide, phases[1:])]
            spent = 0.0
            for tag, trained, some in found:
                spent += train(trained, story, some)
                plans = [f", {steps} steps" for steps in (1, 2, 4)] if isinstance(trained, RefinementGuide) else [""]
                for steps, plan in zip((1, 2, 4), plans, strict=False):
                    at = trained.at(steps=steps) if isinstance(trained, RefinementGuide) else trained
                    row = f"{name}{tag}{plan}"
                    rows.setdefault(row, []).append(exact.divergences(at))
                    seconds.setdefault(row, []).append(spent)
                    print(row, np.round(rows[row][-1].mean(1), 3), f"{spent:.0f} CPU s", flush=True)
            if guide is both and options.temperatures:
                print("\n" + refined(exact, story, both, options) + "\n", flush=True)
    shown = []
    for name, found in rows.items():
        mean = np.stack(found).mean(-1)  # (seeds, 3)
        shown.append([name, *(f"{m:.2f}" for m in mean.mean(0)), f"{np.mean(seconds.get(name, [0.0])):.0f}"])
    print("\n" + table(["trained by", "KL(q‖p)", "KL(p‖q)", "relative ESS", "CPU s"], shown))


if __name__ == "__main__":
    main()
