"""(e) What each objective reaches: on the enumerable twin, and in nats of held-out gap against CPU seconds.

    python benchmarks/objectives.py twin
    python benchmarks/objectives.py infilling --seconds 120 --seeds 5
    python benchmarks/objectives.py infilling --model ../shared/data/models/stories260k --seconds 60

``twin`` trains on one observation of a tiny model and prints the exact KL both ways, and the total
variation of 2000 draws from the exact posterior beside that of 2000 exact posterior draws (the floor of
sampling). ``infilling`` trains on the shipped stories from the same start for the same CPU seconds, and
evaluates on held-out ones; for log Z of a story stands the best log Ẑ of all runs, so gaps are comparable
with each other and understated alike. One thread.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import torch
from measure import machine, table
from torch import Tensor

from llmppl import LM, Behaviour, exact_posterior, fit, importance
from llmppl.demo import infilling as demo
from llmppl.guides import GFlowNetGuide
from llmppl.models import ending_first, infilling
from llmppl.objectives import (
    DetailedBalance,
    LeaveOneOutELBO,
    ParticleObjective,
    SubTrajectoryBalance,
    TrajectoryBalance,
    WakeSleep,
)
from llmppl.testing import tiny_lm

MIX = {"tempered": 0.25, "replayed": 0.25, "temperatures": (1.0, 1.5)}


def contenders(particles: int) -> dict[str, Callable[[], ParticleObjective]]:
    """New objectives, for they hold buffers."""
    return {
        "VarGrad": lambda: TrajectoryBalance(particles, behaviour=Behaviour(**MIX)),
        "TB, learned log Z": lambda: TrajectoryBalance(particles, "learned", behaviour=Behaviour(**MIX)),
        "SubTB": lambda: SubTrajectoryBalance(particles, behaviour=Behaviour(**MIX)),
        "detailed balance": lambda: DetailedBalance(particles, behaviour=Behaviour(**MIX)),
        "leave-one-out ELBO": lambda: LeaveOneOutELBO(particles),
        "wake-sleep": lambda: WakeSleep(particles),
    }


# --- the twin ------------------------------------------------------------------------------------


def twin(options: argparse.Namespace) -> None:
    rows = []
    for name, make in contenders(options.particles).items():
        results = np.array([_twin_run(make(), seed, options.steps) for seed in range(options.seeds)])
        rows.append((name, *(f"{m:.3f} ± {s:.3f}" for m, s in zip(results.mean(0), results.std(0), strict=True))))
        print(rows[-1], flush=True)
    header = ("objective", "KL(q‖p)", "KL(p‖q)", "TV of 2000 draws", "TV of 2000 exact draws")
    print(f"\n{options.steps} steps, {options.particles} particles, mean ± s.d. of {options.seeds} seeds, nats\n")
    print(table(header, rows))


def _twin_run(objective: ParticleObjective, seed: int, steps: int) -> tuple[float, ...]:
    lm = tiny_lm()
    story = infilling(lm, max_tokens=3)
    guide = GFlowNetGuide(story, lm, seed=seed)
    fit(
        story, guide, [("ab", "cd")], objective, steps, learning_rate=2e-3, log_partition_learning_rate=0.3,
        schedule="cosine", seed=seed, progress=False,
    )  # fmt: skip
    posterior = exact_posterior(story)("ab", "cd")
    texts = torch.as_tensor(posterior.samples["middle"])
    log_p = torch.as_tensor(posterior.log_weights).log_softmax(0)
    with torch.no_grad():
        fn = lm("cd", "ab", max_tokens=3, stop=".")
        fn = fn.with_context(fn.context, guide.adapter)
        log_q = fn.log_prob(texts).double()
        drawn = fn.sample((2000,))
    index = (drawn[:, None] == texts).all(-1).long().argmax(-1)
    exact = torch.distributions.Categorical(logits=log_p).sample((2000,))
    return (
        float((log_q.exp() * (log_q - log_p)).sum()),
        float((log_p.exp() * (log_p - log_q)).sum()),
        _variation(index, log_p),
        _variation(exact, log_p),
    )


def _variation(index: Tensor, log_p: Tensor) -> float:
    frequency = torch.bincount(index, minlength=len(log_p)).double() / len(index)
    return float((frequency - log_p.exp()).abs().sum() / 2)


# --- infilling -----------------------------------------------------------------------------------


class _SpentError(Exception):
    """The CPU seconds of a run are used up."""


def infill(options: argparse.Namespace) -> None:
    if options.model != "smollm2-135m" and not Path(options.model).is_dir():
        print(f"skipped: there is no model folder {options.model}")
        return
    marks = [0.0, options.seconds / 4, options.seconds / 2, options.seconds]
    training, held = demo.split(demo.stories(), options.held_out)
    found: dict[str, list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]] = {}
    steps: dict[str, list[int]] = {}
    for seed in range(options.seeds):
        for name, make in contenders(options.particles).items():
            if options.objectives and name not in options.objectives:
                continue
            curve, count = _infilling_run(make(), options, training, held, marks, seed)
            found.setdefault(name, []).append(curve)
            steps.setdefault(name, []).append(count)
            print(seed, name, count, "steps; ELBO", [f"{e.mean():.2f}" for e, _, _ in curve], flush=True)
    evidence = np.max([z for curves in found.values() for curve in curves for _, z, _ in curve], 0)
    rows = []
    for name, curves in found.items():
        gaps = np.array([[(evidence - elbo).mean() for elbo, _, _ in curve] for curve in curves])  # (seeds, marks)
        sizes = np.array([curve[-1][2].mean() for curve in curves])
        cells = [f"{m:.2f} ± {s:.2f}" for m, s in zip(gaps.mean(0), gaps.std(0), strict=True)]
        rows.append((name, float(np.mean(steps[name])), *cells, f"{sizes.mean():.1f}"))
    print(
        f"\n{Path(options.model).name}, {len(held)} held-out stories, {options.samples} samples each, "
        f"{options.seeds} seeds"
    )
    print(f"log Z stands at {evidence.mean():.2f}; gaps in nats, mean ± s.d. over seeds\n")
    print(table(("objective", "steps", *(f"gap at {m:.0f} CPU s" for m in marks), "ESS at the end"), rows))


def _infilling_run(
    objective: ParticleObjective,
    options: argparse.Namespace,
    training: list[tuple[str, str]],
    held: list[tuple[str, str]],
    marks: list[float],
    seed: int,
) -> tuple[list[tuple[np.ndarray, np.ndarray, np.ndarray]], int]:
    """ELBO, log Ẑ and ESS of each held-out story at each mark of CPU seconds; and the steps trained."""
    pyro.clear_param_store()
    lm = LM.from_pretrained(options.model)
    story = infilling(lm)
    guide = GFlowNetGuide(story, lm, prompt={"middle": ending_first}, rank=demo.RANK, seed=seed)
    curve: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    spent, since, taken = 0.0, 0.0, 0

    def evaluate() -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            run = importance(story, guide, options.samples, vectorize_data=True, progress=False)
            posterior = run([b for b, _ in held], [e for _, e in held])
        curve.append((np.asarray(posterior.elbo), np.asarray(posterior.log_evidence), np.asarray(posterior.ess)))

    def watch(step: int, history: object) -> None:
        nonlocal spent, since, taken
        spent, taken = spent + time.process_time() - since, step
        while len(curve) < len(marks) and spent >= marks[len(curve)]:
            evaluate()
        if len(curve) == len(marks):
            raise _SpentError
        since = time.process_time()

    evaluate()
    since = time.process_time()
    with contextlib.suppress(_SpentError):
        fit(
            story, guide, training, objective, 1_000_000, batch_size=options.batch_size, vectorize_data=True,
            learning_rate=demo.LEARNING_RATE, seed=seed, progress=False, callback=watch,
        )  # fmt: skip
    return curve, taken


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("part", choices=("twin", "infilling"))
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--particles", type=int, default=None, help="default: 32 on the twin, 12 in infilling")
    arguments.add_argument("--steps", type=int, default=260, help="of the twin")
    arguments.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of training")
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--held-out", type=int, default=6)
    arguments.add_argument("--samples", type=int, default=24)
    arguments.add_argument("--batch-size", type=int, default=2)
    arguments.add_argument("--objectives", nargs="*", default=None, help="names of those to compare; all by default")
    options = arguments.parse_args()
    options.particles = options.particles or (32 if options.part == "twin" else 12)
    torch.set_num_threads(1)
    print(machine(), flush=True)
    {"twin": twin, "infilling": infill}[options.part](options)


if __name__ == "__main__":
    main()
