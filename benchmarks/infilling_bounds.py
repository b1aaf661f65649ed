"""(h) How near the posterior each objective comes, in both directions: infilling by Zhao et al. (2024).

    python benchmarks/infilling_bounds.py --model ../shared/data/models/stories260k --setting 2,1
    python benchmarks/infilling_bounds.py --setting 15,10 --seconds 600
    python benchmarks/infilling_bounds.py --model smollm2-135m --setting 2,1 --rank 8 --samples 32 --simulations 12
    python benchmarks/infilling_bounds.py --setting 2,1 --seconds 12 --rates 0.001 0.003 0.01

The model writes on from a prompt; T tokens are latent, the c tokens behind them observed. Both are simulated
from the model, so that log Z and both divergences are bracketed from two sides. Every objective starts from
the same guide, which is told the observed tokens and then the prompt, sees the same stream of simulated
observations, and has the same CPU seconds; every row is evaluated on the same simulated pairs. The bracket of
log Z of the row where it is narrowest serves for the divergences of all.

There are two programs: texts of exactly T tokens, as published, and texts of up to T tokens that a full stop
ends, since subtrajectory balance needs prefixes that are texts. With ``--rates`` it compares learning rates
by KL(q‖p) + KL(p‖q), on a seed and on pairs of their own. Each sample of SmolLM2 costs about 0.2 CPU seconds,
so that K=500 for many observations is out of reach there; the brackets are the wider for it. One thread.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import torch
from measure import machine, table
from torch import Tensor

from llmppl import LM, Behaviour, bounds, fit
from llmppl.diagnostics import Bounds
from llmppl.guides import GFlowNetGuide, PromptGuide
from llmppl.network.random_states import randomness_kept
from llmppl.objectives import (
    LeaveOneOutELBO,
    ParticleObjective,
    SubTrajectoryBalance,
    TrajectoryBalance,
    WakeSleep,
)
from llmppl.programs.structure import Program

PROMPT = "Once upon a time, there was a"
PUBLISHED = {
    (2, 1): "best KL(q‖p) 0.16, KL(p‖q) 0.14",
    (15, 10): "best KL(q‖p) 13.27, KL(p‖q) 4.90, both by forward KL; no row of trajectory balance",
}
# At T=2, of rates from 3e-4 to 1e-2 and of sleep=0.5 and 1.0, the best sums of both divergences after 12 CPU seconds;
# the balance objectives alone had the mix to choose as well. At T=15, of rates from 3e-4 to 3e-3 for wake-sleep and
# trajectory balance; the other two took over theirs.
MIX = {"tempered": 0.25, "sleep": 1.0, "temperatures": (1.0, 1.5)}
RATES = {
    2: {"wake-sleep": 3e-3, "leave-one-out": 1e-3, "TB (VarGrad)": 3e-3, "SubTB": 1e-3},
    15: {"wake-sleep": 3e-4, "leave-one-out": 3e-4, "TB (VarGrad)": 3e-4, "SubTB": 3e-4},
}
STREAM = 4096
ROWS_AT_ONCE = 8


class Setting(NamedTuple):
    """``tokens`` latent and ``observed`` tokens, and what ends the latent text before."""

    tokens: int
    observed: int
    stop: str | None

    def __str__(self) -> str:
        latent = f"T={self.tokens}" if self.stop is None else f"up to T={self.tokens} tokens, ended by {self.stop!r},"
        return f"{latent} given c={self.observed}"


def contenders(particles: int, mix: dict[str, object]) -> dict[str, Callable[[], ParticleObjective]]:
    """New objectives of a run."""
    return {
        "wake-sleep": lambda: WakeSleep(particles, insomnia=0.0),
        "leave-one-out": lambda: LeaveOneOutELBO(particles),
        "TB (VarGrad)": lambda: TrajectoryBalance(particles, behaviour=Behaviour(**mix)),  # type: ignore[arg-type]
        "SubTB": lambda: SubTrajectoryBalance(particles, behaviour=Behaviour(**mix)),  # type: ignore[arg-type]
    }


def program(lm: LM, setting: Setting) -> Program:
    def text(end: Tensor) -> None:
        missing = pyro.sample("missing", lm(PROMPT, max_tokens=setting.tokens, stop=setting.stop))
        pyro.sample("end", lm(PROMPT, missing), obs=end)

    return text


def end_first(end: Tensor) -> list[object]:
    """The guide's prompt: plain, for a small model follows no instruction."""
    return [end, "\n", PROMPT]


def stream(lm: LM, setting: Setting, count: int, seed: int) -> list[tuple[Tensor]]:
    """Observations simulated from the model."""
    with randomness_kept(seed), torch.no_grad():
        missing = lm(PROMPT, max_tokens=setting.tokens, stop=setting.stop).sample((count,))
        ends = lm(PROMPT, missing, max_tokens=setting.observed).sample()
    return [(end,) for end in ends]


# --- one row -------------------------------------------------------------------------------------


class _SpentError(Exception):
    """The CPU seconds of a run are used up."""


def trained(
    lm: LM, setting: Setting, objective: ParticleObjective, rate: float, seed: int, options: argparse.Namespace
) -> tuple[GFlowNetGuide, int]:
    """The guide after the run's CPU seconds, and the steps they were enough for."""
    pyro.clear_param_store()
    text = program(lm, setting)
    guide = GFlowNetGuide(text, lm, prompt={"missing": end_first}, rank=options.rank, seed=seed)
    taken = 0
    start = time.process_time()

    def watch(step: int, history: object) -> None:
        nonlocal taken
        taken = step
        if time.process_time() - start >= options.seconds:
            raise _SpentError

    with contextlib.suppress(_SpentError):
        fit(
            text, guide, stream(lm, setting, options.stream, seed), objective, 1_000_000,
            batch_size=options.batch_size, vectorize_data=True, learning_rate=rate, weight_decay=0.0, seed=seed,
            progress=False, callback=watch,
        )  # fmt: skip
    return guide, taken


def measured(
    lm: LM, setting: Setting, guide: Program, samples: int, simulations: int, rows: int, first: int = 0
) -> Bounds:
    """Bounds on simulated pairs that are the same for every guide.

    :param first: of the seeds of the pairs.
    """
    run = bounds(program(lm, setting), guide, samples, vectorize_data=True)
    parts = []
    for chunk in range(0, simulations, rows):
        count = min(rows, simulations - chunk)
        with randomness_kept(1_000_000 + first + chunk):
            parts.append(run(torch.zeros(count, setting.observed, dtype=torch.long)))
    return Bounds.join(parts)


# --- the table -----------------------------------------------------------------------------------


def compare(options: argparse.Namespace, setting: Setting) -> str:
    """The table of a setting."""
    lm = LM.from_pretrained(options.model)
    text = program(lm, setting)
    found: dict[str, list[Bounds]] = {}
    steps: dict[str, list[int]] = {}

    def note(name: str, guide: Program, count: int) -> None:
        result = measured(lm, setting, guide, options.samples, options.simulations, options.rows)
        found.setdefault(name, []).append(result)
        steps.setdefault(name, []).append(count)
        print(f"{setting}, {name}, {count} steps: {result!r}", flush=True)

    note("the prior", PromptGuide(text, lm, prompt={"missing": lambda end: [PROMPT]}), 0)
    note("prompt guide, untrained", PromptGuide(text, lm, prompt={"missing": end_first}), 0)
    missing = []
    for seed in range(options.seeds):
        for name, make in contenders(options.particles, MIX).items():
            if name in missing or name not in options.objectives:
                continue
            lm = LM.from_pretrained(options.model)
            try:
                guide, count = trained(lm, setting, make(), RATES[setting.tokens][name], seed, options)
            except ValueError as error:
                if "stop token" not in str(error):
                    raise
                missing.append(name)
                print(f"{setting}, no row of {name}: {error}", flush=True)
                continue
            note(name, guide, count)
    return _table(found, steps, missing)


def _table(found: dict[str, list[Bounds]], steps: dict[str, list[int]], missing: list[str]) -> str:
    columns = {
        name: {key: np.stack([getattr(b, key) for b in results]) for key in ("lower", "upper", "elbo")}
        | {"exact": np.stack([b.exact_log_weight for b in results])}
        for name, results in found.items()
    }  # each (seeds, simulated observations)
    # The simulated pairs are the same in each row: the bounds of one serve the others.
    narrowest = min(columns.values(), key=lambda c: np.mean(c["upper"] - c["lower"]))
    lower, upper = narrowest["lower"].mean(0), narrowest["upper"].mean(0)
    rows = []
    for name, c in columns.items():
        rows.append(
            (
                name,
                f"{np.mean(steps[name]):.0f}",
                f"{_mean(lower - c['elbo'])} to {_mean(upper - c['elbo'])}{_error(lower - c['elbo'])}",
                f"{_mean(c['exact'] - upper)} to {_mean(c['exact'] - lower)}{_error(c['exact'] - upper)}",
                f"{_mean(c['exact'] - c['elbo'])}{_error(c['exact'] - c['elbo'])}",
                f"{_mean(c['upper'] - c['lower'])}",
            )
        )
    rows += [(name, *["needs texts that may end earlier"], *[""] * 4) for name in missing]
    header = ("objective", "steps", "KL(q‖p)", "KL(p‖q)", "their sum", "width of its own bracket of log Z")
    return f"log Z {_mean(lower)} to {_mean(upper)}\n\n{table(header, rows)}"


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.2f}"


def _error(values: np.ndarray) -> str:
    """± the standard error over observations and over seeds, of ``(seeds, observations)``."""
    seeds, count = values.shape
    square = values.mean(0).var(ddof=1) / count
    if seeds > 1:
        square += values.mean(1).var(ddof=1) / seeds
    return f" ± {square**0.5:.2f}"


# --- learning rates ------------------------------------------------------------------------------


def compare_rates(options: argparse.Namespace, setting: Setting) -> str:
    rows = []
    for name, make in contenders(options.particles, MIX).items():
        if name not in options.objectives or (name == "SubTB" and setting.stop is None):
            continue
        for rate in options.rates:
            lm = LM.from_pretrained(options.model)
            guide, count = trained(lm, setting, make(), rate, 10_000, options)
            found = measured(lm, setting, guide, options.samples, options.simulations, options.rows, first=500_000)
            rows.append((name, f"{rate:g}", str(count), *map(str, (*found.kl_q_p, *found.kl_p_q, found.kl_sum))))
            print(setting, *rows[-1], sep=", ", flush=True)
    header = ("objective", "rate", "steps", "KL(q‖p) from", "to", "KL(p‖q) from", "to", "their sum")
    return table(header, rows)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", default="../shared/data/models/stories260k", help="a folder, or smollm2-135m")
    arguments.add_argument("--setting", choices=("2,1", "15,10"), nargs="*", default=["2,1", "15,10"], help="T,c")
    arguments.add_argument("--program", choices=("exact", "ended"), nargs="*", default=["exact", "ended"])
    arguments.add_argument("--objectives", nargs="*", choices=list(RATES[2]), default=list(RATES[2]))
    arguments.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of training")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--samples", type=int, default=500, help="K")
    arguments.add_argument("--simulations", type=int, default=48)
    arguments.add_argument("--rows", type=int, default=ROWS_AT_ONCE, help="simulated observations evaluated together")
    arguments.add_argument("--particles", type=int, default=16)
    arguments.add_argument("--batch-size", type=int, default=8)
    arguments.add_argument("--rank", type=int, default=32, help="of the adapter")
    arguments.add_argument("--stream", type=int, default=STREAM, help="simulated observations to train on")
    arguments.add_argument("--rates", type=float, nargs="*", default=None, help="compare learning rates instead")
    options = arguments.parse_args()
    if options.model != "smollm2-135m" and not Path(options.model).is_dir():
        print(f"skipped: there is no model folder {options.model}")
        return
    torch.set_num_threads(1)
    print(machine(), flush=True)
    for name in options.setting:
        tokens, observed = map(int, name.split(","))
        for kind in options.program:
            setting = Setting(tokens, observed, None if kind == "exact" else ".")
            found = (compare_rates if options.rates else compare)(options, setting)
            print(
                f"\n{Path(options.model).name}: {setting}; {options.seconds:.0f} CPU s of training, "
                f"{options.seeds} seeds, {options.particles} particles of {options.batch_size} observations a step; "
                f"{options.simulations} simulated observations, K={options.samples}; nats, ± s.e."
            )
            print(f"balance objectives: {Behaviour(**MIX)!r}")  # type: ignore[arg-type]
            print(f"Zhao et al., a 33M model, exactly T: {PUBLISHED[tokens, observed]}\n")
            print(found, flush=True)


if __name__ == "__main__":
    main()
