"""Beside test-time engines: CPU seconds per effective sample, and when a trained guide pays.

    python benchmarks/against_engines.py --engine-python ENGINES/bin/python
    python benchmarks/against_engines.py --engine-python ENGINES/bin/python --program keyword

With ``--program keyword`` the engines stand in the comparison of ``amortization.py``, on its 24 pairs. Otherwise:

The task is the demo's: p(middle | beginning) p(ending | beginning, middle), with a middle of at most 16 tokens, on
stories that no guide has seen. ``importance`` with the prior, the prompt guide and the shipped trained guide, and
plain importance sampling by genlm-control and LLaMPPL (``engine_worker.py``) run in turn on each story with the same
model, one thread, float32. The engines need an environment of their own:

    python -m venv ENGINES
    ENGINES/bin/pip install -c constraints.txt torch==2.13.0 genlm-control llamppl

It prints a Markdown table for one short story and one for the held-out stories, how far the engines' log-weights are
from ours on the engines' own samples, what training costs, and from how many queries on it is paid back.

Two effective sample sizes are shown. *ESS* is (Σw)²/Σw² of a run's own weights: with a poor proposal it saturates
and is too large, as the run does not know what it has missed. *Reference ESS* is K Z / E_posterior[w], the number of
posterior draws that K samples are worth: a property of the proposal, whoever draws from it. Both expectations come
from all our samples of a story, pooled under their mixture's density (balance heuristic, Veach and Guibas 1995). The
pool also has one text that is chosen, not drawn: the ending itself as the middle, a repetition that language models
think probable. A mode that the whole pool misses stays unseen, and with few samples the number is noisy.

``--stories 3 --particles 8 32`` takes about 15 CPU minutes, the default about three times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from llmppl import LM, importance
from llmppl.demo import infilling as demo
from llmppl.files.packaged_model import packaged_folder
from llmppl.guides import PromptGuide, TextGuide
from llmppl.models import ending_first, infilling
from llmppl.text import PAD

Array = NDArray[np.float64]
NONE: Array = np.empty(0)
Story = tuple[str, str]
Guides = dict[str, TextGuide]

MAX_TOKENS = 16
SHORT_STORY: Story = ("Anna was thirsty.", " She drank it all.")
SHIPPED_STEPS = 110
"""Training steps of the shipped adapter; see llmppl/demo/adapters/README.md."""
PROMPTS: dict[str, Callable[[str, str], list[Any]]] = {
    "prior": lambda beginning, ending: [beginning],
    "prompt guide": ending_first,
    "trained guide": ending_first,
}
"""What each proposal is told."""
CHECKED = 8
"""Engine samples a run whose log-weights are computed again."""


def cpu_seconds() -> float:
    """User and system time of this process and its children."""
    return sum(os.times()[:4])


def log_mean(values: Array) -> float:
    return float(np.logaddexp.reduce(values) - np.log(len(values)))


def kish(log_weights: Array) -> float:
    return float(np.exp(2 * np.logaddexp.reduce(log_weights) - np.logaddexp.reduce(2 * log_weights)))


# --- methods: a story and a number of samples -> weighted samples and their cost ----------------------------------


@dataclass
class Run:
    """One story's weighted samples."""

    cpu: float
    texts: Tensor  # (K, MAX_TOKENS)
    log_weights: Array  # (K,), empty for plain generation
    log_joint: Array  # (K,), log p(x, z); of our runs only


@dataclass
class Method:
    name: str
    proposal: str
    draw: Callable[[Story, int, int], Run]
    engine: bool = False
    weighted: bool = True
    runs: dict[int, list[Run]] = field(default_factory=dict)

    def total(self, count: int) -> float:
        return sum(run.cpu for run in self.runs[count])

    def ess(self, count: int) -> float:
        """Summed over the stories."""
        return sum(kish(run.log_weights) for run in self.runs[count])


def ours(guide: TextGuide, story: Story, count: int, seed: int) -> Run:
    pyro.set_rng_seed(seed)
    start = cpu_seconds()
    posterior = importance(guide.model, guide, count, progress=False)(*story)
    cpu = cpu_seconds() - start
    texts = torch.as_tensor(posterior.samples["middle"])
    return Run(cpu, texts, posterior.log_weights, posterior.log_joint)


def generation(lm: LM, stop: list[int], story: Story, count: int, seed: int) -> Run:
    """The transformers library's own sampling of the prior, without any weights."""
    torch.manual_seed(seed)
    start = cpu_seconds()
    with lm.using(None), torch.no_grad():
        ids = lm.context(story[0]).expand(count, -1)
        values = lm.transformer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=stop,
            pad_token_id=stop[0],
        )
    return Run(cpu_seconds() - start, values[:, ids.shape[1] :], NONE, NONE)


class Engine:
    """An engine in a process of its own environment, asked story by story."""

    def __init__(self, name: str, python: str, folder: Path) -> None:
        worker = Path(__file__).with_name("engine_worker.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("PYTHONPATH", None)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, str(worker), name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        self.versions: dict[str, str] = self._answer()["versions"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            error = self.errors.read().strip().splitlines()
            raise RuntimeError(error[-1] if error else f"it ended with status {self.process.wait()}")
        return dict(json.loads(line))

    def draw(self, lm: LM, stop: list[int], prompted: bool, story: Story, count: int, seed: int) -> Run:
        request = {
            "beginning": story[0],
            "ending": lm.encode(story[1]).tolist(),
            "prompt": lm.context(*ending_first(*story)).tolist() if prompted else None,
            "stop": stop,
            "max_tokens": MAX_TOKENS,
            "num_samples": count,
            "seed": seed,
        }
        return self.ask(request)

    def ask(self, request: dict[str, Any]) -> Run:
        """The answer to a request of ``engine_worker.py``."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        texts = torch.full((request["num_samples"], request["max_tokens"]), PAD)
        for row, middle in zip(texts, answer["middles"], strict=True):
            row[: len(middle)] = torch.tensor(middle)
        return Run(answer["cpu_seconds"], texts, np.array(answer["log_weights"]), NONE)

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()
        self.errors.close()


def engines(python: str | None, folder: Path) -> Iterator[tuple[str, Engine]]:
    """Those that start; why another does not is printed."""
    if python is None:
        print(
            "No engines: pass --engine-python, the interpreter of an environment that has them. Make one with\n"
            "  python -m venv ENGINES\n"
            "  ENGINES/bin/pip install -c constraints.txt torch==2.13.0 genlm-control llamppl\n"
        )
        return
    for name in ("genlm-control", "llamppl"):
        try:
            yield name, Engine(name, python, folder)
        except (RuntimeError, OSError) as error:
            print(f"{name} is left out: it does not run in the environment of {python} ({error}).\n")


# --- the densities of the same texts, for the check and the reference ---------------------------------------------


@torch.no_grad()
def log_joint(lm: LM, story: Story, texts: Tensor) -> Array:
    middle = lm(story[0], max_tokens=MAX_TOKENS, stop=".").log_prob(texts)
    ending = lm(story[0], texts).log_prob(lm.encode(story[1]))
    return (middle + ending).double().numpy()


@torch.no_grad()
def log_density(lm: LM, guides: Guides, proposal: str, story: Story, texts: Tensor) -> Array:
    """log q of texts that the guide need not have drawn."""
    prior = lm(story[0], max_tokens=MAX_TOKENS, stop=".")
    context = lm.context(*PROMPTS[proposal](*story))
    return guides[proposal].distribution("middle", prior, context).log_prob(texts).double().numpy()


def largest_difference(lm: LM, guides: Guides, proposal: str, stories: Sequence[Story], runs: Sequence[Run]) -> float:
    """Between the log-weights of an engine and ours of the same samples, nats."""
    differences = []
    for story, run in zip(stories, runs, strict=True):
        texts = run.texts[:CHECKED]
        again = log_joint(lm, story, texts) - log_density(lm, guides, proposal, story, texts)
        differences.append(np.abs(run.log_weights[:CHECKED] - again).max())
    return float(max(differences))


def repetition(lm: LM, story: Story) -> Tensor:
    """The ending as a middle, ``(1, MAX_TOKENS)``: up to its first stop token, or closed by one."""
    stop = lm(story[0], max_tokens=MAX_TOKENS, stop=".").law.stop.tolist()
    ids = lm.encode(story[1]).tolist()
    end = next((n for n, token in enumerate(ids) if token in stop), len(ids))
    ids = ([*ids[:end], ids[end] if end < len(ids) else stop[0]])[:MAX_TOKENS]
    return torch.tensor([ids + [PAD] * (MAX_TOKENS - len(ids))])


@dataclass
class Reference:
    log_evidence: float
    efficiency: dict[str, float]
    """Reference ESS a sample, by proposal."""


def reference(lm: LM, guides: Guides, story: Story, runs: dict[str, Run]) -> Reference:
    """Z / E_posterior[w] of every proposal, from the samples of all of them."""
    repeated = repetition(lm, story)
    groups = {**{name: run.texts for name, run in runs.items()}, "repeated": repeated}
    texts = torch.cat(list(groups.values()))
    joint = np.concatenate([*(run.log_joint for run in runs.values()), log_joint(lm, story, repeated)])
    densities = {}
    for name, run in runs.items():
        others = torch.cat([group for other, group in groups.items() if other != name])
        sizes = [len(group) for other, group in groups.items() if other != name]
        scores = iter(np.split(log_density(lm, guides, name, story, others), np.cumsum(sizes)[:-1]))
        # A run's own texts have their density from sampling.
        parts = [run.log_joint - run.log_weights if other == name else next(scores) for other in groups]
        densities[name] = np.concatenate(parts)
    # The chosen text is a stratum of its own, with a density of one at this text and none elsewhere.
    chosen = np.where((texts == repeated).all(-1).numpy(), 0.0, -np.inf)
    shares = np.log([len(group) / len(texts) for group in groups.values()])[:, None]
    mixture = np.logaddexp.reduce(shares + np.stack([*densities.values(), chosen]), axis=0)
    weights = joint - mixture
    evidence = log_mean(weights)
    # E_posterior[w] is sum_i W_i w(z_i), with W the pool's normalised weights.
    posterior = weights - np.logaddexp.reduce(weights)
    return Reference(
        evidence,
        {name: float(np.exp(evidence - np.logaddexp.reduce(posterior + joint - q))) for name, q in densities.items()},
    )


# --- the report -----------------------------------------------------------------------------------------------------


def table(methods: Sequence[Method], counts: Sequence[int], references: Sequence[Reference]) -> str:
    lines = [
        "| method | proposal | K | ELBO | log Ẑ | ESS | CPU s / sample | CPU s / effective sample | cheaper than "
        "the better engine | reference ESS | CPU s / reference effective sample | cheaper |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for count in counts:
        best = engine_costs(methods, count, references)
        for m in methods:
            runs = m.runs[count]
            size = len(runs)
            cost = f"{m.total(count) / (count * size):.2f}"
            if not m.weighted:
                lines.append(f"| {m.name} | {m.proposal} | {count} | | | | {cost} | | | | | |")
                continue
            own, pooled = costs(m, count, references)
            elbo = np.mean([run.log_weights.mean() for run in runs])
            evidence = np.mean([log_mean(run.log_weights) for run in runs])
            ratio = ["", ""] if best is None else [f"{best[0] / own:.2g}×", f"{best[1] / pooled:.2g}×"]
            lines.append(
                f"| {m.name} | {m.proposal} | {count} | {elbo:.1f} | {evidence:.1f} | {m.ess(count) / size:.1f} "
                f"| {cost} | {own:.2f} | {ratio[0]} | {m.total(count) / pooled / size:.2g} | {pooled:.2g} "
                f"| {ratio[1]} |"
            )
    return "\n".join(lines)


def costs(method: Method, count: int, references: Sequence[Reference]) -> tuple[float, float]:
    """CPU seconds per effective sample: by the run's own ESS, by the reference's."""
    pooled = sum(count * reference.efficiency[method.proposal] for reference in references)
    return method.total(count) / method.ess(count), method.total(count) / pooled


def engine_costs(methods: Sequence[Method], count: int, references: Sequence[Reference]) -> tuple[float, float] | None:
    """The better engine's, for each of the two."""
    found = [costs(m, count, references) for m in methods if m.engine]
    return (min(own for own, _ in found), min(pooled for _, pooled in found)) if found else None


def break_even(training: float, other: float, guide: float, wanted: float) -> str:
    """Queries of ``wanted`` effective samples until training is paid, given both costs an effective sample."""
    if guide >= other:
        return "never"
    return f"{np.ceil(training / (wanted * (other - guide))):,.0f}"


def training_lines(
    training: float, what: str, methods: Sequence[Method], count: int, references: Sequence[Reference], wanted: float
) -> Iterator[str]:
    guide = costs(next(m for m in methods if m.proposal == "trained guide"), count, references)
    yield f"Training the guide takes {training:,.0f} CPU s ({what}). Queries of {wanted:g} effective samples until it"
    yield f"is paid back, at the costs of K = {count} on the held-out stories:"
    yield ""
    yield "| instead of | by ESS | by reference ESS |"
    yield "|---|--:|--:|"
    for m in methods:
        if m.weighted and m.proposal != "trained guide":
            own, pooled = costs(m, count, references)
            first, second = (break_even(training, a, b, wanted) for a, b in ((own, guide[0]), (pooled, guide[1])))
            yield f"| {m.name}, {m.proposal} | {first} | {second} |"


def machine(started: Sequence[Engine]) -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    here = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions = ", ".join(
        dict.fromkeys(
            f"{name} {version}" for found in [here, *(e.versions for e in started)] for name, version in found.items()
        )
    )
    return f"{names[0] if names else 'unknown CPU'}, {torch.get_num_threads()} thread, float32; {versions}."


# --- the benchmark --------------------------------------------------------------------------------------------------


def compare(
    title: str,
    lm: LM,
    stories: Sequence[Story],
    methods: Sequence[Method],
    guides: Guides,
    counts: Sequence[int],
    seed: int,
) -> list[Reference]:
    """Run every method on every story in turn, so that other load on the machine hits all alike."""
    for method in methods:
        method.runs = {count: [] for count in counts}
    for number, story in enumerate(stories):
        for count in counts:
            for method in methods:
                print(f"story {number + 1}, K = {count}: {method.name}, {method.proposal}", file=sys.stderr)
                method.runs[count].append(method.draw(story, count, seed + number))
    most = max(counts)
    references = []
    for number, story in enumerate(stories):
        pool = {m.proposal: m.runs[most][number] for m in methods if m.weighted and not m.engine}
        references.append(reference(lm, guides, story, pool))
    print(f"\n## {title}\n\n{table(methods, counts, references)}\n")
    pooled = ", ".join(f"{r.log_evidence:.1f}" for r in references)
    print(f"Means over stories; costs are totals over totals. log Ẑ of the pool, by story: {pooled}.")
    for method in methods:
        if method.engine:
            error = largest_difference(lm, guides, method.proposal, stories, method.runs[most])
            evidence = ", ".join(f"{log_mean(run.log_weights):.1f}" for run in method.runs[most])
            print(
                f"{method.name}, {method.proposal}: log Ẑ by story {evidence}; log-weights of its samples differ from "
                f"ours by at most {error:.1g} nats."
            )
    print()
    return references


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", help="interpreter of an environment with genlm-control and llamppl")
    parser.add_argument("--program", choices=["infilling", "keyword"], default="infilling")
    parser.add_argument("--stories", type=int, default=4, help="held-out stories, at most 12")
    parser.add_argument("--particles", type=int, nargs="+", default=[16, 64], help="samples a story; several runs")
    parser.add_argument("--wanted", type=float, default=10.0, help="effective samples a query, for the break-even")
    parser.add_argument("--train-steps", type=int, default=0, help="train a guide here instead of loading the shipped")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()

    folder = packaged_folder("smollm2-135m")
    lm = LM.from_pretrained(folder)
    if options.program == "keyword":
        import amortization

        started = dict(engines(options.engine_python, folder))
        print(f"{machine(list(started.values()))}\n")
        guides = {"shipped": amortization.demo.shipped_guide()}
        amortization.compare(lm, guides, max(options.particles), options.seed, engines=started)
        for engine in started.values():
            engine.close()
        return
    program = infilling(lm, MAX_TOKENS)
    stop = lm(SHORT_STORY[0], max_tokens=MAX_TOKENS, stop=".").law.stop.tolist()
    training_stories, held_out = demo.split(demo.stories(), options.stories)

    guide = demo.make_guide(program, lm, options.seed)
    start = cpu_seconds()
    if options.train_steps:
        demo.train(program, guide, training_stories, options.train_steps, options.seed)
        training, what = cpu_seconds() - start, f"{options.train_steps} steps, measured"
    else:
        steps = 2
        demo.train(program, guide, training_stories, steps, options.seed)
        each = (cpu_seconds() - start) / steps
        training, what = SHIPPED_STEPS * each, f"{SHIPPED_STEPS} steps of {each:.1f}, the mean of {steps} measured"
        guide.load(demo.shipped_adapter())
    guides: Guides = {
        "prior": demo.prior_guide(program, lm),
        "prompt guide": PromptGuide(program, lm, prompt={"middle": ending_first}),
        "trained guide": guide,
    }
    started = dict(engines(options.engine_python, folder))
    methods = [Method("llmppl", name, partial(ours, proposal)) for name, proposal in guides.items()]
    for name, engine in started.items():
        methods.append(Method(name, "prior", partial(engine.draw, lm, stop, False), engine=True))
        if name == "genlm-control":
            methods.append(Method(name, "prompt guide", partial(engine.draw, lm, stop, True), engine=True))
    methods.append(Method("transformers.generate", "prior", partial(generation, lm, stop), weighted=False))
    for method in methods:  # warm-up
        method.draw(("Tom lost his key.", " He found it."), 2, 0)

    print(f"{machine(list(started.values()))}\n")
    compare("One short story", lm, [SHORT_STORY], methods, guides, options.particles, options.seed)
    title = f"{len(held_out)} held-out stories"
    references = compare(title, lm, held_out, methods, guides, options.particles, options.seed)
    for line in training_lines(training, what, methods, max(options.particles), references, options.wanted):
        print(line)
    for engine in started.values():
        engine.close()


if __name__ == "__main__":
    main()
