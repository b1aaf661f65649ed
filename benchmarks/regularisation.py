"""(m) What amortized-inference regularisation does to the gap on training and on held-out observations.

    python benchmarks/regularisation.py
    python benchmarks/regularisation.py --model ../shared/data/models/stories260k --steps 60 --train 8

On the enumerable twin the latent is the text of up to three tokens between a beginning and an ending. Training
and held-out endings are drawn from the program itself, the held-out ones other than those of the training; the
training ones are few and the guide is large, so that it overfits. The gap of an observation is
log Z − ELBO = KL(q‖p), exact by enumeration, after the last step. Every row starts from the same guide and has
the same steps, observations and seeds; only the regulariser differs. ± is the standard error over the seeds,
each with its own observations.

With ``--model`` the program is infilling of the shipped stories on a real model. Their endings are not the
model's own, so that simulated ones are of another law than those that count. For log Z of a story stands the
best log Ẑ of all rows, so that gaps are comparable with each other and understated alike. One thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from measure import machine, table

from llmppl import LM, Regularisation, fit, importance
from llmppl.demo import infilling as demo
from llmppl.guides import AutoregressiveGuide
from llmppl.models import ending_first, infilling
from llmppl.network.random_states import randomness_kept
from llmppl.objectives import TrajectoryBalance
from llmppl.testing import tiny_lm

BEGINNING = "ab"
HELD_OUT = 1_000_000


class Row(NamedTuple):
    """What a row gives to ``fit``."""

    regularisation: Regularisation | None
    weight_decay: float


class Result(NamedTuple):
    """Of one run, one entry an observation: the gaps, or on a real model the ELBOs and log Ẑs."""

    train: np.ndarray
    held_out: np.ndarray
    seconds: float


def contenders(options: argparse.Namespace) -> dict[str, Row]:
    noise, dropout, simulated = options.input_noise, options.adapter_dropout, options.simulated
    return {
        "none": Row(None, 0.0),
        f"input noise {noise:g}": Row(Regularisation(input_noise=noise), 0.0),
        f"weight decay {options.weight_decay:g}": Row(None, options.weight_decay),
        f"adapter dropout {dropout:g}": Row(Regularisation(adapter_dropout=dropout), 0.0),
        f"simulated x {simulated:g}": Row(Regularisation(simulated=simulated), 0.0),
        "all four": Row(Regularisation(noise, dropout, simulated), options.weight_decay),
    }


# --- the twin ------------------------------------------------------------------------------------


def drawn(lm: LM, count: int, seed: int, tokens: int, without: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Beginnings with endings simulated from the program, those of ``without`` left out."""
    with randomness_kept(seed), torch.no_grad():
        prior = lm(BEGINNING, max_tokens=3, stop=".")
        endings: list[str] = []
        while len(endings) < count:
            found = lm.decode(lm(BEGINNING, prior.sample((count,)), max_tokens=tokens).sample())
            endings += [ending for ending in found if ending not in without]
    return [(BEGINNING, ending) for ending in endings[:count]]


def exact_gaps(lm: LM, guide: AutoregressiveGuide, data: list[tuple[str, str]]) -> np.ndarray:
    """KL(q‖p) of each observation, by enumeration, nats."""
    beginnings, endings = map(list, zip(*data, strict=True))
    prior = lm(beginnings, max_tokens=3, stop=".")
    texts = prior.enumerate_support(expand=False)  # (n, 1, T)
    with torch.no_grad():
        log_joint = prior.log_prob(texts) + lm(beginnings, texts).log_prob(lm.encode(endings))
        log_q = prior.with_context(lm.context(endings, beginnings), guide.adapter).log_prob(texts).double()
    log_p = log_joint.double().log_softmax(0)  # (n, observations)
    return (log_q.exp() * (log_q - log_p)).sum(0).numpy()


def twin_run(row: Row, seed: int, options: argparse.Namespace) -> Result:
    pyro.clear_param_store()
    lm = tiny_lm()
    story = infilling(lm, max_tokens=3)
    train = drawn(lm, options.train, seed, options.ending)
    held_out = drawn(lm, options.held_out, HELD_OUT + seed, options.ending, tuple(e for _, e in train))
    guide = AutoregressiveGuide(story, lm, rank=options.rank, seed=seed)
    seconds = trained(story, guide, train, row, seed, options)
    return Result(exact_gaps(lm, guide, train), exact_gaps(lm, guide, held_out), seconds)


def trained(
    story: Any, guide: AutoregressiveGuide, data: list[tuple[str, str]], row: Row, seed: int, options: Any
) -> float:
    """CPU seconds of the training."""
    start = time.process_time()
    fit(
        story, guide, data, TrajectoryBalance(options.particles), options.steps, batch_size=options.batch_size,
        vectorize_data=True, learning_rate=options.rate, weight_decay=row.weight_decay, seed=seed, progress=False,
        regularisation=row.regularisation,
    )  # fmt: skip
    return time.process_time() - start


# --- a real model --------------------------------------------------------------------------------


def real_run(row: Row, seed: int, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, float]:
    """ELBOs and log Ẑs of the training stories, then the held-out ones; CPU seconds of training."""
    pyro.clear_param_store()
    lm = LM.from_pretrained(options.model)
    story = infilling(lm)
    train, held_out = stories(options)
    guide = AutoregressiveGuide(story, lm, prompt={"middle": ending_first}, rank=options.rank, seed=seed)
    seconds = trained(story, guide, train, row, seed, options)
    with randomness_kept(HELD_OUT):
        run = importance(story, guide, options.samples, vectorize_data=True, progress=False)
        posterior = run(*map(list, zip(*train, *held_out, strict=True)))
    return np.asarray(posterior.elbo), np.asarray(posterior.log_evidence), seconds


def stories(options: argparse.Namespace) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    training, held_out = demo.split(demo.stories(), options.held_out)
    return training[: options.train], held_out


# --- the table -----------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> str:
    """The table, of the twin or of a real model."""
    found: dict[str, list[Any]] = {name: [] for name in contenders(options)}
    for seed in range(options.seeds):
        for name, row in contenders(options).items():
            result = (twin_run if options.model is None else real_run)(row, seed, options)
            found[name].append(result)
            told = f"{np.mean(result[0]):.3f}, {np.mean(result[1]):.3f}, {result[2]:.0f} CPU s"
            print(f"seed {seed}, {name}: {told}", flush=True)
    if options.model is not None:
        best = np.max([evidence for runs in found.values() for _, evidence, _ in runs], 0)
        for name, runs in found.items():
            gaps = [best - elbo for elbo, _, _ in runs]
            cuts = [np.split(gap, [len(stories(options)[0])]) for gap in gaps]
            found[name] = [Result(a, b, seconds) for (a, b), (*_, seconds) in zip(cuts, runs, strict=True)]
    return report(found)


def report(found: dict[str, list[Result]]) -> str:
    """Mean gaps ± standard error over seeds, and of each row's difference to the first, seed by seed."""
    means = {
        name: np.array([[r.train.mean(), r.held_out.mean(), r.seconds] for r in runs]) for name, runs in found.items()
    }
    base = next(iter(means.values()))
    rows = []
    for name, runs in means.items():
        change = "" if runs is base else _with_error(runs[:, 1] - base[:, 1], "+")
        cells = (_with_error(runs[:, 0]), _with_error(runs[:, 1]), change)
        rows.append((name, *cells, f"{runs[:, 2].mean():.0f}"))
    header = ("regulariser", "training gap", "held-out gap", "held-out change", "CPU s")
    return table(header, rows)


def _with_error(values: np.ndarray, sign: str = "") -> str:
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.2f}{error}"


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", default=None, help="a folder, or smollm2-135m; the twin by default")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=240)
    arguments.add_argument("--train", type=int, default=8, help="training observations")
    arguments.add_argument("--held-out", type=int, default=None, help="default: 128, or 12 stories")
    arguments.add_argument("--ending", type=int, default=3, help="tokens of an ending of the twin")
    arguments.add_argument("--particles", type=int, default=8)
    arguments.add_argument("--batch-size", type=int, default=4)
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--rate", type=float, default=5e-3, help="learning rate")
    arguments.add_argument("--samples", type=int, default=64, help="K of a real model's gaps")
    arguments.add_argument("--input-noise", type=float, default=0.2)
    arguments.add_argument("--weight-decay", type=float, default=1.0)
    arguments.add_argument("--adapter-dropout", type=float, default=0.2)
    arguments.add_argument("--simulated", type=float, default=0.5)
    return arguments


def main() -> None:
    options = parser().parse_args()
    options.held_out = options.held_out or (128 if options.model is None else demo.HELD_OUT)
    if options.model not in (None, "smollm2-135m") and not Path(options.model).is_dir():
        print(f"skipped: there is no model folder {options.model}")
        return
    torch.set_num_threads(1)
    print(machine(), flush=True)
    result = compare(options)
    print(
        f"\n{Path(options.model).name if options.model else 'the twin'}: {options.train} training and "
        f"{options.held_out} held-out observations, {options.steps} steps of {options.particles} particles of "
        f"{options.batch_size} observations, rank {options.rank}; nats, mean ± s.e. of {options.seeds} seeds\n"
    )
    print(result)


if __name__ == "__main__":
    main()
