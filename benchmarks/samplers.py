"""Samplers beside a learner: what they cost on one machine, and what many of them would come to.

    python benchmarks/samplers.py --out samplers.png

The demo's program (infilling on SmolLM2-135M, an adapter of rank 8, trajectory balance on 16 particles, all of them
replayed). Learner steps and scored texts a minute with 0, 1, 2 and 4 samplers on this machine: without any, the
learner draws for itself (*on-policy*), or replays what a filled buffer has (*replay alone*: what the learner does in
the other rows, too, so that the rows' loss against it is what samplers cost where all share the machine's cores).

Then a simulation with the step times, task times, sizes and costs of a message that were measured, of samplers that
have machines of their own, all on a link of 10 Gbit/s that leaves the learner's: how many texts a minute arrive, how
old they are when they do, and what binds. Message by message: a sampler draws for a row, its draws queue at the
learner, which takes them in between two steps; new weights leave it every ``refresh_every`` steps, one after another.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import machine, table

from llmppl import LM, Behaviour, RaySamplers, fit, importance
from llmppl.demo.infilling import stories
from llmppl.guides import AutoregressiveGuide
from llmppl.models import infilling
from llmppl.objectives import TrajectoryBalance
from llmppl.training import ray_samplers
from llmppl.training.history import History

PARTICLES = 16
REFRESH = 8
AHEAD = 2
"""Tasks that a sampler has before it: with so many drawn and not taken in it waits."""
LINK = 10e9 / 8
"""Bytes a second."""


@dataclass
class Measured:
    """Seconds of a learner's step, of a sampler's task, of taking one task's draws in; bytes of weights."""

    step: list[float]
    task: list[float]
    intake: float
    weights: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--samplers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--simulated", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--out", type=Path, default=Path("samplers.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    lm = LM.from_pretrained("smollm2-135m")
    rows: list[list[Any]] = []
    intakes: list[float] = []
    watch(intakes)
    plain, _ = run(lm, options.steps, 0, replayed=0.0)
    rows.append(["on-policy", *said(plain, plain)])
    alone, buffer = run(lm, options.steps, 0, replayed=1.0)
    # Again, on the buffer that it has filled.
    alone, _ = run(lm, options.steps, 0, replayed=1.0, buffer=buffer)
    rows.append(["replay alone", *said(alone, alone)])
    for num in options.samplers:
        if num:
            history, _ = run(lm, options.steps, num, replayed=1.0, buffer=buffer)
            rows.append([f"{num} sampler{'s' * (num > 1)}", *said(history, alone)])
            print(rows[-1], flush=True)
    header = ["learner", "s a step", "steps a minute", "slower than replay alone", "texts drawn a minute", "staleness"]
    print(table(header, rows))
    guide = AutoregressiveGuide(infilling(lm), lm, rank=8, seed=0)
    weights = sum(p.nbytes for p in guide.parameters() if p.requires_grad)
    measured = Measured(differences(alone), drawing(lm), mean(intakes), weights)
    print(
        f"\nmeasured: {mean(measured.step):.2f} s a step, {mean(measured.task):.2f} s a task of {PARTICLES} draws, "
        f"{1e3 * measured.intake:.2f} ms to take a task's draws in, {weights / 1e6:.1f} MB of weights\n"
    )
    found = [simulated(measured, count) for count in options.simulated]
    header = ["samplers", "texts a minute", "share of what they could draw", "steps a minute", "staleness", "binds"]
    print(table(header, found))
    plot(found, measured, options.out)


def run(lm: LM, steps: int, num: int, replayed: float, buffer: Any = None) -> tuple[History, Any]:
    program = infilling(lm)
    guide = AutoregressiveGuide(program, lm, rank=8, seed=0)
    behaviour = Behaviour(replayed=replayed, **({} if buffer is None else {"buffer": buffer})) if replayed else None
    objective = TrajectoryBalance(PARTICLES, behaviour=behaviour)
    samplers = RaySamplers(num, refresh_every=REFRESH, max_staleness=10**6, num_samples=PARTICLES)
    history = fit(program, guide, stories()[:16], objective, steps, samplers=samplers, seed=0, progress=False)
    return history, objective.behaviour.buffer


def differences(history: History) -> list[float]:
    """Seconds of each step, the first third left out: samplers are starting then."""
    seconds = history.seconds
    own = [later - earlier for earlier, later in itertools.pairwise(seconds)]
    return own[len(own) // 3 :]


def said(history: History, other: History) -> list[Any]:
    step, before = mean(differences(history)), mean(differences(other))
    kept = len(differences(history))
    drawn = sum(history.sampled[-kept:]) / (step * kept) * 60
    ages = [age for age in history.staleness[-kept:] if age == age]
    return [step, 60 / step, f"{step / before - 1:+.0%}", drawn, mean(ages)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


# --- what is measured on the way ------------------------------------------------------------------


def drawing(lm: LM, count: int = 8) -> list[float]:
    """Seconds of tasks of a sampler that has a core for itself."""
    program = infilling(lm)
    guide = AutoregressiveGuide(program, lm, rank=8, seed=0)
    infer, found = importance(program, guide, PARTICLES, progress=False), []
    for row in stories()[: count + 1]:
        start = time.perf_counter()
        infer(*row)
        found.append(time.perf_counter() - start)
    return found[1:]


def watch(intakes: list[float]) -> None:
    """Note how long it takes to take in what a task has drawn."""
    team: Any = ray_samplers._Team
    take = team._take

    def timed(self: Any, step: int) -> int:
        tasks, start = len(self.tasks), time.perf_counter()
        taken = int(take(self, step))
        if done := tasks - len(self.tasks):
            intakes.append((time.perf_counter() - start) / done)
        return taken

    team._take = timed


# --- many machines --------------------------------------------------------------------------------


def simulated(measured: Measured, count: int, steps: int = 400) -> list[Any]:
    """A learner of so many steps with so many samplers; the last half of it counts."""
    source = random.Random(0)
    version_sent = [0] * count  # the step of the weights that each sampler has
    events = [(source.choice(measured.task) * source.random(), n) for n in range(count)]
    heapq.heapify(events)
    waiting: list[tuple[int, int]] = []  # what is drawn and not taken in: the step of the weights, and the sampler
    unread = [0] * count
    now, ages, texts, link_free = 0.0, list[int](), 0, 0.0
    sends: list[tuple[float, int, int]] = []
    half, since, intake_time = steps // 2, 0.0, 0.0
    for step in range(steps):
        if step == half:
            since, texts, intake_time, ages = now, 0, 0.0, []
        if step % REFRESH == 0:
            for n in range(count):  # one link leaves the learner's machine
                link_free = max(link_free, now) + measured.weights / LINK
                sends.append((link_free, n, step))
        end = now + source.choice(measured.step)
        while events and events[0][0] <= end:
            at, n = heapq.heappop(events)
            waiting.append((version_sent[n], n))
            unread[n] += 1
            if unread[n] < AHEAD:
                heapq.heappush(events, (at + source.choice(measured.task), n))
            for sent, who, version in [s for s in sends if s[1] == n and s[0] <= at]:
                version_sent[n] = max(version_sent[n], version)
                sends.remove((sent, who, version))
        # The newest first, for a share of the learner's time.
        waiting.sort(reverse=True)
        most = max(1, int(ray_samplers.INTAKE * (end - now) / measured.intake))
        taken, waiting = waiting[:most], waiting[most:]
        now = end + len(taken) * measured.intake
        intake_time += len(taken) * measured.intake
        ages += [step + 1 - version for version, _ in taken]
        texts += PARTICLES * len(taken)
        for _, n in taken:
            if unread[n] == AHEAD:
                heapq.heappush(events, (now + source.choice(measured.task), n))
            unread[n] -= 1
    seconds = now - since
    able = count * PARTICLES / mean(measured.task) * 60
    of_network = count * measured.weights / LINK / (REFRESH * seconds / (steps - half))
    of_learner = intake_time / seconds
    needed = PARTICLES / (seconds / (steps - half)) * 60
    drawn = texts / seconds * 60
    binds = (
        "the samplers"
        if drawn < needed
        else "the network"
        if of_network > 1
        else "the learner's intake"
        if of_learner > 0.8 * ray_samplers.INTAKE
        else "the learner's step"
    )
    return [count, drawn, f"{drawn / able:.0%}", (steps - half) / seconds * 60, mean([float(a) for a in ages]), binds]


def plot(found: list[list[Any]], measured: Measured, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = [row[0] for row in found]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    left.loglog(counts, [row[1] for row in found], "o-", label="drawn")
    left.loglog(counts, [row[3] * PARTICLES for row in found], "--", label="replayed by the learner")
    left.set(xlabel="samplers", ylabel="texts a minute")
    left.legend(loc="upper left")
    middle.semilogx(counts, [row[3] for row in found], "o-")
    middle.set(xlabel="samplers", ylabel="learner steps a minute", ylim=(0, None))
    right.semilogx(counts, [row[4] for row in found], "o-")
    right.set(xlabel="samplers", ylabel="age of a draw when it arrives, steps", ylim=(0, None))
    figure.savefig(path, dpi=110)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
