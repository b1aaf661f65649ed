"""Records with a known value: local masking, prompts, sequential Monte Carlo and genlm-control, at ten draws each.

    python benchmarks/known_value.py --engine-python ENGINES/bin/python

A record of name, age and city whose city is given, for four cities, by ``llmppl.models.record``. For each proposal:
|log Ẑ − log Z| of ten draws, in the median over cities and seeds; the bias of local masking taken for the posterior, as
the total variation of the age's marginal (young, grown, old) from the posterior's; CPU seconds of ten draws. The
reference pools draws of the masks with and without what they are told, weighed under their mixture (balance heuristic).
The engines' environment as for ``against_engines.py``; without ``--engine-python`` they are left out.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from against_engines import Engine
from application_programs import PEOPLE, RECORDS
from measure import machine, table

from llmppl import LM, importance, smc
from llmppl.files.packaged_model import packaged_folder
from llmppl.guides import PromptGuide
from llmppl.inference.gathering import NoWeightError
from llmppl.inference.simulated_pairs import score_given
from llmppl.models import record
from llmppl.models.record import field as field_of
from llmppl.models.record import fields_told, given
from llmppl.posterior.posterior import Posterior

FEW = 10
AGES = (18, 60)
"""Young below the first, old from the second on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", help="of an environment with genlm-control")
    parser.add_argument("--samples", type=int, default=400, help="of each half of the reference")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    lm = LM.from_pretrained("smollm2-135m")
    engine = (
        Engine("genlm-control", options.engine_python, packaged_folder("smollm2-135m"))
        if options.engine_python
        else None
    )
    found: dict[str, list[tuple[float, float, float]]] = {}
    for city in PEOPLE["properties"]["city"]["enum"]:
        program = record(lm, PEOPLE, ["city"])
        masked = record(lm, given(PEOPLE, {"city": city}), ["city"], masked=True)
        plain: dict[str, Any] = {"record": lambda prompt: [prompt]}
        local = PromptGuide(masked, lm, prompt=plain)
        told = PromptGuide(masked, lm, prompt=fields_told(["city"]))
        log_z, exact, masks_own, ess = reference(program, [local, told], city, options.samples)
        print(f"{city}: log Z = {log_z:.3f}, {ess:.0f} effective samples; ages of the posterior {exact.round(3)}, "
              f"of local masking {masks_own.round(3)}, total variation {0.5 * abs(exact - masks_own).sum():.3f}",
              flush=True)  # fmt: skip
        methods: dict[str, Callable[[int], tuple[float, float]]] = {
            "prior": of(importance(program, PromptGuide(program, lm, prompt=plain), FEW, progress=False), city),
            "local masking, weighed": of(importance(program, local, FEW, progress=False), city),
            "told the city, masked, weighed": of(importance(program, told, FEW, progress=False), city),
            "smc, local masking": of(smc(program, local, FEW, progress=False), city),
            "smc, local masking, systematic": of(
                smc(program, local, FEW, resampling="systematic", progress=False), city
            ),
            "smc, told the city": of(smc(program, told, FEW, resampling="systematic", progress=False), city),
        }
        if engine is not None:
            methods["genlm-control, AWRS"] = by_engine(engine, city)
        for seed in range(options.seeds):
            for name, draw in methods.items():
                log_evidence, seconds = draw(seed)
                bias = 0.5 * float(abs(exact - masks_own).sum())
                found.setdefault(name, []).append((abs(log_evidence - log_z), seconds, bias))
    header = ["method", f"|log Ẑ − log Z| at {FEW}, median", "highest", "within 0.3", f"CPU s of {FEW}"]
    rows: list[list[Any]] = []
    for name, numbers in found.items():
        off, seconds, _ = np.array(numbers).T
        rows.append([name, float(np.median(off)), float(off.max()), f"{np.mean(off < 0.3):.0%}", float(seconds.mean())])
    print(table(header, rows))


def weighed(program: Any, guide: Any, city: str, count: int, seed: int) -> Posterior:
    pyro.set_rng_seed(seed)
    return importance(program, guide, count, progress=False)(RECORDS, city)


@torch.no_grad()
def reference(program: Any, guides: list[Any], city: str, count: int) -> tuple[float, np.ndarray, np.ndarray, float]:
    """log Z, the marginal of age in the posterior and under the first guide, and the effective sample size."""
    runs = [weighed(program, guide, city, count, seed) for seed, guide in enumerate(guides)]
    joint, densities, ages = [], [], []
    for run in runs:
        texts = torch.as_tensor(run.samples["record"])
        scored = [score_given(program, guide, (RECORDS, city), {}, {"record": texts}, count) for guide in guides]
        joint.append(run.log_joint)
        densities.append([run.log_joint - own.log_weights.double().numpy() for own in scored])
        ages.append(
            np.array([int(np.searchsorted(AGES, int(field_of(t, "age")), "right")) for t in run.decode("record")])
        )
    log_joint = np.concatenate(joint)
    mixture = np.concatenate([np.logaddexp.reduce(own, axis=0) - math.log(len(guides)) for own in densities])
    log_weights = log_joint - mixture
    total = np.logaddexp.reduce(log_weights)
    weights, groups = np.exp(log_weights - total), np.concatenate(ages)
    exact = np.array([weights[groups == n].sum() for n in range(len(AGES) + 1)])
    local = np.array([(ages[0] == n).mean() for n in range(len(AGES) + 1)])
    return float(total) - math.log(len(log_weights)), exact, local, float(1 / (weights**2).sum())


def of(infer: Callable[..., Posterior], city: str) -> Callable[[int], tuple[float, float]]:
    """log Ẑ and CPU seconds of a seed."""

    def draw(seed: int) -> tuple[float, float]:
        pyro.set_rng_seed(100 + seed)
        start = time.process_time()
        try:
            log_evidence = float(infer(RECORDS, city).log_evidence)
        except NoWeightError:
            log_evidence = -math.inf
        return log_evidence, time.process_time() - start

    return draw


def by_engine(engine: Engine, city: str) -> Callable[[int], tuple[float, float]]:
    pattern = r'\{"name": "[A-Z][a-z]{1,9}", "age": [1-9][0-9]?, "city": "' + city + r'"\}'

    def draw(seed: int) -> tuple[float, float]:
        run = engine.ask({"beginning": RECORDS, "regex": pattern, "max_tokens": 40, "num_samples": FEW, "seed": seed})
        return float(np.logaddexp.reduce(run.log_weights)) - math.log(FEW), run.cpu

    return draw


if __name__ == "__main__":
    main()
