"""Arithmetic with a calculator: a guide, and EM, against supervised learning, prompting and reward maximisation.

    python benchmarks/arithmetic.py ../shared/data/gfn/arithmetic_with_tool --out arithmetic.jsonl

Learns from 50 questions of three and four numbers, of which ``--traces`` are worked, and tests on questions of three,
four and five that are not among them. A line of ``--out`` is written for each method and seed, and what is there
already is not run again. About two hours on one core.

- *zero-shot*, *2-shot*: the language model as it is.
- *supervised*: LoRA on the correct traces.
- *guide*: starts on the same traces, then VarGrad on its own draws; not told the answer. Its program is the 2-shot one.
- *guide + EM*: the supervised program goes on by EM; the guide is told the answer, the program answers.
- *reward*: a stand-in for reward maximisation: the supervised program's texts, by ``LeaveOneOutELBO`` on the target at
  temperature 0.1.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from measure import keep, machine, nothing, records, table
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

from llmppl import LM, fit
from llmppl.guides import AutoregressiveGuide
from llmppl.models import arithmetic, calculate
from llmppl.objectives import LeaveOneOutELBO, TrajectoryBalance, WakeSleep
from llmppl.programs.particles import compute_log_prob
from llmppl.programs.simulated_pair import SimulatedPair

Example = tuple[str, list[str], str]
SIZES = (3, 4, 5)
LAYERS = ["q_proj", "v_proj"]
SHOTS: list[Example] = [("2 + 3 - 1", ["2 + 3", "5 - 1"], "4"), ("7 - 5 - 6 + 9", ["7 - 5", "2 - 6", "-4 + 9"], "5")]
MAX_TOKENS = 8
METHODS = ("zero-shot", "2-shot", "supervised", "guide", "guide + EM", "reward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the three test files and the training file")
    parser.add_argument("--out", type=Path, default=Path("arithmetic.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--questions", type=int, default=50, help="of each size, in the test")
    parser.add_argument("--draws", type=int, default=4, help="for each of them")
    parser.add_argument("--traces", type=int, default=50, help="training questions whose correct trace is known")
    parser.add_argument("--steps", type=int, default=50, help="of the guide, EM and reward")
    options = parser.parse_args()
    if not options.folder.is_dir():
        print(f"skipped: no folder {options.folder}. It is that of the arithmetic data set.")
        return
    torch.set_num_threads(1)
    print(machine(), flush=True)
    lm = LM.from_pretrained("smollm2-135m")
    train, test = read(options.folder, options.questions)
    done = records(options.out)
    for seed in options.seeds:
        folder = options.out.with_suffix("") / f"{options.traces}-traces"
        bench = Bench(lm, train, test, options.traces, options.draws, options.steps, seed, folder)
        for method in options.methods:
            if (method, seed, options.traces) in {(r["method"], r["seed"], r["traces"]) for r in done}:
                continue
            if seed != options.seeds[0] and method in ("zero-shot", "2-shot"):
                continue
            pyro.set_rng_seed(seed)
            start = time.process_time()
            program, guide = bench.made(method)
            trained = time.process_time() - start
            record = {
                "method": method,
                "traces": options.traces,
                "seed": seed,
                "training": trained,
                **bench.tested(program, guide),
            }
            record["seconds"] = time.process_time() - start
            done.append(record)
            keep(options.out, record)
    print(summary(done))


def read(folder: Path, count: int) -> tuple[list[Example], dict[int, list[tuple[str, str]]]]:
    """Worked questions, and by size questions with answers that are none of them."""

    def question(row: dict[str, Any]) -> str:
        return str(row["str_query"]).removeprefix("Question: ").removesuffix(" = ? Answer:")

    rows = json.loads((folder / "1digit_34_op+-_train_50.json").read_text())
    train = [(question(r), [e.strip(" =") for e in r["str_rationale"].split(",")], str(r["num_sol"])) for r in rows]
    seen = {q for q, _, _ in train}
    test = {}
    for size in SIZES:
        rows = json.loads((folder / f"1digit_{size}_op+-_test.json").read_text())
        own = dict.fromkeys((question(r), str(r["num_sol"])) for r in rows)
        test[size] = [row for row in own if row[0] not in seen][:count]
    return train, test


def correct_way(question: str) -> list[str]:
    """The expressions of a question from left to right."""
    first, *rest = question.split()
    found = []
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        found.append(f"{first} {sign} {number}")
        first = calculate(found[-1])
    return found


def batched(program: Callable[..., Any]) -> Callable[..., Any]:
    """The program over questions with equally many numbers."""

    def rows(questions: list[str], answers: list[str] | None = None) -> Any:
        with pyro.plate("questions", len(questions), dim=-1):
            return program(questions, answers)

    return rows


class Bench:
    """One seed's methods, which share the supervised program."""

    def __init__(
        self,
        lm: LM,
        train: list[Example],
        test: dict[int, list[tuple[str, str]]],
        traces: int,
        draws: int,
        steps: int,
        seed: int,
        folder: Path,
    ) -> None:
        self.lm, self.train, self.test, self.draws, self.steps, self.seed = lm, train, test, draws, steps, seed
        self.folder = folder
        self.worked = train[:traces]
        folder.mkdir(parents=True, exist_ok=True)

    def groups(self, examples: list[Example], size: int = 4) -> Iterator[list[Example]]:
        for count in (2, 3):
            rows = [row for row in examples if len(row[1]) == count]
            for start in range(0, len(rows), size):
                yield rows[start : start + size]

    def traces(self, group: list[Example]) -> dict[str, Tensor]:
        return {
            f"expression_{n + 1}": self.lm.encode([f" {row[1][n]} =" for row in group]) for n in range(len(group[0][1]))
        }

    def data(self) -> list[tuple[list[str], list[str]]]:
        return [([row[0] for row in group], [row[2] for row in group]) for group in self.groups(self.train)]

    def made(self, method: str) -> tuple[Callable[..., Any], Any]:
        """The program that answers, and a guide where one draws the expressions."""
        lm = self.lm
        if method == "zero-shot":
            return batched(arithmetic(lm, max_tokens=MAX_TOKENS)), None
        if method == "2-shot":
            return batched(arithmetic(lm, SHOTS, max_tokens=MAX_TOKENS)), None
        if method == "supervised":
            return batched(arithmetic(self.supervised(), max_tokens=MAX_TOKENS)), None
        if method == "guide":
            program = batched(arithmetic(lm, SHOTS, max_tokens=MAX_TOKENS))
            guide = self.guide(program, told=False)
            self.fit(method, program, guide, TrajectoryBalance(8))
            return program, guide
        if method == "guide + EM":
            theta = self.supervised()
            program = batched(arithmetic(theta, max_tokens=MAX_TOKENS))
            theta.requires_grad_(False)
            guide = self.guide(program, told=True)
            theta.requires_grad_(True)
            self.fit(method, program, guide, TrajectoryBalance(8))
            return program, None
        program = batched(arithmetic(self.supervised(), max_tokens=MAX_TOKENS))
        guide = self.guide(program, told=False)
        self.fit(method, poutine.scale(program, scale=10.0), guide, LeaveOneOutELBO(8))
        return program, guide

    def supervised(self) -> LM:
        """The language model trained on the traces: EM without latents."""
        theta = self.lm.adapt(rank=8, seed=self.seed, target_modules=LAYERS)
        path = self.folder / f"supervised-{self.seed}.safetensors"
        if path.is_file():
            return theta.load(path)
        program = batched(arithmetic(theta, max_tokens=MAX_TOKENS))
        known = list(self.groups(self.worked))
        groups = {tuple(row[0] for row in group): self.traces(group) for group in known}
        data = [([row[0] for row in group], [row[2] for row in group]) for group in known]

        def complete(questions: list[str], answers: list[str]) -> None:
            with poutine.condition(data=groups[tuple(questions)]):
                program(questions, answers)

        history = fit(complete, nothing, data, Trace_ELBO(), 60, learning_rate=1e-3, seed=self.seed, progress=False)
        print(f"supervised: {history}", flush=True)
        theta.save(path)
        return theta

    def guide(self, program: Callable[..., Any], told: bool) -> AutoregressiveGuide:
        """A guide that has read the traces."""
        prompt = {f"expression_{n}": prompt_of(n, told) for n in range(1, max(SIZES))}
        guide = AutoregressiveGuide(program, self.lm, prompt=prompt, rank=8, seed=self.seed + 1, target_modules=LAYERS)
        pairs = [
            SimulatedPair.of(
                ([row[0] for row in group], [row[2] for row in group]),
                self.traces(group),
                {"answer": self.lm.encode([f" {row[2]}." for row in group])},
            )
            for group in self.groups(self.worked)
        ]
        frozen = batched(arithmetic(self.lm, max_tokens=MAX_TOKENS))
        history = fit(
            frozen, guide, pairs, WakeSleep(1, insomnia=0.0), 60, learning_rate=1e-3, seed=self.seed, progress=False
        )
        print(f"guide on the traces: {history}", flush=True)
        return guide

    def fit(self, method: str, program: Callable[..., Any], guide: AutoregressiveGuide, objective: Any) -> None:
        history = fit(
            program,
            guide,
            self.data(),
            objective,
            self.steps,
            learning_rate=3e-4,
            model_learning_rate=3e-4,
            seed=self.seed,
            folder=self.folder / f"{method.replace(' ', '')}-{self.seed}",
            checkpoint_every=10,
            resume=True,
            progress=False,
        )
        print(f"{method}: {history}", flush=True)

    @torch.no_grad()
    def tested(self, program: Callable[..., Any], guide: Any) -> dict[str, Any]:
        """Of each size: how many draws are right, how many questions by vote, and how many correct traces each has."""
        result: dict[str, Any] = {}
        ways: dict[bool, list[float]] = {True: [], False: []}
        for size, rows in self.test.items():
            right, voted, distinct, valid = [], [], [], []
            for start in range(0, len(rows), 25):
                part = rows[start : start + 25]
                answers, traces, log_p = self.drawn(program, guide, [q for q, _ in part])
                for n, (question, answer) in enumerate(part):
                    own = [column[n] for column in answers]
                    hits = [a == answer for a in own]
                    right.append(np.mean(hits))
                    voted.append(max(own, key=own.count) == answer)
                    correct = [traces[k][n] == correct_way(question) for k in range(self.draws)]
                    valid.append(np.mean(correct))
                    distinct.append(len({tuple(traces[k][n]) for k in range(self.draws) if hits[k]}))
                    for k in range(self.draws):
                        if hits[k]:
                            ways[correct[k]].append(float(log_p[k, n]))
            result[str(size)] = {
                "right": float(np.mean(right)),
                "error": float(np.std(right, ddof=1) / np.sqrt(len(right))),
                "voted": float(np.mean(voted)),
                "left to right": float(np.mean(valid)),
                "distinct": float(np.mean(distinct)),
            }
        result["ways"] = ways_apart(ways)
        return result

    def drawn(
        self, program: Callable[..., Any], guide: Any, questions: list[str]
    ) -> tuple[list[list[str]], list[list[list[str]]], Tensor]:
        """Answers, expressions and log p of the whole text, for each draw and question."""

        def particles(run: Callable[..., Any]) -> Callable[..., Any]:
            def vectorized(*args: Any) -> Any:
                with pyro.plate("draws", self.draws, dim=-2):
                    return run(*args)

            return vectorized

        model = particles(program)
        if guide is not None:
            proposed = poutine.trace(particles(guide)).get_trace(questions)
            proposed.remove_node("answer")  # which the program says
            model = poutine.replay(model, trace=proposed)
        trace = poutine.trace(model).get_trace(questions)
        compute_log_prob(trace)
        latents = [name for name in trace.nodes if name.startswith("expression_")]
        log_p = sum(trace.nodes[name]["log_prob"] for name in [*latents, "answer"])
        texts = {name: self.lm.decode(trace.nodes[name]["value"]) for name in [*latents, "answer"]}
        answers = [[text.strip().removesuffix(".").strip() for text in column] for column in texts["answer"]]
        traces = [
            [[texts[name][k][n].strip(" =") for name in latents] for n in range(len(questions))]
            for k in range(self.draws)
        ]
        return answers, traces, torch.as_tensor(log_p).expand(self.draws, len(questions))


def prompt_of(step: int, told: bool, shots: bool = False) -> Callable[..., list[Any]]:
    """What a guide is told before an expression: the question, the answer where it may, and what came before; behind
    the worked examples where it is to be."""
    names = [f"{kind}_{n}" for n in range(1, step) for kind in ("expression", "result")]
    asked = ["questions", *(["answer"] if told else []), *names]
    shown = "".join(
        f"Question: {question} = {answer + '.' if told else '?'}\nAnswer:"
        + "".join(f" {expression} = {calculate(expression)}," for expression in expressions)
        + f" the answer is {answer}.\n\n"
        for question, expressions, answer in SHOTS * shots
    )

    def pieces(**values: Any) -> list[Any]:
        goal = [" =", values["answer"], "\nAnswer:"] if told else [" = ?\nAnswer:"]
        return [shown + "Question: ", values["questions"], *goal, *(values[name] for name in names)]

    return with_parameters(pieces, asked)


def with_parameters(function: Callable[..., list[Any]], names: list[str]) -> Callable[..., list[Any]]:
    """Guides ask for a prompt's parameters by name."""
    import inspect

    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD

    def named(*args: Any, **values: Any) -> list[Any]:
        return function(**dict(zip(names, args, strict=False)), **values)

    named.__signature__ = inspect.Signature([inspect.Parameter(n, keyword) for n in names])  # type: ignore[attr-defined]
    return named


def ways_apart(ways: dict[bool, list[float]]) -> dict[str, float]:
    """How well log p of the text tells right answers by the right way from those by another: the share of pairs that it
    orders so."""
    right, wrong = np.array(ways[True]), np.array(ways[False])
    if not len(right) or not len(wrong):
        return {"right way": len(right), "other way": len(wrong), "ordered": float("nan")}
    ordered = (right[:, None] > wrong[None]).mean() + 0.5 * (right[:, None] == wrong[None]).mean()
    return {
        "right way": len(right),
        "other way": len(wrong),
        "ordered": float(ordered),
        "mean right": float(right.mean()),
        "mean other": float(wrong.mean()),
    }


def summary(done: list[dict[str, Any]]) -> str:
    rows = []
    for traces, method in sorted({(r["traces"], METHODS.index(r["method"])) for r in done}):
        own = [r for r in done if (r["traces"], r["method"]) == (traces, METHODS[method])]
        cells: list[object] = [METHODS[method], traces if method > 1 else "", len(own)]
        for size in map(str, SIZES):
            values = [100 * record[size]["right"] for record in own]
            error = 100 * float(np.mean([record[size]["error"] for record in own]))
            spread = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
            cells.append(f"{np.mean(values):.1f} ± {max(error, spread):.1f}")
        cells += [f"{np.mean([record[s]['distinct'] for record in own]):.2f}" for s in map(str, SIZES)]
        cells.append(f"{np.mean([record['training'] for record in own]):.0f}")
        rows.append(cells)
    header = ["method", "traces", "seeds", *(f"{s} numbers, % right" for s in SIZES)]
    return table([*header, *(f"distinct, {s}" for s in SIZES), "training, CPU s"], rows)


if __name__ == "__main__":
    main()
