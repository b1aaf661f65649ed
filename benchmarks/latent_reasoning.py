"""Ten papers, one program: z ~ p(z|x), y ~ p(y|x, z), learned in their ways where everything can be enumerated.

    python benchmarks/latent_reasoning.py

A tiny language model with random weights writes a rationale of at most two tokens and chooses one of two labels. 48
labelled texts to learn from, 32 held out, labels drawn from another program of the kind. Every method has the same
number of steps, particles and parameters; each is run with three learning rates, and the one is shown that does best on
12 of the 48 texts, kept for that. For each it says what it reaches, by enumeration: log p(y|x) of who answers, beside
it learning by the exact gradient of the enumerated evidence, and how far what draws the rationales ends from the
posterior of its own program, KL both ways and total variation. A line of ``--out`` is written for each method and seed,
and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from measure import keep, machine, records, table
from pyro import poutine
from torch import Tensor

from llmppl import LM, Behaviour, exact_posterior, fit
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.models import rationale
from llmppl.objectives import ChainScore, LeaveOneOutELBO, ParticleObjective, SubTrajectoryBalance, WakeSleep
from llmppl.programs.particles import log_prior
from llmppl.testing import tiny_lm

OPTIONS = ["a", "c"]
FORM: dict[str, Any] = {"options": OPTIONS, "before": "e", "between": "d", "max_tokens": 2, "stop": "."}
TEXTS = [a + b + c for a in "abcde" for b in "abcde" for c in "abcde"]
TOLD: dict[str, Callable[..., list[Any]]] = {"rationale": lambda text, label: [text, label, FORM["before"]]}
UNTOLD: dict[str, Callable[..., list[Any]]] = {"rationale": lambda text: [text, FORM["before"]]}
RATES = (0.003, 0.01, 0.03)
Row = tuple[str, str]


class Task:
    """A program that learns, its data, and how a method trains.

    :param learns: whether the program does; else it stays the language model's own.
    """

    def __init__(self, rows: list[Row], steps: int, rate: float, particles: int, seed: int, learns: bool) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        self.lm = tiny_lm(seed=0)
        self.theta = self.lm.adapt(rank=4, seed=seed) if learns else self.lm
        self.program = rationale(self.theta, **FORM)
        self.rows, self.steps, self.rate, self.particles, self.seed = rows, steps, rate, particles, seed

    def guide(self, told: bool, rank: int = 4) -> AutoregressiveGuide:
        return AutoregressiveGuide(self.program, self.lm, TOLD if told else UNTOLD, rank=rank, seed=self.seed)

    def prompt(self, told: bool) -> PromptGuide:
        return PromptGuide(self.program, self.lm, TOLD if told else UNTOLD)

    def fit(self, guide: Any, objective: Any, share: float = 1.0) -> None:
        fit(self.program, guide, self.rows, objective, round(share * self.steps), 6, vectorize_data=True,
            learning_rate=self.rate, schedule="cosine", seed=self.seed, progress=False)  # fmt: skip


# --- the methods: who draws z and what it is told, the guide's loss, the program's loss; what draws z in the end ------


class KeptWhereRight(ParticleObjective):
    """−log p(z, y) of draws, each kept with probability p(y|x, z): where the label that follows is right."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        particles = self._particles(model, guide, args, kwargs)
        kept = (particles.log_p - log_prior(particles)).detach().exp()
        return -(kept * particles.log_p).mean(0).sum()


def rejection_fine_tuning(task: Task) -> Any:
    """Rationales of the prior, kept where the label that follows is right."""
    task.fit(task.prompt(told=False), KeptWhereRight(task.particles))
    return None


def self_taught(task: Task) -> Any:
    """STaR, prompt posterior sampling: a prompt that is told y draws, and its draws are taken as they are."""
    prompt = task.prompt(told=True)
    task.fit(prompt, LeaveOneOutELBO(task.particles))  # nothing of the prompt learns: the program's log p(z, y)
    return prompt


def trice(task: Task) -> Any:
    """Markov chains with proposals of the prior."""
    task.fit(task.prompt(told=False), ChainScore(task.particles))
    return None


def jepo(task: Task) -> Any:
    """The evidence's lower bound of several draws of the prior: wake-θ with the prior in the guide's place."""
    task.fit(task.prompt(told=False), WakeSleep(task.particles, insomnia=1.0, behaviour=Behaviour(prior=1.0)))
    return None


def ravr(task: Task) -> Any:
    """One ELBO for both, the guide told y."""
    guide = task.guide(told=True)
    task.fit(guide, LeaveOneOutELBO(task.particles))
    return guide


def variational_reasoning(task: Task) -> Any:
    """The guide by forward KL on the prior's draws, weighed by whether they are right; the program by its weights."""
    guide = task.guide(told=True)
    of_prior = WakeSleep(task.particles, insomnia=1.0, behaviour=Behaviour(prior=1.0))
    for _ in range(5):
        task.fit(guide, of_prior, 0.1)
        task.fit(guide, WakeSleep(task.particles, insomnia=1.0), 0.1)
    return guide


def gflownet(task: Task) -> Any:
    """Hu et al.: subtrajectory balance, the guide not told y, the program as it is."""
    guide = task.guide(told=False)
    task.fit(guide, SubTrajectoryBalance(task.particles))
    return guide


def lacot(task: Task) -> Any:
    """The same over every second prefix, exactly."""
    guide = task.guide(told=False)
    task.fit(guide, SubTrajectoryBalance(task.particles, every=2))
    return guide


class LengthDivided(ParticleObjective):
    """FlowRL: trajectory balance whose log-ratio is divided by the length, with a log-partition for each text."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        particles = self._particles(model, guide, args, kwargs)
        sites = particles.guide_trace.nodes
        lengths = sum((sites[n]["value"] >= 0).sum(-1) for n in sites if n.startswith(("rationale", "expression")))
        prior = log_prior(particles).detach()
        residual = (particles.log_q - prior) / lengths - (particles.log_p.detach() - prior)
        return residual.var(0).sum()  # the best log-partition of each text


def flow_rl(task: Task) -> Any:
    """A policy that is not told y; the reward is log p(y|x, z)."""
    guide = task.guide(told=False)
    task.fit(guide, LengthDivided(task.particles))
    return guide


class GroupReward(ParticleObjective):
    """GRPO: the reward p(y|x, z) of a group's texts, centred and scaled."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        particles = self._particles(model, guide, args, kwargs)
        reward = (particles.log_p - log_prior(particles)).detach().exp()
        advantage = (reward - reward.mean(0)) / (reward.std(0) + 1e-4)
        return -(advantage * particles.log_q).mean(0).sum()


def grpo(task: Task) -> Any:
    """A policy that is not told y, for the expected reward."""
    guide = task.guide(told=False)
    task.fit(guide, GroupReward(task.particles))
    return guide


def ours(task: Task) -> Any:
    """A guide that is told y: forward KL on defensive, weighed draws, wake-θ with the same weights."""
    guide = task.guide(told=True)
    task.fit(guide, WakeSleep(task.particles, insomnia=1.0, behaviour=Behaviour(prior=0.25)))
    return guide


def exact_gradient(task: Task) -> Any:
    """Of the enumerated log p(y|x)."""
    exact, optimizer = Exact(task.lm, task.program), torch.optim.AdamW(task.theta.parameters(), lr=task.rate)
    for step in range(task.steps):
        optimizer.zero_grad()
        (-exact.log_evidence([task.rows[(6 * step + n) % len(task.rows)] for n in range(6)])).backward()
        optimizer.step()
    return None


METHODS: dict[str, tuple[Callable[[Task], Any], str]] = {
    "exact gradient": (exact_gradient, "program"),
    "rejection fine-tuning": (rejection_fine_tuning, "program"),
    "STaR, prompt": (self_taught, "program"),
    "TRICE": (trice, "program"),
    "JEPO": (jepo, "program"),
    "RAVR": (ravr, "program"),
    "variational reasoning": (variational_reasoning, "program"),
    "Hu et al.": (gflownet, "guide"),
    "LaCoT": (lacot, "guide"),
    "FlowRL": (flow_rl, "guide"),
    "GRPO": (grpo, "guide"),
    "ours": (ours, "program"),
}
"""With who answers: the program, or the guide and then the program. (LaCoT's own answer is the one of the largest
evidence, ``llmppl.answer``; of a program that does not learn it is the language model's.)"""


# --- by enumeration ----------------------------------------------------------------------------------------------


class Exact:
    """What a program says of rows, of every rationale."""

    def __init__(self, theta: LM, program: Any) -> None:
        self.texts = theta("a" + FORM["before"], max_tokens=2, stop=".").enumerate_support()
        self.program = program

    def trace(self, program: Any, rows: list[Row]) -> poutine.Trace:
        """The program, or what draws, at every rationale ``(T,)`` of every row ``(R,)``."""
        columns = [list(column) for column in zip(*rows, strict=True)]
        values = self.texts[:, None].expand(-1, len(rows), -1)

        def at_each() -> None:
            with pyro.plate("rationales", len(values), dim=-2), pyro.plate("rows", len(rows), dim=-1):
                poutine.condition(program, {"rationale": values})(*columns)

        trace = poutine.trace(at_each).get_trace()
        trace.compute_log_prob()
        return trace

    def log_joint(self, rows: list[Row]) -> Tensor:
        """log p(z, y | x), ``(T, R)``, with gradients."""
        nodes = self.trace(self.program, rows).nodes
        return nodes["rationale"]["log_prob"] + nodes["label"]["log_prob"]

    def log_evidence(self, rows: list[Row]) -> Tensor:
        return self.log_joint(rows).logsumexp(0).mean()

    def distances(self, drawer: Any, rows: list[Row]) -> list[float]:
        """KL(q‖p), KL(p‖q) and total variation of what draws rationales from the posterior, means over rows."""
        log_p, log_q = self.log_joint(rows).log_softmax(0), self.law(drawer, rows)
        backward, forward = ((a.exp() * (a - b)).sum(0) for a, b in ((log_q, log_p), (log_p, log_q)))
        return [float(x.mean()) for x in (backward, forward, (log_q.exp() - log_p.exp()).abs().sum(0) / 2)]

    def law(self, drawer: Any, rows: list[Row]) -> Tensor:
        """log q(z | row); without a guide it is the program's prior."""
        return self.trace(drawer or self.program, rows).nodes["rationale"]["log_prob"]

    def answers(self, drawer: Any, rows: list[Row]) -> Tensor:
        """Mean of log Σ q(z|x) p(y|x, z)."""
        likelihood = self.log_joint(rows) - self.law(None, rows)
        return (self.law(drawer, rows) + likelihood).logsumexp(0).mean()


def data(seed: int) -> tuple[list[Row], list[Row]]:
    """Labels drawn from another program: 48 rows to learn from, 32 held out."""
    pyro.set_rng_seed(100 + seed)
    teacher = rationale(tiny_lm(seed=1), **FORM)
    rows = []
    for n in torch.randperm(len(TEXTS))[:80].tolist():
        evidence = torch.tensor([float(exact_posterior(teacher)(TEXTS[n], label).log_evidence) for label in OPTIONS])
        rows.append((TEXTS[n], OPTIONS[int(torch.distributions.Categorical(logits=evidence).sample())]))
    return rows[:48], rows[48:]


def run(name: str, rows: list[Row], held: list[Row], options: Any, seed: int) -> dict[str, Any]:
    """With the learning rate that is best on twelve of the rows, then on all."""
    method, answers = METHODS[name]

    def trained(own: list[Row], rate: float) -> tuple[Task, Any]:
        task = Task(own, options.steps, rate, options.particles, seed, answers == "program")
        return task, method(task)

    def value(task: Task, drawer: Any, at: list[Row]) -> float:
        with torch.no_grad():
            exact = Exact(task.lm, task.program)
            return float(exact.log_evidence(at) if answers == "program" else exact.answers(drawer, at))

    scores = {rate: value(*trained(rows[12:], rate), rows[:12]) for rate in RATES}
    rate = max(scores, key=lambda own: scores[own])
    start = time.process_time()
    task, drawer = trained(rows, rate)
    seconds = time.process_time() - start
    with torch.no_grad():
        distances = Exact(task.lm, task.program).distances(drawer, rows)
    found = {"train": value(task, drawer, rows), "held out": value(task, drawer, held), "rate": rate}
    return {**found, "distances": distances, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("latent_reasoning.jsonl"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--particles", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    done = {(record["method"], record["seed"]) for record in records(options.out)}
    for seed in options.seeds:
        rows, held = data(seed)
        for name in ("language model", *options.methods):
            if (name, seed) in done:
                continue
            if name == "language model":
                task = Task(rows, 0, 0.0, 1, seed, learns=False)
                with torch.no_grad():
                    exact = Exact(task.lm, task.program)
                    found = {"train": float(exact.log_evidence(rows)), "held out": float(exact.log_evidence(held))}
                    found["distances"] = exact.distances(None, rows)
            else:
                found = run(name, rows, held, options, seed)
            keep(options.out, {"method": name, "seed": seed, **found})
    print(summary(records(options.out)))


def summary(found: list[dict[str, Any]]) -> str:
    lines = []
    for name in ("language model", *METHODS):
        own = [record for record in found if record["method"] == name]
        if not own:
            continue

        def mean(column: Callable[[dict[str, Any]], float], own: list[dict[str, Any]] = own) -> str:
            values = torch.tensor([column(record) for record in own])
            error = f" ± {float(values.std() / len(values) ** 0.5):.2f}" if len(values) > 1 else ""
            return f"{float(values.mean()):.3f}{error}"

        far = [mean(lambda r, n=n: r["distances"][n]) if "distances" in own[0] else "" for n in range(3)]
        seconds = mean(lambda r: r["seconds"]) if "seconds" in own[0] else ""
        lines.append([name, mean(lambda r: r["train"]), mean(lambda r: r["held out"]), *far, seconds])
    heads = ["method", "log p(y|x), train", "held out", "KL(q‖p)", "KL(p‖q)", "TV", "CPU s"]
    return table(heads, lines)


if __name__ == "__main__":
    main()
