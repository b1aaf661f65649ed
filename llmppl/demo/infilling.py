"""The main job on a real language model: infill the missing sentence of a story."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pyro
import torch

from llmppl.guides import AutoregressiveGuide, PromptGuide, TextGuide
from llmppl.inference.importance import importance
from llmppl.language_model import LM
from llmppl.models import ending_first, infilling
from llmppl.objectives import TrajectoryBalance
from llmppl.objectives.behaviour import Behaviour
from llmppl.posterior.inference_gap import best_log_evidence, inference_gap
from llmppl.posterior.posterior import Posterior
from llmppl.programs.structure import Program
from llmppl.training.fit import fit
from llmppl.training.history import History

HELD_OUT = 12
RANK = 4
PARTICLES = 12
STORIES_A_STEP = 3
BEHAVIOUR = Behaviour(tempered=0.5, temperatures=(1.3, 1.3))
LEARNING_RATE = 1e-3
WARMUP_STEPS = 5


def stories() -> list[tuple[str, str]]:
    """The shipped stories as (beginning, ending): the fourth sentence of five is left out."""
    return [(" ".join(s[:3]), " " + s[4]) for s in sentences_of_stories()]


def sentences_of_stories() -> list[list[str]]:
    """The shipped stories, five sentences each."""
    lines = resources.files("llmppl.demo").joinpath("stories.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["sentences"] for line in lines]


def split(data: Sequence[tuple[str, str]], held_out: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training stories, and the first ``held_out`` of those that no shipped adapter has seen."""
    return list(data[:-HELD_OUT]), list(data[-HELD_OUT:][:held_out])


def shipped_adapter() -> Path:
    """An adapter trained for longer, with replay; see its README."""
    return Path(str(resources.files("llmppl.demo").joinpath("adapters", "infilling.safetensors")))


def make_guide(story: Program, lm: LM, seed: int | None = None) -> AutoregressiveGuide:
    """The guide that the demo trains, and that its adapters fit."""
    return AutoregressiveGuide(story, lm, prompt={"middle": ending_first}, rank=RANK, seed=seed)


def prior_guide(story: Program, lm: LM) -> PromptGuide:
    """The prior as a proposal: it is told the beginning only."""
    return PromptGuide(story, lm, prompt={"middle": lambda beginning: [beginning]})


def train(
    story: Program, guide: AutoregressiveGuide, data: Sequence[tuple[str, str]], steps: int, seed: int
) -> History:
    return fit(
        story,
        guide,
        list(data),
        TrajectoryBalance(PARTICLES, behaviour=BEHAVIOUR),
        steps=steps,
        batch_size=STORIES_A_STEP,
        vectorize_data=True,
        learning_rate=LEARNING_RATE,
        warmup_steps=WARMUP_STEPS,
        seed=seed,
    )


@dataclass
class Proposal:
    """A guide's posteriors of several stories, and what they cost."""

    name: str
    posterior: Posterior
    cpu_seconds: float

    @property
    def seconds_a_sample(self) -> float:
        return self.cpu_seconds / self.posterior.log_weights.size

    @property
    def seconds_an_effective_sample(self) -> float:
        return self.cpu_seconds / float(self.posterior.ess.sum())


def propose(
    name: str, story: Program, guide: TextGuide, data: Sequence[tuple[str, str]], num_samples: int, seed: int
) -> Proposal:
    pyro.set_rng_seed(seed)
    start = time.process_time()
    run = importance(story, guide, num_samples, vectorize_data=True)
    posterior = run([b for b, _ in data], [e for _, e in data])
    return Proposal(name, posterior, time.process_time() - start)


def table(proposals: Sequence[Proposal]) -> str:
    """Means over the stories, nats, with the standard error of the gap over stories."""
    references = [p.posterior for p in proposals]
    evidence, _ = best_log_evidence(references)
    width = max(len(p.name) for p in proposals)
    count = evidence.size
    lines = [
        f"Mean over {count} held-out stories, {proposals[0].posterior.num_samples} samples each, in nats. "
        "log Z stands for the best log Ẑ of all proposals,",
        f"{evidence.mean():.2f} on average: a lower bound in expectation, and so are the gaps.",
        "",
        f"{'proposal':<{width}}     ELBO    log Ẑ     gap ± s.e.   ESS     k̂   CPU s/sample   CPU s/effective sample",
    ]
    for p in proposals:
        gap = inference_gap(p.posterior, *references).gap
        error = gap.std(ddof=1) / np.sqrt(count) if count > 1 else float("nan")
        khat = p.posterior.khat
        shown = f"{np.median(khat[~np.isnan(khat)]):5.2f}" if not np.isnan(khat).all() else "  n/a"
        lines.append(
            f"{p.name:<{width}}  {p.posterior.elbo.mean():7.2f}  {p.posterior.log_evidence.mean():7.2f}  "
            f"{gap.mean():6.2f} ± {error:4.2f}  {p.posterior.ess.mean():4.1f}  {shown}   {p.seconds_a_sample:12.2f}   "
            f"{p.seconds_an_effective_sample:22.2f}"
        )
    return "\n".join(lines)


def side_by_side(
    proposals: Sequence[Proposal], data: Sequence[tuple[str, str]], rows: int, lines: int = 4
) -> Iterator[str]:
    """Samples of each proposal as drawn, for the first ``rows`` stories."""
    for n, (beginning, ending) in enumerate(data[:rows]):
        yield "\n" + textwrap.fill(f"{beginning}  ____  {ending.strip()}", 110)
        texts = [[_one_line(t) for t in p.posterior.row(n).decode("middle")[:lines]] for p in proposals]
        for p, column in zip(proposals, texts, strict=True):
            yield f"  {p.name}, ELBO {p.posterior.elbo[n]:.1f}:"
            yield from (f"      {text}" for text in column)


def _one_line(text: str) -> str:
    return text.strip().replace("\n", "⏎")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's threads for a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(steps: int, samples: int, held_out: int, seed: int, save: Path | None, threads_used: int) -> None:
    """Train, compare, print; see ``llmppl demo --help``."""
    start = time.monotonic()
    with threads(threads_used):
        lm = LM.from_pretrained("smollm2-135m")
        print(lm)
        story = infilling(lm)
        training, held = split(stories(), held_out)
        print(
            f"\nProgram: p(middle | beginning) p(ending | beginning, middle). {len(training)} stories to train on, "
            f"{len(held)} held out.\n"
        )
        guide = make_guide(story, lm, seed)
        print(guide, flush=True)
        history = train(story, guide, training, steps, seed)
        print(history)
        if save is not None:
            guide.save(save, dtype=torch.float16)
            print(f"saved to {save}")
        guides: dict[str, TextGuide] = {
            "prior": prior_guide(story, lm),
            "prompt guide": PromptGuide(story, lm, prompt={"middle": ending_first}),
            f"trained here, {steps} steps": guide,
        }
        if shipped_adapter().is_file():
            shipped = make_guide(story, lm)
            shipped.load(shipped_adapter())
            guides["shipped adapter"] = shipped
        proposals = []
        print()
        for name, proposal in guides.items():
            print(f"importance sampling with: {name}", flush=True)
            proposals.append(propose(name, story, proposal, held, samples, seed))
        shown = [p for p in proposals if p.name != "prior"]
        for line in side_by_side(shown, held, rows=3):
            print(line)
        print("\n" + table(proposals))
        trained = inference_gap(proposals[2].posterior, *[p.posterior for p in proposals]).gap.mean()
        prompted = inference_gap(proposals[1].posterior, *[p.posterior for p in proposals]).gap.mean()
        print(
            f"\nThe guide trained here has {trained / prompted:.0%} of the prompt guide's gap. "
            f"{time.monotonic() - start:.0f} s in all."
        )


def infill(beginning: str, ending: str, adapter: Path, samples: int, seed: int, threads_used: int) -> list[Proposal]:
    """Posteriors of the middle of the user's own story, by the prompt guide and by a saved guide."""
    with threads(threads_used):
        lm = LM.from_pretrained("smollm2-135m")
        story = infilling(lm)
        guide = make_guide(story, lm)
        guide.load(adapter)
        data = [(beginning.strip(), " " + ending.strip())]
        prompted = PromptGuide(story, lm, prompt={"middle": ending_first})
        return [
            propose("prompt guide", story, prompted, data, samples, seed),
            propose(f"guide of {adapter.name}", story, guide, data, samples, seed),
        ]
