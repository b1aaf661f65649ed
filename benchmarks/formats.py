"""Records under the schemas of a test suite: is local masking the model given the schema?

    python benchmarks/formats.py ../shared/data/json_schema_test_suite

Of so many schemas, drawn at random from those that compile and whose records fit in 40 tokens (of 16 masked draws none
is cut off, and they are not all the same): log Ẑ of ten masked draws against that of many, whether they say so
themselves (their standard error), the relative effective sample size of the mask as a proposal, and the total variation
between the records that masking writes and the posterior. Masks propose, the unmasked model weighs
(``llmppl.models.record``).
"""

from __future__ import annotations

import argparse
import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from measure import machine, table

from llmppl import LM, importance
from llmppl.guides import PromptGuide
from llmppl.inference.gathering import NoWeightError
from llmppl.models import record
from llmppl.posterior.posterior import Posterior

FEW = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--schemas", type=int, default=16)
    parser.add_argument("--samples", type=int, default=160, help="of the reference")
    options = parser.parse_args()
    if not options.folder.is_dir():
        print(f"skipped: no folder {options.folder}. It is that of the JSON Schema test suite.")
        return
    torch.set_num_threads(1)
    print(machine(), flush=True)
    lm, found = LM.from_pretrained("smollm2-135m"), schemas(options.folder)
    random.Random(0).shuffle(found)
    rows: list[list[Any]] = []
    tried = {"schemas": 0, "not compiled": 0, "cut off": 0, "of one record": 0}
    for name, schema in found:
        if len(rows) == options.schemas:
            break
        tried["schemas"] += 1
        prompt = f"A JSON schema:\n{json.dumps(schema)}\nA short record that satisfies it, on one line:\n"
        try:
            program, masked = record(lm, schema), record(lm, schema, masked=True)
        except ValueError:
            tried["not compiled"] += 1
            continue
        guide = PromptGuide(masked, lm)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first = drawn(program, guide, 16, prompt, 0)
            if not np.isfinite(first.log_weights).all():
                tried["cut off"] += 1
                continue
            if len(set(first.decode("record"))) == 1:
                tried["of one record"] += 1
                continue
            few, many = drawn(program, guide, FEW, prompt, 1), drawn(program, guide, options.samples, prompt, 2)
        texts = np.array(many.decode("record"))
        local = np.array([(texts == text).mean() for text in np.unique(texts)])
        exact = np.array([many.weights[texts == text].sum() for text in np.unique(texts)])
        rows.append(
            [
                f"{name}: {json.dumps(schema)[:50]}",
                float(many.log_evidence),
                abs(float(few.log_evidence) - float(many.log_evidence)),
                float(few.log_evidence_error),
                float(many.ess) / options.samples,
                0.5 * float(np.abs(local - exact).sum()),
            ]
        )
        print(rows[-1], flush=True)
    header = ["schema", "log Ẑ", f"off at {FEW}", f"said at {FEW}", "relative ESS", "total variation"]
    print(table(header, rows))
    numbers = np.array([row[1:] for row in rows])
    print(f"\nof {len(rows)} schemas ({tried}): log Ẑ of {FEW} within 0.3 nats of {options.samples} in "
          f"{(numbers[:, 1] < 0.3).mean():.0%}; median total variation {np.median(numbers[:, 4]):.2f}, "
          f"median relative ESS {np.median(numbers[:, 3]):.2f}")  # fmt: skip


def schemas(folder: Path) -> list[tuple[str, Any]]:
    """Those of the suite, each once."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        for case in json.loads(path.read_text()):
            schema = case["schema"]
            if isinstance(schema, dict):
                schema.pop("$schema", None)
                found[json.dumps(schema, sort_keys=True)] = (path.stem, schema)
    return list(found.values())


def drawn(program: Any, guide: Any, count: int, prompt: str, seed: int) -> Posterior:
    pyro.set_rng_seed(seed)
    try:
        return importance(program, guide, count, progress=False)(prompt)
    except NoWeightError as error:
        return error.posterior


if __name__ == "__main__":
    main()
