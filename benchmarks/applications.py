"""Does amortization pay? Five programs, each with its prior, a prompt, search and a trained guide, in one table.

    python benchmarks/applications.py --out applications.jsonl

For each held-out query of each program: how many draws satisfy the condition, the relative effective sample size
against a reference log Z, how far log Ẑ of ten draws is from it, CPU seconds for each effective sample, and the number
of queries after which training has paid for itself. The reference is enumerated where it can be (*explained data*),
else importance sampling with 8 times the draws of the guide. A proposal's relative effective sample size is Z / E[w]
with w = p / q at draws of the reference posterior, E over them: so that the misses of a proposal count, which its own
draws do not show. ``smc`` and the best of ``n`` take as long as the guide. A line of ``--out`` is written for each
program, and what is there already is only printed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from application_programs import APPLICATIONS, STEPS, Application, Query
from measure import keep, machine, records, table

from llmppl import LM, importance, smc
from llmppl.inference.gathering import NoWeightError
from llmppl.inference.simulated_pairs import score_given
from llmppl.posterior.posterior import Posterior
from llmppl.programs.structure import is_latent, is_text, plate_nesting, structure

FEW = 10
"""Draws of which log Ẑ is compared with the reference."""

MEASURED = ("hits", "ess", "error", "seconds")
"""Of every method and query."""

QUERY_SAMPLES = 100
"""Effective samples that a query asks for, in the break-even."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("applications.jsonl"))
    parser.add_argument("--programs", nargs="+", choices=list(APPLICATIONS), default=list(APPLICATIONS))
    parser.add_argument("--steps", type=int, help="of training; by default each program's own")
    parser.add_argument("--samples", type=int, default=32, help="draws for each query")
    parser.add_argument("--queries", type=int, default=8, help="at most")
    parser.add_argument("--load", type=Path, help="a folder with guides that go on from where they are")
    parser.add_argument("--save", type=Path, help="a folder for the trained guides")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    lm = LM.from_pretrained("smollm2-135m")
    done = {record["program"] for record in records(options.out)}
    for name in options.programs:
        if name not in done:
            app = APPLICATIONS[name](lm, options.steps or STEPS[name])
            if options.load:
                app.proposals["guide"].load(options.load / f"{name}.safetensors")
            seconds = app.train()
            print(f"{app.name}: {seconds:.0f} CPU s of training", flush=True)
            if options.save:
                app.proposals["guide"].save(options.save / f"{name}.safetensors")
            found = measured(app, options.samples, options.queries)
            keep(options.out, {"program": name, "training": seconds, "methods": summed(found, seconds),
                               "beside": list(app.beside)})  # fmt: skip
    for record in records(options.out):
        if record["program"] in options.programs:
            print_table(record)


def drawn(make: Callable[..., Posterior], query: Query, seed: int) -> tuple[Posterior, float]:
    pyro.set_rng_seed(seed)
    start = time.process_time()
    try:
        posterior = make(*query)
    except NoWeightError as error:
        posterior = error.posterior
    return posterior, time.process_time() - start


def measured(app: Application, samples: int, most: int) -> dict[str, list[dict[str, float]]]:
    """All proposals on all queries."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in [*app.proposals, "smc", "best of n"]}
    for n, query in enumerate(app.queries[:most]):
        reference, _ = drawn(
            importance(app.program, app.proposals["guide"], 8 * samples, progress=False, defensive=0.1),
            query,
            1000 + n,
        )
        log_z = app.exact(query) if app.exact else float(reference.log_evidence)
        for name, proposal in app.proposals.items():
            posterior, seconds = drawn(importance(app.program, proposal, samples, progress=False), query, n)
            rows[name].append(
                {
                    "hits": float(app.hits(query, posterior).mean()),
                    "ess": relative_ess(app, proposal, query, reference, log_z),
                    "error": abs(few(posterior) - log_z),
                    "seconds": seconds / samples,
                    "reference ess": float(reference.ess),
                    **{what: of(query, posterior) for what, of in app.beside.items()},
                }
            )
        budget = rows["guide"][-1]["seconds"] * samples
        asked = app.proposals.get("zero-shot", app.proposals["prior"])
        for name, make in (
            ("smc", lambda count: smc(app.program, app.searched, count, progress=False)),
            ("best of n", lambda count, asked=asked: importance(app.program, asked, count, progress=False)),
        ):
            rows[name].append(searched(app, make, query, budget, samples, log_z, n))
        print(n, {name: {k: round(v, 4) for k, v in found[-1].items()} for name, found in rows.items()}, flush=True)
    return rows


def few(posterior: Posterior) -> float:
    """log Ẑ of the first ten draws."""
    total = np.logaddexp.reduce(posterior.log_weights[:FEW]) - math.log(FEW)
    return float(total) if np.isfinite(total) else -1e3


def searched(
    app: Application, make: Callable[[int], Any], query: Query, budget: float, samples: int, log_z: float, seed: int
) -> dict[str, float]:
    """Search at the cost of the guide's draws; ``hits`` says whether one was found."""
    try:
        posterior, seconds = drawn(make(max(samples // 4, 2)), query, seed)
        count = int(max(samples // 4, 2) * budget / max(seconds, 1e-6))
        if count > samples // 4:
            posterior, seconds = drawn(make(count), query, seed + 1)
    except ValueError:
        return dict.fromkeys(MEASURED, math.nan)
    found = app.hits(query, posterior) & (posterior.weights > 0)
    return {
        "hits": float(found.any()),
        "ess": math.nan,
        "error": abs(float(posterior.log_evidence) - log_z) if np.isfinite(posterior.log_evidence) else 1e3,
        "seconds": seconds,
    }


@torch.no_grad()
def relative_ess(
    app: Application, proposal: Any, query: Query, reference: Posterior, log_z: float, count: int = 32
) -> float:
    """Z / E[w] over draws of the reference posterior."""
    pyro.set_rng_seed(0)
    chosen, sites = reference.resample(count), structure(app.program, query, {})
    latents = app.draws(query, count) if app.draws else {}
    for name, value in () if app.draws else chosen.samples.items():
        if is_latent(sites.nodes[name]):
            event = 1 if is_text(sites.nodes[name]) else 0
            missing = plate_nesting(sites) - (value.ndim - 1 - event)
            latents[name] = torch.as_tensor(value).reshape(count, *[1] * missing, *value.shape[1:])
    particles = score_given(app.program, proposal, query, {}, latents, count)
    mean = float(torch.logsumexp(particles.log_weights.double(), 0)) - math.log(count)
    return math.exp(min(log_z - mean, 0.0))


def summed(rows: dict[str, list[dict[str, float]]], training: float) -> dict[str, dict[str, float]]:
    """Means over queries; costs in geometric mean."""
    found = {}
    for name, own in rows.items():
        column = {key: np.array([row[key] for row in own], dtype=float) for key in MEASURED}
        others = {key: np.array([row.get(key, math.nan) for row in own]) for key in own[0] if key not in MEASURED}
        cost = column["seconds"] / column["ess"]
        found[name] = {
            "hits": float(column["hits"].mean()),
            "ess": float(column["ess"].mean()),
            "error": float(np.median(column["error"])),
            "cost": float(np.exp(np.log(cost).mean())),
            "mean cost": float(cost.mean()),
            **{key: float(np.nanmean(own)) for key, own in others.items() if np.isfinite(own).any()},
        }
    cheapest = min(own["cost"] for name, own in found.items() if name != "guide" and np.isfinite(own["cost"]))
    gain = QUERY_SAMPLES * (cheapest - found["guide"]["cost"])
    found["guide"]["break-even"] = training / gain if gain > 0 else math.inf
    return found


def print_table(record: dict[str, Any]) -> None:
    header = ["method", "hits, %", "relative ESS", f"|log Ẑ − log Z| at {FEW}", "CPU s an effective sample"]
    body = [
        [name, f"{100 * own['hits']:.1f}", f"{own['ess']:.4f}", f"{own['error']:.2f}", f"{own['cost']:.3g}"]
        for name, own in record["methods"].items()
    ]
    print(f"\n{record['program']}: {record['training']:.0f} CPU s of training; pays after "
          f"{record['methods']['guide']['break-even']:.2g} queries of {QUERY_SAMPLES} effective samples\n")  # fmt: skip
    for what in record["beside"]:
        header.append(what)
        for line, own in zip(body, record["methods"].values(), strict=True):
            line.append(f"{own[what]:.1f}" if what in own else "")
    print(table(header, body))


if __name__ == "__main__":
    main()
