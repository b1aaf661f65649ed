"""Labels with rationales on SUBJ: a guide, and EM, against prompting, supervised learning and reward maximisation.

    python benchmarks/reasoning.py ../shared/data/gfn/subj --out reasoning.jsonl

Learns from 10, 20 and 50 labelled sentences and tests on a random 200 of the test set, the same for all. A line of
``--out`` is written for each method, number of labels and seed, and what is there already is not run again. About two
hours on one core.

- *zero-shot*, *4-shot*: the label after the sentence; *with rationales*: the program as it is, averaged over them.
- *supervised*: LoRA on the label alone.
- *supervised on rationales*: LoRA on rationales drawn from the prior and weighed by the label, as self-taught
  reasoners do.
- *reward*: a stand-in for reward maximisation: ``LeaveOneOutELBO`` on the target at temperature 0.1.
- *GRPO*: reward maximisation by trl, the reward being the probability of the right label; only with ``--trl-python``,
  of an environment that has trl beside transformers and peft.
- *guide*: VarGrad on the frozen program, not told the label; predictions averaged over its rationales.
- *guide + EM*: the program learns, the guide is told the label; predictions averaged over the program's own rationales.

Every method is also scored after contextual calibration (Zhao et al. 2021), which divides by what it says of sentences
without content, and after batch calibration (Zhou et al. 2024, arXiv:2309.17249), which divides by the geometric mean
of what it says of the test sentences, without their labels: as many of either label are then expected.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from measure import keep, machine, nothing, records, table
from pyro import poutine
from pyro.infer import Trace_ELBO

from llmppl import LM, fit, importance, predict
from llmppl.files.packaged_model import packaged_folder
from llmppl.guides import GFlowNetGuide, PromptGuide
from llmppl.models import rationale
from llmppl.objectives import LeaveOneOutELBO, TrajectoryBalance

Row = tuple[str, str]
OPTIONS = [" objective", " subjective"]
EMPTY = ["N/A", "some text", "[...]"]
"""Sentences without content."""

BEFORE, BETWEEN = "\nThe text is", ", so it is"
FORM: dict[str, Any] = {"before": BEFORE, "between": BETWEEN, "stop": [".", ","], "max_tokens": 4}
EXAMPLES = [
    ("the film never finds its footing and wastes a fine cast .", " somebody's opinion,", "subjective"),
    ("two sisters inherit a farm and must decide whether to sell it .", " part of a story,", "objective"),
    ("a warm , funny and surprisingly wise little picture .", " somebody's opinion,", "subjective"),
    ("in the spring of 1944 a young doctor is sent to a remote village .", " part of a story,", "objective"),
]
METHODS = (
    *("zero-shot", "4-shot", "with rationales", "4-shot with rationales", "supervised", "4-shot supervised"),
    *("supervised on rationales", "reward", "GRPO", "guide", "guide + EM", "4-shot guide + EM"),
)
UNTRAINED = METHODS[:4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with test.jsonl and train.10.jsonl, train.20.jsonl, train.50.jsonl")
    parser.add_argument("--out", type=Path, default=Path("reasoning.jsonl"))
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--trl-python", help="of an environment with trl, for GRPO")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rationales", type=int, default=4, help="that a prediction is averaged over")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--explain", type=int, default=0, help="print so many posterior rationales of two test rows")
    options = parser.parse_args()
    if not options.folder.is_dir():
        print(f"skipped: no folder {options.folder}. It is that of the SUBJ data set.")
        return
    torch.set_num_threads(1)
    print(machine(), flush=True)
    lm = LM.from_pretrained("smollm2-135m")
    test = read(options.folder / "test.jsonl")
    random.Random(0).shuffle(test)
    test = test[: options.rows]
    done = records(options.out)
    for seed in options.seeds:
        for labels in options.labels:
            train = read(options.folder / f"train.{labels}.jsonl")
            for method in options.methods:
                key = (method, 0 if method in UNTRAINED else labels, 0 if method in UNTRAINED else seed)
                if key in {(r["method"], r["labels"], r["seed"]) for r in done}:
                    continue
                if method == "GRPO" and not options.trl_python:
                    print("skipped: GRPO, which wants --trl-python")
                    continue
                pyro.set_rng_seed(seed)
                start = time.process_time()
                bench = Bench(lm, train, options.steps, options.rationales, seed, options.trl_python)
                answer = bench.made(method)
                trained = time.process_time() - start
                record = {"method": method, "labels": key[1], "seed": key[2], "training": trained}
                said, empty = answer([text for text, _ in test]), answer(EMPTY)
                record |= scores(said, empty, [label for _, label in test])
                record |= {"subjective": said.round(5).tolist(), "without content": empty.round(5).tolist()}
                record["seconds"] = time.process_time() - start
                done.append(record)
                keep(options.out, record)
                if options.explain and bench.learned is not None:
                    bench.explain(test[:2], options.explain)
    print(summary(done))


def read(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["text"], OPTIONS[row["label"]].strip()) for row in rows]


Answer = Callable[[list[str]], np.ndarray]
"""From sentences to the probability of each being subjective."""


class Bench:
    """One training set and seed."""

    def __init__(
        self, lm: LM, train: list[Row], steps: int, rationales: int, seed: int, trl_python: str | None = None
    ) -> None:
        self.trl_python = trl_python
        self.lm, self.train, self.steps, self.rationales, self.seed = lm, train, steps, rationales, seed
        self.learned: tuple[Any, Any] | None = None

    def made(self, method: str) -> Answer:
        shots = EXAMPLES if method.startswith("4-shot") else []
        name = method.removeprefix("4-shot").strip()
        if name in ("zero-shot", ""):
            return self.averaged(labelled(self.lm, shots), 1)
        if name == "with rationales":
            return self.averaged(rationale(self.lm, OPTIONS, examples=shots, **FORM))
        if name == "supervised":
            program = labelled(self.adapted(), shots)
            self.fit(program, nothing, Trace_ELBO())
            return self.averaged(program, 1)
        if name == "supervised on rationales":
            return self.self_taught()
        if name == "GRPO":
            return self.grpo()
        if name in ("guide", "reward"):
            program = rationale(self.lm, OPTIONS, **FORM)
            guide = self.guide(program, lambda text: [text, BEFORE])
            if name == "guide":
                self.fit(program, guide, TrajectoryBalance(4))
            else:
                self.fit(poutine.scale(program, scale=10.0), guide, LeaveOneOutELBO(4))
            return self.averaged(program, guide=guide)
        program = rationale(self.adapted(), OPTIONS, examples=shots, **FORM)
        shown = "".join(f"{t}{BEFORE}{z}{BETWEEN} {y}.\n\n" for t, z, y in shots)
        guide = self.guide(program, lambda text, label: [shown, text, "\nThis is", label, BEFORE])
        self.fit(program, guide, TrajectoryBalance(4))
        self.learned = program, guide
        return self.averaged(program)

    def adapted(self) -> LM:
        return self.lm.adapt(rank=8, seed=self.seed)

    def guide(self, program: Any, prompt: Callable[..., Any]) -> GFlowNetGuide:
        layers = ["q_proj", "v_proj"]
        return GFlowNetGuide(
            program, self.lm, prompt={"rationale": prompt}, rank=8, seed=self.seed + 1, target_modules=layers
        )

    def fit(self, program: Any, guide: Any, objective: Any, data: list[Any] | None = None) -> None:
        history = fit(
            program,
            guide,
            self.train if data is None else data,
            objective,
            self.steps,
            batch_size=5,
            vectorize_data=True,
            learning_rate=3e-4,
            model_learning_rate=1e-4 if isinstance(objective, Trace_ELBO) else 1e-3,
            seed=self.seed,
            progress=False,
        )
        print(history, flush=True)

    def self_taught(self) -> Answer:
        """One round of drawing rationales from the prior, keeping one by its weight, and learning from it."""
        prior = rationale(self.lm, OPTIONS, **FORM)
        kept = []
        for text, label in self.train:
            posterior = importance(prior, PromptGuide(prior, self.lm, {"rationale": lambda text: [text, BEFORE]}), 16)
            drawn = posterior(text, label).resample(1, seed=self.seed)
            kept.append((text, label, drawn.decode("rationale")[0]))
        theta = self.adapted()
        program = rationale(theta, OPTIONS, **FORM)

        def complete(text: list[str], label: list[str], reason: list[str]) -> None:
            with poutine.condition(data={"rationale": theta.encode(reason)}):
                program(text, label)

        self.fit(complete, nothing, Trace_ELBO(), kept)
        return self.averaged(program)

    def grpo(self) -> Answer:
        with tempfile.TemporaryDirectory() as folder:
            rows = [
                {"prompt": text + BEFORE, "label": [o.strip() for o in OPTIONS].index(own)} for text, own in self.train
            ]
            request = {"model": str(packaged_folder("smollm2-135m")), "options": OPTIONS, "between": BETWEEN,
                       "max_tokens": FORM["max_tokens"], "steps": self.steps, "seed": self.seed, "out": folder,
                       "rows": rows}  # fmt: skip
            path = Path(folder) / "request.json"
            path.write_text(json.dumps(request))
            worker = Path(__file__).parent / "grpo_worker.py"
            subprocess.run([self.trl_python, str(worker), str(path)], check=True)
            policy = LM.from_pretrained(folder)
        law = {"max_tokens": FORM["max_tokens"], "stop": FORM["stop"]}

        def program(text: Any, label: Any = None) -> None:
            reason = pyro.sample("rationale", policy(text, BEFORE, **law))
            pyro.sample("label", self.lm.choice(text, BEFORE, reason, BETWEEN, options=OPTIONS))

        return self.averaged(program)

    def averaged(self, program: Any, draws: int | None = None, guide: Any = None) -> Answer:
        run = predict(program, "label", draws or self.rationales, guide=guide, vectorize_data=True)

        def answer(texts: list[str]) -> np.ndarray:
            parts = [run(texts[start : start + 25]).probabilities for start in range(0, len(texts), 25)]
            return np.concatenate(parts)[:, 1]

        return answer

    def explain(self, rows: list[Row], count: int) -> None:
        assert self.learned is not None
        for text, label in rows:
            posterior = importance(*self.learned, 64)(text, label)
            print(f"{label}: {text}\n  {posterior}")
            for reason, weight in posterior.top("rationale", count):
                print(f"  {weight:6.1%} {reason!r}")


def labelled(lm: LM, shots: list[tuple[str, str, str]]) -> Callable[..., Any]:
    """The label after the sentence, with no rationale between."""
    shown = "".join(f"{text}{BEFORE} {label}.\n\n" for text, _, label in shots)

    def program(text: Any, label: Any = None) -> Any:
        observed = None if label is None else lm.encode([f" {one}" for one in label])
        return pyro.sample("label", lm.choice(shown, text, BEFORE, options=OPTIONS), obs=observed)

    return program


def scores(subjective: np.ndarray, empty: np.ndarray, labels: list[str]) -> dict[str, float]:
    """Accuracy, calibration error and ranking of the predictions as they are, and after calibration."""
    truth = np.array([label == "subjective" for label in labels])
    logit = np.log(subjective + 1e-9) - np.log1p(1e-9 - subjective)
    level = np.log(empty.mean() + 1e-9) - np.log1p(1e-9 - empty.mean())
    right = (subjective > 0.5) == truth
    batch = 1 / (1 + np.exp(logit.mean() - logit))
    ranks = (subjective[truth][:, None] > subjective[~truth][None]).mean()
    return {
        "accuracy": float(right.mean()),
        "calibrated": float(((logit > level) == truth).mean()),
        "ECE": calibration_error(subjective, truth),
        "batch calibrated": float(((batch > 0.5) == truth).mean()),
        "batch ECE": calibration_error(batch, truth),
        "AUC": float(ranks),
        "mean": float(subjective.mean()),
    }


def calibration_error(subjective: np.ndarray, truth: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of the chosen label's probability (Guo et al. 2017), equal-width bins."""
    confidence = np.maximum(subjective, 1 - subjective)
    right = (subjective > 0.5) == truth
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [
        (place == n).mean() * abs(right[place == n].mean() - confidence[place == n].mean())
        for n in range(bins)
        if (place == n).any()
    ]
    return float(sum(gaps))


def summary(done: list[dict[str, Any]]) -> str:
    rows = []
    for labels, method in sorted({(r["labels"], METHODS.index(r["method"])) for r in done}):
        own = [r for r in done if (r["labels"], r["method"]) == (labels, METHODS[method])]

        def shown(name: str, own: list[dict[str, Any]] = own) -> str:
            values = np.array([100 * record[name] for record in own])
            if len(values) == 1:
                return f"{values[0]:.1f}"
            return f"{values.mean():.1f} ± {values.std(ddof=1) / np.sqrt(len(values)):.1f}"

        columns = [shown(name) for name in ("accuracy", "calibrated", "batch calibrated", "ECE", "batch ECE", "AUC")]
        rows.append([labels or "", METHODS[method], len(own), *columns, f"{np.mean([r['training'] for r in own]):.0f}"])
    right = ["% right", "calibrated, % right", "batch calibrated, % right"]
    header = ["labels", "method", "seeds", *right, "ECE, %", "batch calibrated, ECE, %", "AUC, %", "training, CPU s"]
    return table(header, rows)


if __name__ == "__main__":
    main()
