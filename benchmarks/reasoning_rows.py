"""Ten papers on a real model: the rows of ``latent_reasoning.py``, each for the same CPU time, on two tasks.

    python benchmarks/reasoning_rows.py ../shared/data/gfn --minutes 30 --seeds 0 1 2

SmolLM2-135M-Instruct. *subj*: a rationale of at most four tokens, then the label of a sentence, 20 of them to learn
from. *arithmetic*: 50 questions of three and four numbers with their answers and no worked ones, behind two examples;
the texts are the expressions that a calculator reads. The methods are those of ``latent_reasoning.py``; where states
of prefixes are asked for and a tool reads the text, trajectory balance stands in. Learning rates are one for all
methods of a task. Each row trains for so many CPU minutes of one thread and is then tested on questions that are not
among them: accuracy by several rationales of who answers, expected calibration error, log p(answer) by them, distinct
right rationales, and the effective sample size of what draws rationales, told what it is told. A line of ``--out`` is
written for each row, and what is there already is not run again.

With ``--traces 6`` the program of *arithmetic* has first learned six worked questions, the same for all rows and in no
row's time, and stands without examples; guides read those six before they train, in their row's time. The test has
questions of five numbers, too.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arithmetic as calculator
import numpy as np
import pyro
import reasoning
import torch
from latent_reasoning import METHODS
from measure import calibration_error, keep, machine, records, table
from pyro import poutine
from torch import Tensor

from llmppl import LM, fit, importance
from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.inference.gathering import NoWeightError
from llmppl.models import arithmetic, rationale
from llmppl.objectives import SubTrajectoryBalance, TrajectoryBalance

ROWS = [name for name in METHODS if name != "exact gradient"]
UNTRAINED = "language model"
LAYERS = ["q_proj", "v_proj"]
Prompts = dict[str, Callable[..., list[Any]]]


class Spent(Exception):
    """The CPU time of a row."""


class Task:
    """A program on a real model, and how a method trains for so many CPU minutes.

    :param learns: whether the program does; else it stays the language model's own.
    """

    told: Prompts
    untold: Prompts
    rate: float
    model_rate: float

    def __init__(self, lm: LM, minutes: float, particles: int, seed: int, learns: bool) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        self.lm, self.seconds, self.particles, self.seed = lm, 60 * minutes, particles, seed
        self.before = self.begun()
        self.theta = self.learner() if learns else self.before
        self.program = self.made(self.theta)
        self.steps = 0

    def begun(self) -> LM:
        """What the program was before it learns here; a prompt draws from it."""
        return self.lm

    def learner(self) -> LM:
        """The same, to learn."""
        return self.lm.adapt(rank=8, seed=self.seed)

    def made(self, theta: LM) -> Callable[..., Any]:
        raise NotImplementedError

    def batches(self) -> list[tuple[list[str], list[str]]]:
        raise NotImplementedError

    def guide(self, told: bool) -> AutoregressiveGuide:
        prompts = self.told if told else self.untold
        return AutoregressiveGuide(self.program, self.lm, prompts, rank=8, seed=self.seed + 1, target_modules=LAYERS)

    def prompt(self, told: bool) -> PromptGuide:
        return PromptGuide(self.program, self.before, self.told if told else self.untold)

    def fit(self, guide: Any, objective: Any, share: float = 1.0) -> None:
        if isinstance(objective, SubTrajectoryBalance) and len(self.untold) > 1:
            objective = TrajectoryBalance(self.particles)
        start, most = time.process_time(), share * self.seconds

        def spent(step: int, history: Any) -> None:
            self.steps += 1
            if time.process_time() - start > most:
                raise Spent

        rates = {"learning_rate": self.rate, "model_learning_rate": self.model_rate}
        with contextlib.suppress(Spent):
            fit(self.program, guide, self.batches(), objective, 100_000, seed=self.seed + self.steps, callback=spent,
                progress=False, **rates)  # fmt: skip


class Subjective(Task):
    """SUBJ with 20 labels."""

    told: Prompts = {"rationale": lambda text, label: [text, "\nThis is ", label, reasoning.BEFORE]}
    untold: Prompts = {"rationale": lambda text: [text, reasoning.BEFORE]}
    rate, model_rate = 3e-4, 1e-3

    def __init__(self, folder: Path, *args: Any) -> None:
        self.train = reasoning.read(folder / "subj" / "train.20.jsonl")
        test = reasoning.read(folder / "subj" / "test.jsonl")
        random.Random(0).shuffle(test)
        self.tests = test
        super().__init__(*args)

    def made(self, theta: LM) -> Callable[..., Any]:
        program = rationale(theta, reasoning.OPTIONS, **reasoning.FORM)

        def rows(text: list[str], label: Any = None) -> Any:
            with pyro.plate("rows", len(text), dim=-1):
                return program(text, label)

        return rows

    def batches(self) -> list[tuple[list[str], list[str]]]:
        return [in_columns(self.train[n : n + 5]) for n in range(0, len(self.train), 5)]

    def tested(self, count: int) -> list[tuple[list[str], list[str]]]:
        return [in_columns(self.tests[n : n + 20]) for n in range(0, count, 20)]

    def answers(self, drawer: Any, texts: list[str], labels: list[str], draws: int) -> dict[str, np.ndarray]:
        """Of each row: the chosen label's probability and whether it is right, log p(label), distinct right texts."""
        values = latents(drawer or self.program, (texts,), draws, len(texts))
        logs = torch.stack([
            likelihood(self.program, values, (texts, [option.strip()] * len(texts)), draws, "label")
            for option in reasoning.OPTIONS
        ], -1)  # fmt: skip
        mean = logs.double().logsumexp(0) - np.log(draws)
        mean = mean - mean.logsumexp(-1, keepdim=True)
        truth = torch.tensor([[o.strip() for o in reasoning.OPTIONS].index(label) for label in labels])
        at = torch.arange(len(texts))
        written = self.lm.decode(values["rationale"].flatten(0, 1))
        right = logs.argmax(-1) == truth
        distinct = [len({written[k * len(texts) + n] for k in range(draws) if right[k, n]}) for n in range(len(texts))]
        return {
            "confidence": mean.max(-1).values.exp().numpy(),
            "right": (mean.argmax(-1) == truth).double().numpy(),
            "log p": mean[at, truth].numpy(),
            "distinct": np.array(distinct, dtype=float),
        }


class Calculation(Task):
    """Arithmetic with a calculator, of three and four numbers, behind two worked examples or after learning some.

    :param traces: how many worked questions the program has learned; it then has no examples.
    """

    rate, model_rate = 3e-4, 3e-4

    def __init__(self, folder: Path, traces: int, kept: Path, *args: Any) -> None:
        self.worked, self.tests = calculator.read(folder / "arithmetic_with_tool", 200)
        self.train = [(question, answer) for question, _, answer in self.worked]
        self.traces, self.kept = traces, kept
        self.sizes = calculator.SIZES if traces else (3, 4)
        self.untold, self.told = (
            {f"expression_{n}": calculator.prompt_of(n, told, shots=not traces) for n in range(1, self.sizes[-1])}
            for told in (False, True)
        )
        super().__init__(*args)

    def begun(self) -> LM:
        if not self.traces:
            return self.lm
        bench = calculator.Bench(self.lm, self.worked, self.tests, self.traces, 0, 0, self.seed, self.kept)
        self.bench, begun = bench, bench.supervised()
        begun.requires_grad_(False)
        return begun

    def learner(self) -> LM:
        if not self.traces:
            return super().learner()
        return self.bench.supervised()

    def made(self, theta: LM) -> Callable[..., Any]:
        shots = [] if self.traces else calculator.SHOTS
        return calculator.batched(arithmetic(theta, shots, max_tokens=calculator.MAX_TOKENS))

    def guide(self, told: bool) -> AutoregressiveGuide:
        if not self.traces:
            return super().guide(told)
        start = time.process_time()
        self.theta.requires_grad_(False)
        guide = self.bench.guide(self.program, told)
        self.theta.requires_grad_(self.theta is not self.before)
        self.seconds -= time.process_time() - start
        return guide

    def batches(self) -> list[tuple[list[str], list[str]]]:
        sizes = [[row for row in self.train if len(row[0].split()) == 2 * size - 1] for size in (3, 4)]
        return [in_columns(rows[n : n + 4]) for rows in sizes for n in range(0, len(rows), 4)]

    def tested(self, count: int) -> list[tuple[list[str], list[str]]]:
        own = count // len(self.sizes)
        return [in_columns(self.tests[size][n : min(n + 10, own)]) for size in self.sizes for n in range(0, own, 10)]

    def answers(self, drawer: Any, questions: list[str], truth: list[str], draws: int) -> dict[str, np.ndarray]:
        """Of each row: the most frequent answer's share and whether it is right, log p(answer), distinct right ways."""
        values = latents(drawer or self.program, (questions,), draws, len(questions))
        logs = likelihood(self.program, values, (questions, truth), draws, "answer")
        if drawer is None:
            said = values.pop("answer")
        else:  # the program answers behind what the guide has drawn
            values.pop("answer", None)
            said = latents(poutine.condition(self.program, values), (questions,), draws, len(questions))["answer"]
        answers = [text.strip().removesuffix(".").strip() for text in self.lm.decode(said.flatten(0, 1))]
        written = [self.lm.decode(value.flatten(0, 1)) for value in values.values()]
        found: dict[str, list[float]] = {"confidence": [], "right": [], "distinct": [], "each": [], "numbers": []}
        for n, true in enumerate(truth):
            own = answers[n :: len(truth)]
            best = max(dict.fromkeys(own), key=own.count)
            found["confidence"].append(own.count(best) / draws)
            found["right"].append(best == true)
            found["each"].append(own.count(true) / draws)
            found["numbers"].append((len(questions[n].split()) + 1) // 2)
            ways = zip(*(texts[n :: len(truth)] for texts in written), strict=True)
            found["distinct"].append(len({way for way, answer in zip(ways, own, strict=True) if answer == true}))
        return {k: np.array(v, dtype=float) for k, v in found.items()} | {
            "log p": (logs.double().logsumexp(0) - np.log(draws)).numpy()
        }


TASKS: dict[str, type[Any]] = {"subj": Subjective, "arithmetic": Calculation}


def in_columns(rows: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [text for text, _ in rows], [answer for _, answer in rows]


def in_draws(run: Callable[..., Any], count: int) -> Callable[..., Any]:
    def vectorized(*args: Any) -> Any:
        with pyro.plate("draws", count, dim=-2):
            return run(*args)

    return vectorized


@torch.no_grad()
def latents(run: Any, args: tuple[Any, ...], count: int, rows: int) -> dict[str, Tensor]:
    """All texts that are drawn, ``(count, rows, T)`` each."""
    trace = poutine.trace(in_draws(run, count)).get_trace(*args)
    drawn = {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and isinstance(site["fn"], ConditionedText)
    }
    return {name: value.expand(count, rows, value.shape[-1]) for name, value in drawn.items()}


@torch.no_grad()
def likelihood(program: Any, values: dict[str, Tensor], args: tuple[Any, ...], count: int, site: str) -> Tensor:
    """log p of what is observed given what was drawn, ``(count, rows)``."""
    given = {name: value for name, value in values.items() if name != site}
    trace = poutine.trace(in_draws(poutine.condition(program, given), count)).get_trace(*args)
    node = trace.nodes[site]
    return node["fn"].log_prob(node["value"]).expand(count, -1)


def tested(task: Any, drawer: Any, told: Any, rows: int, draws: int) -> dict[str, float]:
    """Of who answers, and of what draws rationales for the posterior."""
    parts, ess, gaps = [], [], []
    for questions, truth in task.tested(rows):
        parts.append(task.answers(drawer, questions, truth, draws))
        try:
            posterior = importance(task.program, told, draws, progress=False)(questions, truth)
        except NoWeightError as error:
            posterior = error.posterior
        ess.extend(np.atleast_1d(posterior.ess) / draws)
        gaps.extend(np.atleast_1d(posterior.log_evidence) - np.atleast_1d(posterior.elbo))
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    numbers = found.pop("numbers", np.zeros(0))
    result = {name: float(value.mean()) for name, value in found.items()}
    for size in dict.fromkeys(numbers):
        result[f"right of {size:.0f}"] = float(found["right"][numbers == size].mean())
    result |= {f"{name}, error": float(value.std(ddof=1) / len(value) ** 0.5) for name, value in found.items()}
    return result | {
        "ECE": calibration_error(found["confidence"], found["right"]),
        "relative ESS": float(np.mean(ess)),
        "gap": float(np.mean(gaps)),
    }


def run(name: str, task_name: str, lm: LM, options: Any, seed: int) -> dict[str, Any]:
    method, answers = (None, "program") if name == UNTRAINED else METHODS[name]
    own = (options.traces, options.out.with_suffix("")) if task_name == "arithmetic" else ()
    learns = method is not None and answers == "program"
    task = TASKS[task_name](options.folder, *own, lm, options.minutes, options.particles, seed, learns)
    start = time.process_time()
    drawer = method(task) if method else None
    trained, steps = time.process_time() - start, task.steps
    pyro.set_rng_seed(1000 + seed)
    told = drawer or task.prompt(told=False)
    with torch.no_grad():
        found = tested(task, drawer if answers == "guide" else None, told, options.rows, options.draws)
    return {"training": trained, "steps": steps, **found, "seconds": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with subj/ and arithmetic_with_tool/")
    parser.add_argument("--out", type=Path, default=Path("reasoning_rows.jsonl"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=[UNTRAINED, *ROWS], default=[UNTRAINED, *ROWS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=30, help="of CPU time for each row's training")
    parser.add_argument("--traces", type=int, default=0, help="worked questions that arithmetic starts from")
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--rows", type=int, default=100, help="tested, of each task")
    parser.add_argument("--draws", type=int, default=8, help="for each of them")
    options = parser.parse_args()
    if not options.folder.is_dir():
        print(f"skipped: no folder {options.folder}. It is that of the data sets of the GFlowNet paper.")
        return
    torch.set_num_threads(1)
    print(machine(), flush=True)
    lm = LM.from_pretrained("smollm2-135m")

    def setting(r: dict[str, Any]) -> tuple[Any, ...]:
        return r["task"], r["method"], r["seed"], r["minutes"], r.get("traces", 0)

    done = {setting(r) for r in records(options.out)}
    for seed in options.seeds:
        for task in options.tasks:
            for name in options.methods:
                row = {"task": task, "method": name, "seed": seed, "minutes": options.minutes, "traces": options.traces}
                if setting(row) not in done:
                    keep(options.out, {**row, **run(name, task, lm, options, seed)})
    print(summary(records(options.out)))


def summary(found: list[dict[str, Any]]) -> str:
    lines = []
    for task in TASKS:
        for name in (UNTRAINED, *ROWS):
            own = [r for r in found if (r["task"], r["method"]) == (task, name)]
            if not own:
                continue

            def mean(key: str, scale: float = 1.0, own: list[dict[str, Any]] = own) -> float:
                return scale * float(np.mean([r[key] for r in own]))

            right = [r["right"] for r in own]
            spread = np.std(right, ddof=1) / len(own) ** 0.5 if len(own) > 1 else 0.0
            error = 100 * max(float(spread), mean("right, error"))
            lines.append([
                task, name, len(own), f"{mean('right', 100):.1f} ± {error:.1f}", f"{mean('ECE', 100):.1f}",
                f"{mean('log p'):.2f} ± {mean('log p, error'):.2f}", f"{mean('distinct'):.2f}",
                f"{mean('relative ESS'):.2f}", f"{mean('gap'):.2f}", f"{mean('steps'):.0f}", f"{mean('training'):.0f}",
            ])  # fmt: skip
    heads = ["task", "method", "seeds", "% right", "ECE, %", "log p(y\\|x)", "distinct right", "relative ESS",
             "log Ẑ − ELBO", "steps", "training, CPU s"]  # fmt: skip
    return table(heads, lines)


if __name__ == "__main__":
    main()
