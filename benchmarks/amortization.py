"""Where amortization pays: sentences with a keyword, by the prior, a prompt, search and guides.

    python benchmarks/amortization.py references --out llmppl/demo/keyword_references.json
    python benchmarks/amortization.py compare --guide llmppl/demo/adapters/keyword.safetensors

``references`` simulates one (beginning, keyword) pair behind each of 24 held-out beginnings, none selected, and runs
importance sampling with a guide for log Z. From the same weighted sentences follow, without a draw of the prior, the
prior's hit rate Z E[1/L] and its relative effective sample size Z / E[L], where L = p(keyword | sentence) and E is
over the posterior. ``compare`` runs every proposal on the 24 pairs in one run, on one thread, and prints hits, relative
effective sample size against the reference log Z, and CPU seconds for each effective sample by bins of the prior's hit
rate. A proposal's relative effective sample size is Z² / E_q[w²] with Z from the reference; of the zero-shot prompt,
whose few hits say little, it is Z / E[w], E over posterior sentences. ``smc`` and the best of ``n`` zero-shot answers
take as long as the guide; the keyword is seen only where a sentence has ended, so that the draws of ``smc`` are the
prior's, and those of the best of ``n`` the prompt's. Test-time engines join by ``against_engines.py --program
keyword``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from against_engines import Engine

from llmppl import LM, importance, simulate
from llmppl.demo import keyword as demo
from llmppl.guides import WordGuide
from llmppl.inference.simulated_pairs import score_given
from llmppl.models import keyword
from llmppl.posterior.posterior import Posterior

BINS = {"≥ 5 %": (0.05, 1.1), "1 to 5 %": (0.01, 0.05), "< 1 %": (0.0, 0.01)}


def references(lm: LM, guide_path: Path, samples: int, seed: int) -> list[demo.HeldOutPair]:
    program = keyword(lm)
    guide = WordGuide(program, lm)
    guide.load(guide_path)
    texts = demo.beginnings(held_out=True)
    pairs = simulate(program, [(text, demo.SOME_WORD) for text in texts], 3 * len(texts), seed=seed, progress=False)
    found: dict[str, demo.HeldOutPair] = {}
    for n in range(len(pairs)):
        beginning, word = pairs[n][0], lm.decode(pairs[n].observations["keyword"])
        if beginning in found or not word:
            continue  # a sentence without a content word
        pyro.set_rng_seed(seed + n)
        posterior = importance(program, guide, samples, progress=False, defensive=demo.DEFENSIVE)(beginning, word)
        likelihood, weights = np.exp(posterior.log_likelihood["keyword"]), posterior.weights
        log_z, kept = float(posterior.log_evidence), weights > 0
        own = lm.content_word(pairs[n].latents["sentence"]).log_prob(pairs[n].observations["keyword"])
        found[beginning] = demo.HeldOutPair(
            beginning,
            word,
            log_z,
            float(posterior.log_evidence_error),
            math.exp(log_z) * float((weights[kept] / likelihood[kept]).sum()),
            math.exp(log_z) / float((weights * likelihood).sum()),
            float(own) - log_z,
            0.0,
        )
        asked = demo.zero_shot(program, lm)
        found[beginning] = replace(
            found[beginning], prompt_ess=_from_the_posterior(program, asked, found[beginning], posterior)
        )
        print(found[beginning], f"ESS {float(posterior.ess):.0f}", flush=True)
    return sorted(found.values(), key=lambda pair: -pair.hit_rate)


def compare(
    lm: LM,
    guides: dict[str, Path],
    samples: int,
    seed: int,
    training: Mapping[str, float] | None = None,
    engines: Mapping[str, Engine] | None = None,
) -> None:
    """All proposals on all pairs, printed.

    :param training: CPU seconds that a guide took, by name.
    :param engines: test-time engines, asked for the same.
    """
    program, pairs = keyword(lm), demo.held_out_pairs()
    proposals = {"prior": (demo.prior(program, lm), 0.0), "zero-shot prompt": (demo.zero_shot(program, lm), 0.0)}
    for name, path in guides.items():
        guide = WordGuide(program, lm)
        guide.load(path)
        proposals[name] = (guide, 0.0)
        proposals[f"{name}, defensive"] = (guide, demo.DEFENSIVE)
    rows: dict[str, list[demo.Proposal]] = {name: [] for name in proposals}
    rows |= {"smc": [], "best of n": []}
    asks = [(name, told) for name in engines or {} for told in (False, True) if name == "genlm-control" or not told]
    rows |= {_engine(name, told): [] for name, told in asks}
    worst = dict.fromkeys(rows, 0.0)
    posteriors: list[Posterior] = []
    for n, pair in enumerate(pairs):
        for name, (guide, defensive) in proposals.items():
            rows[name].append(demo.propose(name, program, guide, pair, samples, seed + n, defensive))
        posteriors.append(rows[list(proposals)[-1]][-1].posterior)
        seconds = rows[list(proposals)[-1]][-1].cpu_seconds
        for name, found in demo.searches(program, lm, pair, seconds, max(samples // 4, 2), seed + n).items():
            rows[name].append(found)
        asked, kind = rows["zero-shot prompt"][-1], proposals["zero-shot prompt"][0]
        if np.isfinite(posteriors[-1].log_weights).any():
            asked.relative_ess = _from_the_posterior(program, kind, pair, posteriors[-1])
        # The same draws, whoever makes them: what differs is their cost.
        rows["best of n"][-1].relative_ess = asked.relative_ess
        for name, told in asks:
            assert engines is not None
            run = engines[name].ask(_request(lm, program, kind if told else None, pair, samples, seed + n))
            ours = _log_weights(program, kind if told else proposals["prior"][0], pair, run.texts)
            both = np.isfinite(ours)
            worst[_engine(name, told)] = max(
                worst[_engine(name, told)],
                math.inf if (both != np.isfinite(run.log_weights)).any()
                else float(np.abs(ours[both] - run.log_weights[both]).max(initial=0.0)),
            )  # fmt: skip
            posterior = replace(rows["prior"][-1].posterior, log_weights=run.log_weights)
            ess = asked.relative_ess if told else pair.prior_ess
            rows[_engine(name, told)].append(demo.Proposal(name, posterior, run.cpu, ess))
        print(n, pair.keyword, f"{pair.hit_rate:.4f}", {k: f"{v[-1].relative_ess:.4f}" for k, v in rows.items()},
              f"zero-shot hits {asked.hits:.2f}", flush=True)  # fmt: skip
        rows["prior"][-1].relative_ess = pair.prior_ess
    _print(rows, pairs, list(guides))
    for name, seconds in (training or {}).items():
        _print_break_even(rows, name, seconds, list(guides))
    for name, difference in worst.items():
        if engines and name.split(",")[0] in engines:
            print(f"{name}: log-weights of its samples differ from ours by at most {difference:.1g} nats")


def _print_break_even(
    rows: dict[str, list[demo.Proposal]], name: str, seconds: float, trained: list[str], wanted: int = 100
) -> None:
    """Queries of so many effective samples until training is paid, instead of the cheapest that is not trained."""
    cost = {n: np.mean([p.seconds_an_effective_sample for p in column]) for n, column in rows.items()}
    others = {n: c for n, c in cost.items() if not any(n.startswith(own) for own in trained)}
    best, own = min(others, key=lambda n: others[n]), cost[f"{name}, defensive"]
    queries = seconds / (wanted * (others[best] - own))
    said = f"has paid after {queries:.2f} queries" if queries > 0 else "does not pay"
    print(
        f"{name}, defensive: {seconds:.0f} CPU s of training {said} of {wanted} effective samples instead of {best} "
        f"({own:.1f} against {others[best]:.1f} CPU s for each, means over the pairs)"
    )


def _engine(name: str, told: bool) -> str:
    return f"{name}, {'zero-shot prompt' if told else 'prior'}"


def _request(lm: LM, program, asked, pair: demo.HeldOutPair, samples: int, seed: int) -> dict[str, Any]:
    """What ``engine_worker.py`` takes; ``asked`` is a guide whose prompt the engine is given."""
    law = lm(pair.beginning, max_tokens=20, stop=".", temperature=0.7).law
    prompt = None
    if asked is not None:
        prompt = lm.context(*asked.prompt["sentence"](pair.beginning, pair.keyword)).tolist()
    return {
        "beginning": pair.beginning,
        "keyword": pair.keyword,
        "prompt": prompt,
        "stop": law.stop.tolist(),
        "max_tokens": 20,
        "temperature": 0.7,
        "num_samples": samples,
        "seed": seed,
    }


@torch.no_grad()
def _log_weights(program, guide, pair: demo.HeldOutPair, texts: torch.Tensor) -> np.ndarray:
    """Of sentences that something else has drawn."""
    args = (pair.beginning, pair.keyword)
    particles = score_given(program, guide, args, {}, {"sentence": texts}, len(texts))
    return (particles.log_p - particles.log_q).double().numpy()


def _from_the_posterior(program, guide, pair: demo.HeldOutPair, posterior: Posterior, count: int = 16) -> float:
    """Z / E[w] of a proposal, from sentences of the posterior."""
    drawn = posterior.resample(count)
    latents = {"sentence": torch.as_tensor(drawn.samples["sentence"])}
    with torch.no_grad():
        particles = score_given(program, guide, (pair.beginning, pair.keyword), {}, latents, count)
    mean = float(torch.logsumexp(particles.log_weights.double(), 0)) - math.log(count)
    return math.exp(pair.log_evidence - mean)


def _print(rows: dict[str, list[demo.Proposal]], pairs: list[demo.HeldOutPair], trained: list[str]) -> None:
    """The table, the mutual information, and costs by bins, each guide beside the best of all that is not trained."""
    print("\n" + demo.table(rows, pairs))
    mutual = np.array([pair.mutual for pair in pairs])
    error = mutual.std(ddof=1) / len(pairs) ** 0.5
    print(f"\nmutual information of these pairs: {mutual.mean():.2f} ± {error:.2f} nats")
    rates = np.array([pair.hit_rate for pair in pairs])
    print("\nCPU s for each effective sample, geometric means, by the prior's hit rate:")
    for label, (low, high) in BINS.items():
        some = (rates >= low) & (rates < high)
        if not some.any():
            continue
        cost = {
            name: math.exp(np.log([p.seconds_an_effective_sample for p in np.array(column, dtype=object)[some]]).mean())
            for name, column in rows.items()
        }
        guides = {name for name in cost if any(name.startswith(own) for own in trained)}
        others = min(value for name, value in cost.items() if name not in guides)
        print(f"  {label} ({some.sum()} pairs): " + ", ".join(
            f"{name} {value:.2f}" + (f" ({others / value:.1f} ×)" if name in guides else "")
            for name, value in cost.items()))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["references", "compare"])
    parser.add_argument("--guide", type=Path, action="append", help="a saved guide; several for compare")
    parser.add_argument(
        "--training-seconds", type=float, action="append", help="CPU s that each guide took, for the break-even"
    )
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    guides = options.guide or [demo.shipped_guide()]
    lm, start = LM.from_pretrained("smollm2-135m"), time.process_time()
    if options.task == "references":
        found = references(lm, guides[0], options.samples, options.seed)
        options.out.write_text(json.dumps([asdict(pair) for pair in found], indent=1, ensure_ascii=False) + "\n")
    else:
        paid = dict(zip((path.stem for path in guides), options.training_seconds or (), strict=False))
        compare(lm, {path.stem: path for path in guides}, options.samples, options.seed, paid)
    print(f"{time.process_time() - start:.0f} CPU s")


if __name__ == "__main__":
    main()
