r"""(r) Why is a refinement guide behind the prior: its length law, its order, or its network?

    python benchmarks/refinement.py --data ../shared/data --out runs/refinement.jsonl
    python benchmarks/refinement.py --out runs/refinement.jsonl --only floor-smollm2 smollm2
    python benchmarks/refinement.py --out runs/refinement.jsonl --plot docs/results/refinement.png

On pairs simulated from the program behind held-out beginnings, the held-out gain log q(z|x) − log p(z) is the mutual
information of text and observation less KL(p‖q): the prior's is zero, and one below zero is behind it. Exact parts:

- *length*: log q(n|x), less what the prior gives to stopping where the text stops and to going on where it goes on;
- *tokens*: those of the text given that, one a step from left to right, as the prior writes them;
- *steps*: what the same text loses when it is filled in fewer steps, and *order*: in a random one.

Of the steps some is lost by any network: tokens of one step are independent given those before. That floor is measured
without a guide, by the language model's own draws (:func:`floor`): the divergence from the prior's law of eight tokens
to the best law that fills them in so many steps, block by block.

The guides are trained as ``benchmarks/gap_filling.py`` trains them first (sleep in several numbers of steps in turn),
beside an autoregressive adapter by the same objective, and are judged after given CPU seconds: three ranks of adapter
on stories260K, one on SmolLM2, and the keyword program on stories260K. One thread. A result is a line of ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from gap_filling import SLEEP_STEPS, both_sides
from gap_filling import program as infilling
from measure import keep, machine, records, table

from llmppl import LM, fit
from llmppl.demo.infilling import split, stories
from llmppl.demo.keyword import SOME_WORD, beginnings
from llmppl.guides import AutoregressiveGuide, RefinementGuide
from llmppl.models import ending_first
from llmppl.models.keyword import keyword
from llmppl.network.unmasking import Plan, score, steps_of
from llmppl.objectives import WakeSleep
from llmppl.programs.simulation import simulate
from llmppl.programs.structure import Program
from llmppl.text import PAD

PARTS = ("base-small", "floor-small", "small", "keyword", "base-smollm2", "floor-smollm2", "smollm2")
BLOCK = 8
"""Tokens of the texts whose floor is measured."""


@dataclass
class Case:
    """A program, its rows, and pairs simulated from it behind beginnings that are not trained on."""

    lm: LM
    program: Program
    site: str
    sides: Callable[..., list[Any]]
    left: Callable[..., list[Any]]
    max_tokens: int
    rows: list[tuple[str, str]]
    pairs: list[tuple[tuple[str, str], torch.Tensor, dict[str, torch.Tensor], Any]]


def infilling_case(lm: LM, num_pairs: int, seed: int) -> Case:
    data, held_out = split(stories(), 12)
    return _case(lm, infilling(lm), "middle", both_sides, ending_first, 10, data, held_out, num_pairs, seed)


def keyword_case(lm: LM, num_pairs: int, seed: int) -> Case:
    """The sentence is told its word in front of the story, and behind the gap as well."""

    def left(beginning: Any, keyword: Any) -> list[Any]:
        return [keyword, "\n", beginning]

    def sides(beginning: Any, keyword: Any) -> list[Any]:
        return [keyword, "\n", beginning, ..., "\n", keyword]

    rows, held_out = ([(b, SOME_WORD) for b in beginnings(held)] for held in (False, True))
    return _case(lm, keyword(lm), "sentence", sides, left, 20, rows, held_out, num_pairs, seed)


def _case(
    lm: LM,
    program: Program,
    site: str,
    sides: Callable[..., list[Any]],
    left: Callable[..., list[Any]],
    max_tokens: int,
    rows: Sequence[tuple[str, str]],
    held_out: Sequence[tuple[str, str]],
    num_pairs: int,
    seed: int,
) -> Case:
    pyro.set_rng_seed(seed)
    pairs = []
    while len(pairs) < num_pairs:
        row = held_out[len(pairs) % len(held_out)]
        latents, seen = simulate(program, row, {})
        pairs.append((row, latents[site], seen, _law(site, program, row)))
    return Case(lm, program, site, sides, left, max_tokens, list(rows), pairs)


# --- the parts of the gain ------------------------------------------------------------------------


@torch.no_grad()
def prior_parts(case: Case) -> np.ndarray:
    """Log-probabilities of the held-out texts under the prior: of their lengths, of their tokens; ``(2, pairs)``."""
    found = []
    for _, text, _, fn in case.pairs:
        context, z = fn.context.reshape(-1), text.reshape(-1)
        context, z = context[context != PAD], z[z != PAD]
        logits = case.lm.transformer(torch.cat([context, z])[None]).logits[0, len(context) - 1 : -1]
        logits = logits[:, : case.lm.vocabulary] / fn.law.temperature
        stop = torch.zeros(logits.shape[-1], dtype=torch.bool)
        stop[fn.law.stop] = True
        length = torch.zeros((), dtype=torch.float64)
        tokens = torch.zeros((), dtype=torch.float64)
        for i, token in enumerate(z.tolist()):
            here = logits[i].double()
            if i + 1 == fn.law.max_tokens:  # the last one may be anything
                tokens += here.log_softmax(-1)[token]
                continue
            if i >= fn.law.min_tokens - 1:
                side = stop if stop[token] else ~stop
                length += here[side].logsumexp(0) - here.logsumexp(0)
            side = stop if stop[token] else ~stop
            tokens += here[token] - here[side].logsumexp(0)
        total = float(fn.log_prob(text).sum())
        if abs(total - float(length + tokens)) > 0.02:
            raise RuntimeError(f"the parts {float(length):.3f} and {float(tokens):.3f} do not make up {total:.3f}.")
        found.append([float(length), float(tokens)])
    return np.array(found).T


def plans(case: Case, thorough: bool) -> dict[str, Plan]:
    """The plan of one token a step from left to right first."""
    each = {"one token a step": Plan("left-to-right", steps=case.max_tokens)}
    each.update({f"{n} steps": Plan("left-to-right", steps=n) for n in (4, 2, 1)})
    if thorough:
        each["random order"] = Plan("random", steps=case.max_tokens)
        each["by confidence"] = Plan("confidence", steps=case.max_tokens)
    return each


@torch.no_grad()
def refinement_gain(case: Case, guide: RefinementGuide, prior: np.ndarray, thorough: bool) -> dict[str, Any]:
    """Its gain's parts, means and standard errors over the pairs."""
    laws = [_law(case.site, guide, row, observations=seen) for row, _, seen, _ in case.pairs]
    network, law = guide.network, laws[0].law
    texts = _stacked([text for _, text, _, _ in case.pairs], case.max_tokens)
    count = (texts != PAD).sum(-1)
    reading = network.read(_stacked([fn.context for fn in laws]), _stacked([fn.right for fn in laws]))
    length = network.length_log_probs(reading, law).gather(-1, (count - 1)[:, None])[:, 0].double().numpy()
    pyro.set_rng_seed(0)
    tokens = {}
    for name, plan in plans(case, thorough).items():
        steps = steps_of(network, law, plan, reading, texts, count)[0]
        tokens[name] = score(network, law, reading, texts, count, steps).sum(-1).double().numpy()
    one, *others = tokens
    parts = {"length": length - prior[0], "tokens": tokens[one] - prior[1]}
    parts |= {f"gain, {name}": length + tokens[name] - prior.sum(0) for name in tokens}
    parts |= {f"loss, {name}": tokens[name] - tokens[one] for name in others}
    return {name: _mean(values) for name, values in parts.items()}


@torch.no_grad()
def autoregressive_gain(case: Case, guide: AutoregressiveGuide, prior: np.ndarray) -> dict[str, Any]:
    logs = []
    for row, text, seen, _ in case.pairs:
        logs.append(float(_law(case.site, guide, row, observations=seen).log_prob(text).sum()))
    return {"gain": _mean(np.array(logs) - prior.sum(0))}


def _law(site: str, program: Program, row: tuple[str, str], **told: Any) -> Any:
    """The law of a site in a program or a guide; nothing is drawn from it."""
    laws = []

    class Caught(Exception):
        pass

    class Catch(pyro.poutine.messenger.Messenger):
        def _pyro_sample(self, msg: dict[str, Any]) -> None:
            if msg["name"] == site:
                laws.append(msg["fn"])
                raise Caught

    with contextlib.suppress(Caught), Catch():
        program(*row, **told)
    return laws[0]


def _stacked(rows: Sequence[torch.Tensor], width: int | None = None) -> torch.Tensor:
    flat = [row.reshape(-1) for row in rows]
    flat = [row[row != PAD] for row in flat]
    found = torch.full((len(flat), width or max(len(row) for row in flat)), PAD)
    for n, row in enumerate(flat):
        found[n, : len(row)] = row
    return found


def _mean(values: np.ndarray) -> list[float]:
    return [float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))]


# --- what no network can regain -------------------------------------------------------------------


@torch.no_grad()
def floor(
    lm: LM, contexts: Sequence[str], draws: int, rollouts: int, temperature: float, seed: int
) -> list[dict[str, Any]]:
    """KL in nats from the law of ``BLOCK`` tokens behind a context to the best one of a few steps, left to right.

    The best law of a step has each token's marginal given the blocks before, so that the divergence is, token by token,
    its mutual information with the tokens before it in its block. The marginal is the mean of the model's predictions
    over rollouts of the block: without the text's own prediction that is an upper bound, with it a lower one, at most
    the logarithm of their number for each token [1]. Both come together with the number of rollouts.

    References

    [1] Poole et al. (2019), `On variational bounds of mutual information`.
    """
    pyro.set_rng_seed(seed)
    transformer, found = lm.transformer, {steps: [] for steps in (1, 2, 4)}
    for context in contexts:
        for _ in range(draws):
            start = lm.encode(context).reshape(-1)
            text, exact = _rolled(transformer, start, BLOCK, 1, temperature, lm.vocabulary)
            own = exact[0].gather(-1, text[0][:, None])[:, 0]  # (BLOCK,)
            for steps, values in found.items():
                size, low, high = BLOCK // steps, 0.0, 0.0
                for first in range(0, BLOCK, size):
                    block = slice(first, first + size)
                    before = torch.cat([start, text[0, :first]])
                    _, log_probs = _rolled(transformer, before, size, rollouts, temperature, lm.vocabulary)
                    others = log_probs[:, torch.arange(size), text[0, block]].logsumexp(0)  # (size,)
                    # The first token of a block has nothing before it.
                    high += float((own[block] - others + np.log(rollouts))[1:].sum())
                    low += float((own[block] - torch.logaddexp(others, own[block]) + np.log(rollouts + 1))[1:].sum())
                values.append([low, high])
    return [
        {"steps": steps, **{name: _mean(np.array(values)[:, n]) for n, name in enumerate(("at least", "at most"))}}
        for steps, values in found.items()
    ]


def _rolled(
    transformer: Any, before: torch.Tensor, count: int, rows: int, temperature: float, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws of ``count`` tokens, ``(rows, count)``, and the log-probabilities they are of, ``(rows, count, V)``."""
    out = transformer(before[None], use_cache=True)
    past, logits = copy.deepcopy(out.past_key_values), out.logits[:, -1].expand(rows, -1)
    past.batch_repeat_interleave(rows)
    tokens, laws = [], []
    for number in range(count):
        laws.append((logits[:, :vocabulary].double() / temperature).log_softmax(-1))
        tokens.append(torch.multinomial(laws[-1].exp(), 1))
        if number + 1 < count:
            logits = transformer(tokens[-1], past_key_values=past, use_cache=True).logits[:, -1]
    return torch.cat(tokens, 1), torch.stack(laws, 1)


# --- training -------------------------------------------------------------------------------------


class _SpentError(Exception):
    """The CPU seconds are used up."""


def curve(
    case: Case, guide: Any, at: Sequence[float], batch: int, judge: Callable[[bool], dict[str, Any]], seed: int
) -> list[dict[str, Any]]:
    """The gain of a guide before training, and after given CPU seconds of it; judging costs none of them."""
    found = [{"cpu": 0.0, "steps": 0, **judge(False)}]
    start, judging, left = time.process_time(), 0.0, list(at)

    def callback(step: int, history: object) -> None:
        nonlocal judging
        spent = time.process_time() - start - judging
        if spent >= left[0]:
            before = time.process_time()
            found.append({"cpu": spent, "steps": step + 1, **judge(len(left) == 1)})
            left.pop(0)
            judging += time.process_time() - before
            if not left:
                raise _SpentError
        if isinstance(guide, RefinementGuide):
            guide.plan = replace(guide.plan, steps=(*SLEEP_STEPS[::2], case.max_tokens, 2)[step % 4])

    with contextlib.suppress(_SpentError):
        fit(
            case.program,
            guide,
            case.rows,
            WakeSleep(2, insomnia=0.0),
            steps=10**6,
            batch_size=batch,
            vectorize_data=True,
            learning_rate=1e-3,
            seed=seed,
            progress=False,
            callback=callback,
        )
    return found


def run(
    name: str, case: Case, ranks: Sequence[int], at: Sequence[float], batch: int, options: argparse.Namespace
) -> None:
    """Curves of the guide told on both sides, at the middle rank, told on the left alone, and of an adapter."""
    out, seed, thorough = options.out, options.seed, case.lm.vocabulary < 1000
    prior, middle = prior_parts(case), ranks[len(ranks) // 2]
    done = {(r.get("run"), r.get("guide")) for r in records(out)}
    kinds = [("both sides", case.sides, middle), *(("left", case.left, rank) for rank in ranks)]
    if thorough:
        kinds.append(("left, end mark hidden", case.left, middle))
    for where, prompt, rank in kinds:
        label = f"refinement, {where}, rank {rank}"
        if (name, label) in done:
            continue
        guide = _refinement(case, prompt, rank, seed)
        size = sum(p.numel() for p in guide.network.parameters())
        if "hidden" in where:
            _hide_end(guide.network)

        def judge(last: bool, guide: RefinementGuide = guide) -> dict[str, Any]:
            return refinement_gain(case, guide, prior, last and thorough)

        for row in curve(case, guide, at, batch, judge, seed):
            keep(out, {"run": name, "guide": label, "parameters": size, "pairs": len(case.pairs), **row})
    label = f"autoregressive, rank {middle}"
    if (name, label) not in done:
        told = AutoregressiveGuide(case.program, case.lm, prompt={case.site: case.left}, rank=middle, seed=seed)
        for row in curve(case, told, at, batch, lambda last: autoregressive_gain(case, told, prior), seed):
            keep(out, {"run": name, "guide": label, "pairs": len(case.pairs), **row})


def _refinement(case: Case, prompt: Callable[..., list[Any]], rank: int, seed: int) -> RefinementGuide:
    return RefinementGuide(
        case.program,
        case.lm,
        steps=4,
        order="left-to-right",
        prompt={case.site: prompt},  # type: ignore[dict-item]
        rank=rank,
        max_tokens=case.max_tokens,
        seed=seed,
    )


# --- where training starts -------------------------------------------------------------------------


def untrained(name: str, case: Case, out: Path) -> None:
    """What the causal network loses before any training by what it is shown: the other side, and the end mark."""
    prior = prior_parts(case)
    for where, prompt in (("both sides", case.sides), ("left", case.left)):
        for end in (True, False):
            guide = _refinement(case, prompt, 4, 0)
            if not end:
                _hide_end(guide.network)
            row = refinement_gain(case, guide, prior, False)
            keep(out, {"base": name, "told": where, "end": end, "pairs": len(case.pairs), **row})


def _hide_end(network: Any) -> None:
    """Nothing but the end mark itself sees the end mark."""
    original = network._run

    def run(tokens: torch.Tensor, places: torch.Tensor, visible: torch.Tensor, past: Any, caches: bool) -> Any:
        if not caches:
            width = tokens.shape[-1]
            allowed = (tokens != network.end)[:, None, None] | torch.eye(width, dtype=torch.bool)
            visible = torch.cat([visible[..., :-width], visible[..., -width:] & allowed], -1)
        return original(tokens, places, visible, past, caches)

    network._run = run


# --- tables and the plot --------------------------------------------------------------------------


def shown(rows: Sequence[dict[str, Any]]) -> str:
    def text(value: list[float] | None) -> str:
        return "" if value is None else f"{value[0]:+.2f} ± {value[1]:.2f}"

    parts = ["length", "tokens", "gain, one token a step", "gain, 4 steps", "gain, 2 steps", "gain, 1 steps"]
    lines = []
    for row in rows:
        if "guide" not in row:
            continue
        gain = row.get("gain")
        cells = [text(row.get(p)) if gain is None or p != parts[2] else text(gain) for p in parts]
        lines.append([row["run"], row["guide"], f"{row['cpu']:.0f}", str(row["steps"]), *cells])
    found = [table(["run", "guide", "CPU s", "steps", *parts], lines)]
    orders = [r for r in rows if "loss, random order" in r]
    found.append(
        table(
            ["run", "guide", "random order", "by confidence", "4 steps", "2 steps", "1 step"],
            [
                [r["run"], r["guide"]]
                + [text(r[f"loss, {n}"]) for n in ("random order", "by confidence", "4 steps", "2 steps", "1 steps")]
                for r in orders
            ],
        )
    )
    floors = [
        [r["run"], r["steps"], text(r["at least"]), text(r["at most"]), r["draws"], r["rollouts"]]
        for r in rows
        if "at least" in r
    ]
    bases = [
        [r["base"], r["told"], "seen" if r["end"] else "hidden", *(text(r[p]) for p in parts[:3])]
        for r in rows
        if "base" in r
    ]
    found.append(table(["untrained", "told", "end mark", *parts[:3]], bases))
    return "\n\n".join([*found, table(["floor of", "steps", "at least", "at most", "draws", "rollouts"], floors)])


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in dict.fromkeys(r["run"] for r in rows if "guide" in r)]
    colours: dict[str, str] = {}
    labelled: set[str] = set()
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 4.2), squeeze=False, constrained_layout=True)
    for axis, name in zip(axes[0], names, strict=True):
        curves: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for row in rows:
            if row.get("run") != name or "guide" not in row:
                continue
            for key in ("gain", "gain, one token a step", "gain, 4 steps"):
                if key in row:
                    line = (row["guide"], key.removeprefix("gain").removeprefix(", "))
                    curves.setdefault(line, []).append((row["cpu"], *row[key]))
        for (guide, plan), points in curves.items():
            seconds, gain, error = np.array(points).T
            colour = colours.setdefault(guide, f"C{len(colours)}")
            # A line of the legend for each guide; that dotted is four steps stands in the title.
            label = None if plan == "4 steps" or guide in labelled else guide
            labelled.add(guide)
            axis.errorbar(
                seconds, gain, error, ls=":" if plan == "4 steps" else "-", color=colour, label=label, capsize=2
            )
        axis.axhline(0.0, color="0.4", lw=0.8)
        axis.set_xscale("symlog", linthresh=2)
        axis.set_xlim(left=-0.5)
        axis.set(title=name, xlabel="CPU seconds of training")
    axes[0, 0].set_ylabel("held-out gain over the prior (nats)")
    figure.suptitle("solid: one token a step; dotted: four steps", fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="has models/stories260k")
    parser.add_argument("--out", type=Path, default=Path("refinement.jsonl"), help="results, a line each")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64], help="on stories260K")
    parser.add_argument("--small-at", type=float, nargs="+", default=[4, 12, 36], help="CPU seconds")
    parser.add_argument("--at", type=float, nargs="+", default=[30, 90], help="CPU seconds, on SmolLM2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="draw --out's results, and run nothing")
    options = parser.parse_args()
    if options.plot is not None:
        print(shown(records(options.out)))
        plot(records(options.out), options.plot)
        return
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    folder = options.data / "models" / "stories260k"
    held_out = [b for b, _ in split(stories(), 12)[1]]
    if any("smollm2" not in name for name in options.only):
        if not (folder / "config.json").is_file():
            print(
                f"SKIPPED: {folder} is not there, and the small runs need it. Give the folder above models/ as --data."
            )
            options.only = [name for name in options.only if "smollm2" in name]
        else:
            lm = LM.from_pretrained(str(folder))
    large = LM.from_pretrained("smollm2-135m") if any("smollm2" in name for name in options.only) else None
    for name in options.only:
        if name == "floor-small":
            for row in floor(lm, held_out, 4, 256, 1.0, options.seed):
                keep(options.out, {"run": "stories260K", "draws": 48, "rollouts": 256, **row})
        elif name == "floor-smollm2":
            for row in floor(large, held_out[:6], 1, 32, 1.0, options.seed):
                keep(options.out, {"run": "SmolLM2-135M", "draws": 6, "rollouts": 32, **row})
        elif name == "base-small":
            untrained("infilling, stories260K", infilling_case(lm, 96, options.seed), options.out)
            untrained("keyword, stories260K", keyword_case(lm, 96, options.seed), options.out)
        elif name == "base-smollm2":
            untrained("infilling, SmolLM2-135M", infilling_case(large, 8, options.seed), options.out)
        elif name == "small":
            case = infilling_case(lm, 96, options.seed)
            run("infilling, stories260K", case, options.ranks, options.small_at, 4, options)
        elif name == "keyword":
            case = keyword_case(lm, 96, options.seed)
            run("keyword, stories260K", case, options.ranks[1:2], options.small_at, 4, options)
        elif name == "smollm2":
            run("infilling, SmolLM2-135M", infilling_case(large, 12, options.seed), [16], options.at, 2, options)


if __name__ == "__main__":
    main()
