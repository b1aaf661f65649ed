"""The programs that ``applications.py`` measures: each with its guide, how that is trained, and held-out queries."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from llmppl import LM, Embedded, Grammar, fit, simulate
from llmppl.guides import AutoregressiveGuide, PromptGuide, SteeredGuide, WordGuide
from llmppl.models import (
    completion,
    described,
    described_series,
    descriptions,
    dialogue,
    evaluate,
    formula,
    plan,
    record,
    run,
    shortest_plans,
    walk,
)
from llmppl.models.described_series import PROMPT
from llmppl.models.encoders import SmallEar, SoftSentence
from llmppl.models.formula import BY_LIKELIHOOD, noise_given, points_listed, unexplained
from llmppl.models.plan import BY_CHANCE, arriving, goal_told, maze_and_goal
from llmppl.models.record import field as field_of
from llmppl.models.record import fields_told, given
from llmppl.objectives import TrajectoryBalance, WakeSleep
from llmppl.posterior.posterior import Posterior

Query = tuple[Any, ...]


@dataclass
class Application:
    """A program, what proposes for it, and what it is asked.

    :param proposals: by name; *prior* and *guide* are among them.
    :param train: the guide; CPU seconds.
    :param hits: which draws satisfy the condition.
    :param exact: the log evidence of a query, where it can be had.
    :param draws: so many draws of its posterior, likewise: latents, a particle a row.
    :param beside: what else is said of a proposal's draws: by name, a number of a query and the draws.
    :param searched: what ``smc`` proposes by; the program's own distributions by default.
    """

    name: str
    program: Callable[..., Any]
    proposals: dict[str, Any]
    train: Callable[[], float]
    queries: list[Query]
    hits: Callable[[Query, Posterior], np.ndarray]
    exact: Callable[[Query], float] | None = None
    draws: Callable[[Query, int], dict[str, torch.Tensor]] | None = None
    beside: dict[str, Callable[[Query, Posterior], float]] = field(default_factory=dict)
    searched: Any = None


def timed(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


# --- formats -------------------------------------------------------------------------------------

PEOPLE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "city": {"enum": ["Paris", "Rome", "London", "Vienna"]},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
EXAMPLES = """Anna is a cook and lives in Vienna.
{"name": "Anna", "age": 31, "city": "Vienna"}
Old Mr Brown sells books in London.
{"name": "Brown", "age": 74, "city": "London"}
Marie goes to school in Paris.
{"name": "Marie", "age": 9, "city": "Paris"}
"""
RECORDS = "".join(line for line in EXAMPLES.splitlines(keepends=True) if line.startswith("{"))


def formats(lm: LM, steps: int, prose: bool = False) -> Application:
    """A record of somebody who lives in a given city; with ``prose``, a line about them before it."""
    cities, known = PEOPLE["properties"]["city"]["enum"], {"prose_tokens": 16 if prose else 0}
    prompt = EXAMPLES if prose else RECORDS
    program = record(lm, PEOPLE, ["city"], **known)
    by_city = {city: record(lm, given(PEOPLE, {"city": city}), ["city"], masked=True, **known) for city in cities}

    def masked(prompt: Any, city: str) -> Any:
        """What proposes: each record under a mask that permits the known city alone."""
        text = by_city[city](prompt, city)
        pyro.sample("known", lm.echo(text), obs=lm.encode(city))  # tells a guide; it is never weighed
        return text

    plain: dict[str, Any] = {"record": lambda prompt: [prompt]}
    if prose:
        plain = {"prose": lambda prompt: [prompt], "record": lambda prompt, prose: [prompt, prose]}
    told = fields_told(["city"], prose=prose)
    local = PromptGuide(masked, lm, prompt=plain)
    guide = WordGuide(masked, lm, word="known", prompt=plain, seed=0)
    rows: list[Query] = [(prompt, city) for city in cities]

    def train() -> float:
        return timed(
            lambda: fit(program, guide, rows, TrajectoryBalance(8, floor=-60.0), steps, batch_size=2,
                        learning_rate=1e-2, schedule="cosine", seed=0, progress=False)
        )  # fmt: skip

    def hits(query: Query, posterior: Posterior) -> np.ndarray:
        return np.array([field_of(text, "city") == query[1] for text in posterior.decode("record")])

    return Application(
        "formats, prose before" if prose else "formats",
        program,
        {
            "prior": PromptGuide(program, lm, prompt=plain),
            "local masking": local,
            "local masking, told the city": PromptGuide(masked, lm, prompt=told),
            "guide": guide,
        },
        train,
        rows,
        hits,
        searched=local,
    )


# --- code ----------------------------------------------------------------------------------------

CALLS = ["f(2)", "f(5)", "f(-3)"]
PREFIX = "def f(x):\n    return"
BODIES = [
    *(" 2 * x", " x + 3", " x * x - 1", " 10 - x", " x % 3", " -x", " x ** 2 + x", " x // 2", " x > 2", " 3 * x + 1"),
    *(" x * x * x", " 2 * (x + 1)", " x - 7", " x * 10", " x == 5", " 5"),
]


def outputs(body: str) -> list[str]:
    return [run(f"{PREFIX}{body}\n", call) for call in CALLS]


def code(lm: LM, steps: int) -> Application:
    """The body of a function of one number, given what it returns for three."""
    program = completion(lm, CALLS, max_tokens=12)

    def told(prefix: Any, output_1: Any, output_2: Any, output_3: Any) -> list[Any]:
        pieces: list[Any] = []
        for call, output in zip(CALLS, (output_1, output_2, output_3), strict=True):
            pieces += [f"# {call} == ", output, "\n"]
        return [*pieces, prefix]

    guide = AutoregressiveGuide(program, lm, prompt={"body": told}, rank=8, seed=0)
    rows = [(PREFIX, "", *outputs(" x"))]

    def train() -> float:
        def work() -> None:
            pairs = simulate(program, rows, 12 * steps, seed=0, progress=False)
            fit(program, guide, pairs, WakeSleep(1, insomnia=0.0), steps, 12, vectorize_data=True, learning_rate=1e-3,
                seed=0, progress=False)  # fmt: skip

        return timed(work)

    def hits(query: Query, posterior: Posterior) -> np.ndarray:
        return np.array([outputs(body.rstrip("\n")) == list(query[2:]) for body in posterior.decode("body")])

    return Application(
        "code",
        program,
        {
            "prior": PromptGuide(program, lm, prompt={"body": lambda prefix: [prefix]}),
            "zero-shot": PromptGuide(program, lm, prompt={"body": told}),
            "guide": guide,
        },
        train,
        [(PREFIX, "", *outputs(body)) for body in BODIES],
        hits,
        beside={
            "pass@10, %": lambda query, posterior: 100 * pass_at(hits(query, posterior), 10),
            "distinct correct programs": lambda query, posterior: float(
                len({body for body, hit in zip(posterior.decode("body"), hits(query, posterior), strict=True) if hit})
            ),
        },
    )


def pass_at(hits: np.ndarray, count: int) -> float:
    """That one of so many draws is right, without bias (Chen et al. 2021, eq. 1)."""
    wrong = int((~hits).sum())
    return 1.0 - math.comb(wrong, count) / math.comb(len(hits), count)


# --- plans ---------------------------------------------------------------------------------------


def maze(source: random.Random, size: int, moves: int = 8, walls: float = 0.2) -> tuple[str, int]:
    """A random maze, and a goal that is reached in so many moves."""
    while True:
        cells = [["#" if source.random() < walls else "." for _ in range(size)] for _ in range(size)]
        cells[source.randrange(size)][source.randrange(size)] = "S"
        drawn = "\n".join("".join(row) for row in cells)
        free = [n for n, cell in enumerate("".join(drawn.split())) if cell == "."]
        shortest = {goal: shortest_plans(drawn, goal, 1) for goal in free}
        near = [goal for goal, plans in shortest.items() if plans and len(plans[0].split()) <= moves]
        if len(near) > size:
            return drawn, source.choice(near)


def plans(lm: LM, steps: int, size: int = 5, moves: int = 8) -> Application:
    """Moves through a maze to a goal."""
    source = random.Random(0)
    program = plan(lm, (size, size), max_moves=moves, nearness=6.0)
    told, features = {"plan": maze_and_goal(lm)}, {"plan": arriving((size, size), moves, 6.0)}
    guide, untrained = (SteeredGuide(program, lm, features, told, start={"plan": BY_CHANCE}, seed=0) for _ in range(2))
    held_out, rows = (
        [(drawn, torch.tensor(goal)) for drawn, goal in (maze(source, size, moves) for _ in range(count))]
        for count in (16, 400)
    )

    def train() -> float:
        return timed(
            lambda: fit(program, guide, rows, TrajectoryBalance(8), steps, 4, vectorize_data=True, learning_rate=1e-2,
                        schedule="cosine", seed=0, progress=False)
        )  # fmt: skip

    def hits(query: Query, posterior: Posterior) -> np.ndarray:
        return np.array([walk(query[0], moves) == int(query[1]) for moves in posterior.decode("plan")])

    def longer(query: Query, posterior: Posterior) -> float:
        """How many moves longer than the shortest plans that arrive are, in the mean."""
        arrived = [m for m in posterior.decode("plan") if walk(query[0], m) == int(query[1])]
        shortest = len(shortest_plans(query[0], int(query[1]), 1)[0].split())
        lengths = [len(moves.removesuffix(lm.spelling.end).split()) for moves in arrived]
        return float(np.mean(lengths)) - shortest if lengths else math.nan

    plain = {"plan": lambda: ["The moves of the robot through the maze are:"]}
    return Application(
        f"plans, {size} by {size}",
        program,
        {
            "prior": PromptGuide(program, lm, prompt=plain),
            "zero-shot": PromptGuide(program, lm, prompt={"plan": goal_told(lm, size)}),
            "steered, untrained": untrained,
            "guide": guide,
        },
        train,
        held_out,
        hits,
        beside={"moves above the shortest": longer},
    )


# --- dialogue ------------------------------------------------------------------------------------

INTENTS = [
    " to send something back",
    " to know where an order is",
    " to change an address",
    " some advice on what to buy",
]
TALKS = [
    ("The shoes are too small for me.", "Thank you, I will send them back today."),
    ("It has been ten days and nothing has come.", "Good, then I will wait until Friday."),
    ("I am moving to another town next week.", "Yes, that is the new address."),
    ("My sister likes painting, what could I give her?", "The brushes sound nice, I will take them."),
    ("This lamp arrived broken.", "Great, I am glad that I get my money back."),
    ("When will my parcel arrive?", "Tomorrow is fine, thank you."),
]


def asked_to_reply(lm: LM) -> dict[str, Any]:
    """Prompts for a dialogue that are told the message, and not what comes next."""
    role = {"role": "system", "content": "You answer customers of a shop, in one sentence."}
    return {
        "intent": lambda message: [message],
        "style": lambda: ["My answers are"],
        "reply": lambda message: lm.chat([role, {"role": "user", "content": message}]),
    }


def talks(lm: LM, steps: int) -> Application:
    """What somebody wants, and an answer that leads to what is said next."""
    program = dialogue(lm, INTENTS, max_tokens=20)
    guide = AutoregressiveGuide(program, lm, rank=8, seed=0)

    def train() -> float:
        def work() -> None:
            fit(program, guide, TALKS, WakeSleep(4, insomnia=0.0), steps, batch_size=2, learning_rate=1e-3, seed=0,
                progress=False)  # fmt: skip

        return timed(work)

    return Application(
        "dialogue",
        program,
        {
            "prior": PromptGuide(program, lm, prompt=asked_to_reply(lm)),
            "zero-shot": PromptGuide(program, lm),
            "guide": guide,
        },
        train,
        list(TALKS),
        lambda query, posterior: np.ones(posterior.num_samples, dtype=bool),
    )


# --- explained data ------------------------------------------------------------------------------

OPERAND = r"(x|[1-9]|(sin|cos|exp)\(x\))"
SMALL = rf" {OPERAND}( [-+*] {OPERAND})?"
POINTS = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0])


def data_set(source: random.Random) -> torch.Tensor:
    """Points of a random formula of two operands, with noise."""
    while True:
        first, second = (
            source.choice(["x", "x", str(source.randint(1, 9)), "sin(x)", "cos(x)", "exp(x)"]) for _ in "ab"
        )
        sign = source.choice("+-*")
        values = [evaluate(f"{first} {sign} {second}", float(x)) for x in POINTS]
        if max(map(abs, values)) < 60 and len({round(value, 2) for value in values}) > 1:
            return torch.tensor([value + source.gauss(0, 0.3) for value in values])


def data(lm: LM, steps: int) -> Application:
    """A formula and its noise for five points; all formulas, in all their spellings, are enumerated."""
    source = random.Random(1)
    grammar, prompt = Grammar.regex(SMALL), " y ="
    program = formula(lm, prompt=prompt, grammar=grammar)

    others = noise_given(lm)
    told = {"formula": points_listed(lm, len(POINTS))}
    features, start = {"formula": unexplained(POINTS.tolist(), signs="-+*")}, {"formula": BY_LIKELIHOOD}
    guide, untrained = (SteeredGuide(program, lm, features, told, others=others, start=start, seed=0) for _ in range(2))

    def asked(x: Any, y: Any) -> list[Any]:
        return [
            lm.map(lambda *v: "y = " + ", ".join(f"{o:.1f}" for o in v) + ";", *(y[..., n] for n in range(5))),
            prompt,
        ]

    held_out, rows = ([(POINTS, data_set(source)) for _ in range(count)] for count in (16, 200))

    def train() -> float:
        return timed(
            lambda: fit(program, guide, rows, WakeSleep(8, insomnia=1.0), steps, 2, learning_rate=1e-2,
                        schedule="cosine", seed=0, progress=False)
        )  # fmt: skip

    law = lm(prompt, grammar=grammar, max_tokens=16)
    known: dict[str, Any] = {}

    def joint(query: Query) -> torch.Tensor:
        """Of every formula with every noise of a grid, ``(formulas, noises)``, the grid's spacing included."""
        if not known:
            texts = known["texts"] = law.enumerate_support()
            strings = [text.removesuffix(lm.spelling.end) for text in lm.decode(texts)]
            known["prior"] = law.log_prob(texts).double()
            known["values"] = torch.tensor([[evaluate(text, float(x)) for x in POINTS] for text in strings])
            known["grid"] = torch.linspace(0.02, 4.0, 400)
        grid = known["grid"]
        of_noise = dist.LogNormal(math.log(0.3), 0.5).log_prob(grid).double()
        likelihood = torch.stack([dist.Normal(known["values"], s).log_prob(query[1]).sum(-1) for s in grid], 1).double()
        return known["prior"][:, None] + of_noise + likelihood + math.log(float(grid[1] - grid[0]))

    def exact(query: Query) -> float:
        return float(joint(query).logsumexp((0, 1)))

    def draws(query: Query, count: int) -> dict[str, torch.Tensor]:
        weights = joint(query)
        chosen = torch.distributions.Categorical(logits=weights.flatten()).sample((count,))
        row, column = chosen // weights.shape[1], chosen % weights.shape[1]
        return {"formula": known["texts"][row][:, None], "noise": known["grid"][column][:, None]}

    def hits(query: Query, posterior: Posterior) -> np.ndarray:
        y, found = query[1], []
        for text in posterior.decode("formula"):
            values = torch.tensor([evaluate(text.removesuffix(lm.spelling.end), float(x)) for x in POINTS])
            found.append(float((values - y).square().mean().sqrt()) < 1.0)
        return np.array(found)

    return Application(
        "explained data",
        program,
        {
            "prior": PromptGuide(program, lm, prompt={"formula": lambda: [prompt]}, others=others),
            "zero-shot": PromptGuide(program, lm, prompt={"formula": asked}, others=others),
            "steered, untrained": untrained,
            "guide": guide,
        },
        train,
        held_out,
        hits,
        exact,
        draws,
    )


# --- described series ----------------------------------------------------------------------------


def year(source: random.Random) -> torch.Tensor:
    """The series of a description drawn uniformly, with noise."""
    return torch.tensor([value + source.gauss(0, 1) for value in described(source.choice(descriptions()))])


def learn_descriptions(classifier: torch.nn.Module, prior: torch.Tensor, steps: int = 3000) -> None:
    """Teach a classifier the posterior over all descriptions, of series of each of them; no language model is read."""
    known = torch.tensor([described(text) for text in descriptions()])
    source = torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        chosen = torch.randint(len(known), (64,), generator=source)
        noisy = known[chosen] + torch.randn(64, known.shape[1], generator=source)
        exact = (prior + dist.Normal(known, 1.0).log_prob(noisy[:, None]).sum(-1)).softmax(-1)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(classifier(noisy), exact).backward()
        optimizer.step()
        schedule.step()


def series(lm: LM, steps: int) -> Application:
    """A sentence for a year's twelve values; the guide sees a small classifier's guess, in words, twice."""
    source, program = random.Random(2), described_series(lm)
    ear = SmallEar(lm.transformer.config.hidden_size, unit=4.0, scale=1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = torch.nn.Linear(ear.norm.normalized_shape[0], len(descriptions()))
    classifier = torch.nn.Sequential(ear, torch.nn.Flatten(), head)
    guess = SoftSentence(classifier, lm, descriptions())

    def told(y: torch.Tensor) -> list[Any]:
        said = Embedded(guess, y, 1)
        return [PROMPT, said, "\n" + PROMPT, said, "\n" + PROMPT]

    listed = {
        "description": lambda y: [
            lm.map(lambda *v: "Visitors: " + ", ".join(f"{o:.0f}" for o in v) + "\n", *(y[..., n] for n in range(12))),
            PROMPT,
        ]
    }
    guide = AutoregressiveGuide(program, lm, prompt={"description": told}, rank=8, seed=0)
    held_out, rows = ([(year(source),) for _ in range(count)] for count in (16, 400))

    def train() -> float:
        def work() -> None:
            learn_descriptions(classifier, log_prior())
            classifier.requires_grad_(False)
            fit(program, guide, rows, WakeSleep(1, insomnia=0.0), steps, 32, vectorize_data=True,
                learning_rate=5e-4, schedule="cosine", seed=0, progress=False)  # fmt: skip

        return timed(work)

    def hits(query: Query, posterior: Posterior) -> np.ndarray:
        texts = [text.removesuffix(lm.spelling.end) for text in posterior.decode("description")]
        values = torch.tensor([described(text) if text in known else [1e3] * 12 for text in texts])
        return ((values - query[0]).square().mean(-1).sqrt() < 1.5).numpy()

    known = set(descriptions())
    table: dict[str, torch.Tensor] = {}

    def log_prior() -> torch.Tensor:
        """Of every description; each has one spelling."""
        if not table:
            law = pyro.poutine.trace(program).get_trace(held_out[0][0]).nodes["description"]["fn"]
            table["texts"] = lm.encode([text + lm.spelling.end for text in descriptions()], special=True)
            texts = torch.nn.functional.pad(table["texts"], (0, law.event_shape[0] - table["texts"].shape[1]), value=-1)
            with torch.no_grad():
                table["prior"] = torch.cat([law.log_prob(some) for some in texts.split(41)])
            table["means"] = torch.tensor([described(text) for text in descriptions()])
        return table["prior"]

    def log_joints(y: torch.Tensor) -> torch.Tensor:
        return log_prior() + dist.Normal(table["means"], 1.0).log_prob(y).sum(-1)

    def drawn(query: Query, count: int) -> dict[str, torch.Tensor]:
        return {"description": table["texts"][dist.Categorical(logits=log_joints(*query)).sample((count,))]}

    return Application(
        "described series",
        program,
        {
            "prior": PromptGuide(program, lm, prompt={"description": lambda: [PROMPT]}),
            "zero-shot": PromptGuide(program, lm, prompt=listed),
            "guide": guide,
        },
        train,
        held_out,
        hits,
        exact=lambda query: float(log_joints(*query).logsumexp(0)),
        draws=drawn,
    )


APPLICATIONS: dict[str, Callable[[LM, int], Application]] = {
    "formats": formats,
    "formats-prose": lambda lm, steps: formats(lm, steps, prose=True),
    "code": code,
    "plans": plans,
    "plans-7": lambda lm, steps: plans(lm, steps, 7, 10),
    "dialogue": talks,
    "data": data,
    "series": series,
}
STEPS = {
    "formats": 20,
    "formats-prose": 40,
    "code": 60,
    "plans": 20,
    "plans-7": 20,
    "dialogue": 16,
    "data": 40,
    "series": 60,
}
