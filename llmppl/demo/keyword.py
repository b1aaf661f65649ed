"""The main job on a real language model: go on with a story in a sentence that has a given word."""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

from llmppl.demo.infilling import HELD_OUT, sentences_of_stories, threads
from llmppl.guides import PromptGuide, WordGuide
from llmppl.inference.gathering import NoWeightError
from llmppl.inference.importance import importance
from llmppl.inference.smc import smc
from llmppl.language_model import LM
from llmppl.models import keyword
from llmppl.network.random_states import randomness_kept
from llmppl.objectives import WakeSleep
from llmppl.posterior.posterior import Posterior
from llmppl.programs.structure import Program
from llmppl.training.evaluation import Evaluation
from llmppl.training.fit import fit
from llmppl.training.history import History
from llmppl.training.simulated_set import SimulatedSet
from llmppl.training.simulated_stream import simulate

DEFENSIVE = 0.1
RAREST = 1e-3
"""Hit rate of the prior below which a pair is not shown in the demo."""
UNSEEN = 48
"""Simulated pairs that the held-out gain is measured on."""
SEARCH = "search"
SOME_WORD = "garden"
"""Stands in argument tuples of pairs that are simulated: of an observed argument only that it is observed counts."""


def beginnings(held_out: bool = False) -> list[str]:
    """The first one to three sentences of the shipped stories; held out, the first two or three of those that no
    shipped guide has seen."""
    stories = sentences_of_stories()
    if held_out:
        return [" ".join(story[:n]) for story in stories[-HELD_OUT:] for n in (2, 3)]
    return [" ".join(story[:n]) for story in stories[:-HELD_OUT] for n in (1, 2, 3)]


def new_beginnings(lm: LM, count: int, seed: int = 0) -> list[str]:
    """Beginnings that the language model writes itself, each after the first sentences of six of the stories."""
    firsts = [story[0] for story in sentences_of_stories()[:-HELD_OUT]]
    order = np.random.default_rng(seed)
    prompts = ["\n".join(firsts[n] for n in order.choice(len(firsts), 6, replace=False)) + "\n" for _ in range(count)]
    with randomness_kept(seed):
        written = lm.decode(lm(prompts, max_tokens=24, stop=".", temperature=0.8).sample())
    return [text.strip().split("\n")[-1] or firsts[n % len(firsts)] for n, text in enumerate(written)]


def shipped_guide() -> Path:
    """A guide trained on more pairs; see its README."""
    return Path(str(resources.files("llmppl.demo").joinpath("adapters", "keyword.safetensors")))


@dataclass(frozen=True)
class HeldOutPair:
    """A beginning and a keyword that no guide was trained on, with what a long run says of it.

    :param log_evidence, error: log Z and its standard error, nats.
    :param hit_rate: probability that the prior's sentence has the word.
    :param prior_ess, prompt_ess: relative effective sample size of the prior and of the zero-shot prompt, Z / E[w] over
        the posterior's sentences: a few draws of either seldom have the word, and say nothing of it.
    :param mutual: log p(keyword | sentence) − log Z at the sentence that the pair was simulated with, nats: its mean is
        the mutual information of sentence and keyword.
    """

    beginning: str
    keyword: str
    log_evidence: float
    error: float
    hit_rate: float
    prior_ess: float
    mutual: float
    prompt_ess: float


def held_out_pairs() -> list[HeldOutPair]:
    """Shipped numbers of long runs (``benchmarks/amortization.py references``), the easiest first."""
    text = resources.files("llmppl.demo").joinpath("keyword_references.json").read_text(encoding="utf-8")
    return [HeldOutPair(**row) for row in json.loads(text)]


def zero_shot(program: Program, lm: LM) -> PromptGuide:
    """The model told in words what to do: a chat whose answer begins with the story."""

    # The turns of the model's chat template, without the system message that it puts before them.
    user = lm.encode("<|im_start|>user\n", special=True)
    assistant = lm.encode("<|im_end|>\n<|im_start|>assistant\n", special=True)

    def asked(beginning: str, keyword: str) -> list[Any]:
        request = f'Go on with the story in one sentence that has the word "{keyword}" in it.'
        return [user, request, assistant, beginning]

    return PromptGuide(program, lm, prompt={"sentence": asked})


def prior(program: Program, lm: LM) -> PromptGuide:
    """The prior as a proposal: told the beginning only."""
    return PromptGuide(program, lm, prompt={"sentence": lambda beginning: [beginning]})


def train(
    program: Program, guide: WordGuide, pairs: SimulatedSet, held_out: SimulatedSet, steps: int, seed: int
) -> History:
    """The sleep phase on simulated sentences, every one of which teaches all of its words."""
    return fit(
        program,
        guide,
        pairs,
        WakeSleep(1, insomnia=0.0, exhaust=["keyword"]),
        steps=steps,
        batch_size=min(16, len(pairs)),
        vectorize_data=True,
        learning_rate=3e-3,
        warmup_steps=5,
        schedule="cosine",
        evaluation=Evaluation(pairs=held_out, every=max(steps // 4, 1)),
        seed=seed,
    )


@dataclass
class Proposal:
    """What a proposal gave for one pair, and what it cost.

    :param relative_ess: (mean w)² / mean w², with the reference's mean or that of the draws, whichever is less; draws
        without a hit count as half an effective sample together.
    """

    name: str
    posterior: Posterior
    cpu_seconds: float
    relative_ess: float

    @property
    def hits(self) -> float:
        return 1 - float(self.posterior.impossible) / self.posterior.num_samples

    @property
    def seconds_a_sample(self) -> float:
        return self.cpu_seconds / self.posterior.num_samples

    @property
    def seconds_an_effective_sample(self) -> float:
        return self.seconds_a_sample / self.relative_ess if self.relative_ess > 0 else math.inf


def propose(
    name: str, program: Program, guide: Program, pair: HeldOutPair, num_samples: int, seed: int, defensive: float = 0.0
) -> Proposal:
    """Importance sampling of one pair."""
    return measured(name, importance(program, guide, num_samples, progress=False, defensive=defensive), pair, seed)


def search(program: Program, lm: LM, pair: HeldOutPair, seconds: float, num_samples: int, seed: int) -> Proposal:
    """The better of :func:`searches`, its heaviest texts first."""
    found = searches(program, lm, pair, seconds, num_samples, seed).values()
    best = min(found, key=lambda proposal: proposal.seconds_an_effective_sample)
    return replace(best, posterior=_best_first(best.posterior))


def searches(
    program: Program, lm: LM, pair: HeldOutPair, seconds: float, num_samples: int, seed: int
) -> dict[str, Proposal]:
    """Search for one pair at a given cost: sequential Monte Carlo with the program's own proposals, and the best of so
    many zero-shot answers.

    :param seconds: CPU seconds that each may take, roughly.
    :param num_samples: of a first try, which shows what a sample costs.
    """
    found = {}
    asked = zero_shot(program, lm)
    for name, run in (
        ("smc", lambda count: smc(program, None, count, progress=False)),
        ("best of n", lambda count: importance(program, asked, count, progress=False)),
    ):
        first = measured(name, run(num_samples), pair, seed)
        count = int(num_samples * seconds / first.cpu_seconds)
        found[name] = measured(name, run(count), pair, seed + 1) if count > num_samples else first
    # Both draw from what the references are of: the keyword is seen only where a sentence has ended.
    found["smc"].relative_ess, found["best of n"].relative_ess = pair.prior_ess, pair.prompt_ess
    return found


def _best_first(posterior: Posterior) -> Posterior:
    return posterior.taken(np.argsort(-posterior.log_weights, kind="stable"))


def measured(name: str, run: Callable[..., Posterior], pair: HeldOutPair, seed: int) -> Proposal:
    """One inference of one pair, and what it cost."""
    pyro.set_rng_seed(seed)
    start = time.process_time()
    try:
        posterior = run(pair.beginning, pair.keyword)
    except NoWeightError as error:
        posterior = error.posterior
    seconds, num_samples = time.process_time() - start, posterior.num_samples
    squares = np.logaddexp.reduce(2 * posterior.log_weights) - math.log(num_samples)
    # Draws that miss the heaviest weights make the former too large, a reference that is too low the latter.
    own = float(posterior.ess) / num_samples if np.isfinite(squares) else 0.0
    known = math.exp(2 * pair.log_evidence - squares) if np.isfinite(squares) else 0.0
    # Weights after resampling are alike, and say nothing of how far the draws are from the posterior.
    ess = own if posterior.method == "smc" else min(known, own)
    ess = max(ess, 0.5 / num_samples)  # no hit, half an effective sample: a mean over pairs needs a number
    return Proposal(name, posterior, seconds, ess)


def table(rows: dict[str, list[Proposal]], pairs: Sequence[HeldOutPair]) -> str:
    """Means over the pairs. The relative ESS of prior and prompt is that of the long runs: few draws seldom hit a rare
    word."""
    width = max(map(len, rows))
    lines = [f"{'proposal':<{width}}   hits   relative ESS   log Ẑ − log Z   CPU s/sample   CPU s/effective sample"]
    for name, proposals in rows.items():
        ess = [p.relative_ess for p in proposals]
        if name in ("prior", "zero-shot prompt"):
            ess = [pair.prior_ess if name == "prior" else pair.prompt_ess for pair in pairs]
        cost = np.array([p.seconds_a_sample / e if e > 0 else np.inf for p, e in zip(proposals, ess, strict=True)])
        found = np.array([float(p.posterior.log_evidence) for p in proposals])
        difference = found - np.array([pair.log_evidence for pair in pairs])
        bias = f"{difference.mean():13.2f}" if np.isfinite(difference).all() else f"{'−∞':>13}"
        typical = math.exp(np.log(cost).mean()) if np.isfinite(cost).all() else math.inf
        shown = f"{typical:22.2f}" if math.isfinite(typical) else f"{'∞':>22}"
        lines.append(
            f"{name:<{width}}  {np.mean([p.hits for p in proposals]):4.0%}   {np.mean(ess):12.3f}   {bias}   "
            f"{np.mean([p.seconds_a_sample for p in proposals]):12.2f}   {shown}"
        )
    return "\n".join(lines)


def texts(proposal: Proposal, count: int = 3) -> list[str]:
    """Some of the texts as drawn, those of weight zero marked."""
    posterior = proposal.posterior
    found = zip(posterior.decode("sentence")[:count], posterior.log_weights[:count], strict=True)
    return [("  " if np.isfinite(weight) else "✗ ") + text.strip().replace("\n", "⏎") for text, weight in found]


def run(num_pairs: int, steps: int, samples: int, held_out: int, seed: int, save: Path | None, count: int) -> None:
    """Simulate, train, compare, print; see ``llmppl demo --help``.

    :param count: threads of torch.
    """
    start = time.monotonic()
    with threads(count):
        lm = LM.from_pretrained("smollm2-135m")
        program = keyword(lm)
        print(lm)
        print("\nProgram: p(sentence | beginning) p(keyword | sentence), a keyword being any content word.")
        guide = WordGuide(program, lm, seed=seed)
        print(guide, flush=True)
        begun = time.process_time()
        pairs = simulate(program, [(text, SOME_WORD) for text in beginnings()], num_pairs, seed=seed)
        unseen = simulate(program, [(text, SOME_WORD) for text in beginnings(held_out=True)], UNSEEN, seed=seed + 1)
        history = train(program, guide, pairs, unseen, steps, seed)
        spent = time.process_time() - begun
        print(f"{pairs}, and {len(unseen)} held out.\n{history}\n{spent:.0f} CPU s for pairs and training.", flush=True)
        if save is not None:
            guide.save(save)
            print(f"saved to {save}")
        guides: dict[str, tuple[Program, float]] = {
            "prior": (prior(program, lm), 0.0),
            "zero-shot prompt": (zero_shot(program, lm), 0.0),
            "trained here": (guide, DEFENSIVE),
        }
        if shipped_guide().is_file():
            shipped = WordGuide(program, lm)
            shipped.load(shipped_guide())
            guides["shipped guide"] = (shipped, DEFENSIVE)
        # Rarer words are names and slips; a reference of hundreds of samples does not pin their log Z down.
        known = [pair for pair in held_out_pairs() if pair.hit_rate > RAREST]
        chosen = [known[n * (len(known) - 1) // max(held_out - 1, 1)] for n in range(held_out)]
        names = list(guides)
        rows: dict[str, list[Proposal]] = {name: [] for name in (*names[:2], SEARCH, *names[2:])}
        for n, pair in enumerate(chosen):
            shown = textwrap.fill(f"{pair.beginning}  [{pair.keyword}]", 110)
            print(f"\n{shown}\n  The prior's sentence has the word in {pair.hit_rate:.2%}.", flush=True)
            for name, (proposal, defensive) in guides.items():
                rows[name].append(propose(name, program, proposal, pair, samples, seed + n, defensive))
            # Search may take as long as the guide took.
            cost = rows["trained here"][-1].cpu_seconds
            rows[SEARCH].append(search(program, lm, pair, cost, max(samples // 2, 2), seed + n))
            if n < 3:
                for name, column in rows.items():
                    which = f" ({column[-1].name})" if name == SEARCH else ""
                    print(f"  {name}{which}:", *texts(column[-1]), sep="\n      ", flush=True)
        _print_summary(rows, chosen, samples, spent, time.monotonic() - start)


def _print_summary(
    rows: dict[str, list[Proposal]], pairs: Sequence[HeldOutPair], samples: int, spent: float, seconds: float
) -> None:
    print(
        f"\n✗: without the word, and of weight zero. Means over {len(pairs)} held-out pairs, {samples} samples each "
        "(geometric for the cost;\nno hit counts as half an effective sample); log Z from long runs; guides draw "
        f"{DEFENSIVE:.0%} from the prior.\n"
    )
    print(table(rows, pairs))
    here = [p.seconds_an_effective_sample for p in rows["trained here"]]
    before = [p.seconds_a_sample / pair.prior_ess for p, pair in zip(rows["prior"], pairs, strict=True)]
    ratio = math.exp(np.mean(np.log(before)) - np.mean(np.log(here)))
    # An answer is worth a hundred effective samples here.
    saved = 100 * (np.mean(before) - np.mean(here))
    print(
        f"\nThe guide trained here is {ratio:.1f} times cheaper for each effective sample than the prior. Its training "
        + (
            f"has paid after {max(spent / saved, 0.1):.1f} queries of 100 effective samples each"
            if saved > 0
            else "does not pay here"
        )
        + f". {seconds:.0f} s in all."
    )


def write(beginning: str, word: str, path: Path, samples: int, seed: int, count: int) -> Posterior:
    """The posterior of the user's own sentence, by a saved guide."""
    with threads(count), torch.no_grad():
        lm = LM.from_pretrained("smollm2-135m")
        program = keyword(lm)
        guide = WordGuide(program, lm)
        guide.load(path)
        pyro.set_rng_seed(seed)
        return importance(program, guide, samples, defensive=DEFENSIVE)(beginning.strip(), word)
