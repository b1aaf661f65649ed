"""What prompts are told where observations are simulated: never one datum's observation beside another's text."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import kl
from torch import Tensor

from llmppl import LM, Behaviour, Evaluation, Regularisation, bounds, calibrate, diagnose, exact_posterior, fit
from llmppl.diagnostics.calibration import expected_coverage
from llmppl.guides import AutoregressiveGuide, PromptGuide, RefinementGuide
from llmppl.inference.simulated_pairs import simulated_pair
from llmppl.masked_lm import MaskedLM
from llmppl.objectives import Denoising, TrajectoryBalance, WakeSleep
from llmppl.programs.simulation import Simulated, simulate
from llmppl.programs.structure import structure
from llmppl.testing import tiny_lm

Program = Callable[..., Any]


def tiny(seed: int = 3) -> LM:
    """Four tokens: 40 texts of at most three."""
    return tiny_lm(vocabulary=4, seed=seed, dtype=torch.float64)


@pytest.fixture
def lm() -> LM:
    return tiny()


def texts(lm: LM) -> Program:
    """Program (a): the argument ``e`` is observed at a site of another name."""

    def story(b: Any, e: Any) -> Tensor:
        z = pyro.sample("z", lm(b, max_tokens=3, stop="."))
        pyro.sample("ending", lm(b, z, max_tokens=3, stop="."), obs=lm.encode(e))
        return z

    return story


def counts(lm: LM) -> Program:
    """Program (b): what is observed is a number, about how often token 3 stands in the text."""

    def story(x: Any, k: Any) -> Tensor:
        z = pyro.sample("z", lm(x, max_tokens=3, stop="."))
        pyro.sample("k", dist.Normal((z == 3).sum(-1).double(), 0.3), obs=torch.as_tensor(k, dtype=torch.float64))
        return z

    return story


def written(lm: LM, k: Any) -> Tensor:
    """A text for each of any batch of numbers, in half steps."""
    k = torch.as_tensor(k)
    steps = (2 * k).reshape(-1).round().clamp(0, 6).long().tolist()
    return lm.encode(["abc"[n // 3] + "abc"[n % 3] for n in steps]).reshape(*k.shape, -1)


DATA: dict[str, list[tuple[Any, ...]]] = {
    "texts": [("c", "."), ("c", "a."), ("c", "acb")],
    "counts": [("ab", 0.0), ("ab", 1.0), ("ab", 2.0)],
}
SITE = {"texts": "ending", "counts": "k"}
SEED = {"texts": 4, "counts": 3}
"""Of models under which these observations are likely, so that sleep meets them."""


def make(name: str) -> tuple[LM, Program]:
    lm = tiny(SEED[name])
    return lm, {"texts": texts, "counts": counts}[name](lm)


def prompt_of(name: str, lm: LM, note: Callable[[Any], None] = lambda value: None) -> dict[str, Any]:
    """The prompt, which notes what it is told."""

    def ending_first(b: Any, e: Any) -> list[Any]:
        note(e)
        return [e, b]

    def count_first(x: Any, k: Any) -> list[Any]:
        note(k)
        return [written(lm, k), x]

    return {"z": ending_first if name == "texts" else count_first}


# --- training, bounds and calibration --------------------------------------------------------------


@pytest.fixture(scope="module", params=list(DATA))
def trained(request: pytest.FixtureRequest) -> tuple[str, Program, AutoregressiveGuide]:
    """Trained on simulated pairs alone; of the data only the beginning counts."""
    name = request.param
    lm, model = make(name)
    pyro.clear_param_store()
    guide = AutoregressiveGuide(model, lm, prompt_of(name, lm), rank=4, seed=0)
    steps, rate = {"texts": (150, 1.5e-2), "counts": (200, 1e-2)}[name]
    fit(model, guide, DATA[name], WakeSleep(256, insomnia=0.0), steps, learning_rate=rate, weight_decay=0.0, seed=0,
        progress=False, schedule="cosine")  # fmt: skip
    return name, model, guide


def deaf(guide: AutoregressiveGuide) -> Program:
    """The same guide, told the data whatever was simulated."""
    return lambda *args, observations=None: guide(*args)


def mean_log_evidence(name: str, model: Program) -> float:
    """E log p(x) of simulated observations, by summation and by quadrature."""
    lm = tiny(SEED[name])
    beginning = DATA[name][0][0]
    prior = lm(beginning, max_tokens=3, stop=".")
    z = prior.enumerate_support()
    log_prior = prior.log_prob(z).detach()
    if name == "texts":
        log_p = (log_prior[:, None] + lm(beginning, z[:, None], max_tokens=3, stop=".").log_prob(z).detach()).logsumexp(
            0
        )
        return float((log_p.exp() * log_p).sum())
    k = torch.linspace(-2, 5, 7001, dtype=torch.float64)
    log_p = (log_prior[:, None] + dist.Normal((z == 3).sum(-1, keepdim=True).double(), 0.3).log_prob(k)).logsumexp(0)
    return float(torch.trapezoid(log_p.exp() * log_p, k))


@pytest.mark.long
def test_sleep_training_reaches_the_exact_posterior(trained: tuple[str, Program, AutoregressiveGuide]) -> None:
    """KL at most 0.05 nats both ways at each of three observations; told the data's instead, counts had 13."""
    name, model, guide = trained
    for args in DATA[name]:
        posterior = exact_posterior(model)(*args)
        log_p = torch.as_tensor(posterior.log_joint).reshape(-1) - float(posterior.log_evidence)
        with torch.no_grad():
            log_q = structure(guide, args, {}).nodes["z"]["fn"].log_prob(torch.as_tensor(posterior.samples["z"]))
        assert kl(log_q, log_p) < 0.05
        assert kl(log_p, log_q) < 0.05


@pytest.mark.long
def test_bounds_hold_the_mean_log_evidence(trained: tuple[str, Program, AutoregressiveGuide]) -> None:
    """Within three standard errors and less than 0.1 nats apart; a guide told the data's has bounds far apart."""
    name, model, guide = trained
    lower, upper = bounds(model, guide, 8, simulations=80)(*DATA[name][0]).log_evidence
    truth = mean_log_evidence(name, model)
    assert upper is not None
    assert lower.value - 3 * lower.error < truth < upper.value + 3 * upper.error
    assert upper.value - lower.value < 0.1
    wrong_lower, wrong_upper = bounds(model, deaf(guide), 8, simulations=30)(*DATA[name][0]).log_evidence
    assert wrong_upper is not None
    assert wrong_upper.value - wrong_lower.value > 0.3


@pytest.mark.long
def test_calibration_accepts_the_posterior_and_rejects_a_guide_told_the_data(
    trained: tuple[str, Program, AutoregressiveGuide],
) -> None:
    name, model, guide = trained
    exact = lambda model, guide: exact_posterior(model)  # noqa: E731
    options: dict[str, Any] = {"num_draws": 15, "simulations": 60, "progress": False}
    assert calibrate(model, guide, sampler=exact, **options)(*DATA[name][0]).passed
    assert "log q(z|x)" in " ".join(calibrate(model, deaf(guide), **options)(*DATA[name][0]).rejected)


# --- what prompts receive --------------------------------------------------------------------------


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Simulated observations and what prompts were told, in the order of their happening."""
    events: list[tuple[str, Any]] = []
    original = Simulated._pyro_sample

    def spied(self: Simulated, msg: Any) -> None:
        before = set(self.observations)
        original(self, msg)
        events.extend(("simulated", self.observations[name]) for name in set(self.observations) - before)

    monkeypatch.setattr(Simulated, "_pyro_sample", spied)
    return events


def told_as_simulated(log: list[tuple[str, Any]]) -> tuple[int, list[Any]]:
    """How often prompts got the last simulated observation, row by row, and what else they got after the first."""
    last: Any = None
    right, others = 0, []
    for what, value in log:
        if what == "simulated":
            last = value
        elif last is not None:
            if isinstance(value, Tensor) and value.shape == last.shape and torch.equal(value, last):
                right += 1
            else:
                others.append(value)
    return right, others


def guide_of(
    name: str, lm: LM, model: Program, log: list[tuple[str, Any]], kind: Any = PromptGuide, **options: Any
) -> Any:
    return kind(model, lm, prompt=prompt_of(name, lm, lambda value: log.append(("told", value))), **options)


OBJECTIVES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sleep": (lambda: WakeSleep(3, insomnia=0.0), {}),
    "behaviour": (lambda: TrajectoryBalance(3, behaviour=Behaviour(sleep=1.0)), {}),
    "regularisation": (lambda: TrajectoryBalance(3), {"regularisation": Regularisation(simulated=1.0)}),
    "denoising": (lambda: Denoising(3), {}),
}


@pytest.mark.parametrize("vectorize_data", [False, True])
@pytest.mark.parametrize("name", list(DATA))
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_training_tells_the_simulated_observation(
    name: str, objective: str, vectorize_data: bool, log: list[tuple[str, Any]]
) -> None:
    """Every call of a prompt behind the first simulation gets the last simulated values: of particles and rows."""
    lm, model = make(name)
    made, options = OBJECTIVES[objective]
    kind, extra = AutoregressiveGuide, {"rank": 1}
    if objective == "denoising":
        kind, extra = RefinementGuide, {"network": MaskedLM.from_scratch(lm, max_tokens=3, width=16, layers=1, seed=0)}
    guide = guide_of(name, lm, model, log, kind, **extra)
    fit(model, guide, DATA[name], made(), 2, batch_size=3, vectorize_data=vectorize_data, progress=False, seed=0,
        **options)  # fmt: skip
    right, others = told_as_simulated(log)
    assert right == (2 if vectorize_data else 6)
    assert others == []


@pytest.mark.long
@pytest.mark.parametrize("name", list(DATA))
def test_measures_tell_the_simulated_observation(name: str, log: list[tuple[str, Any]]) -> None:
    """Each of them; beside it only the data themselves, where nothing is simulated."""
    lm, model = make(name)
    guide = guide_of(name, lm, model, log)
    args = DATA[name][0]
    evaluation = Evaluation(DATA[name][:1], every=1, num_samples=2, simulations=2)
    trained = guide_of(name, lm, model, log, AutoregressiveGuide, rank=1)
    for run, least in [
        (lambda: bounds(model, guide, 2, simulations=2)(*args), 4),
        (lambda: bounds(model, guide, 2, simulations=2, method="smc")(*args), 4),
        (lambda: calibrate(model, guide, num_draws=2, simulations=2, progress=False)(*args), 4),
        (lambda: diagnose(model, guide, [args], num_samples=4, simulations=2, progress=False), 4),
        (lambda: fit(model, trained, DATA[name], TrajectoryBalance(2), 1, evaluation=evaluation, progress=False), 8),
    ]:
        log.clear()
        run()
        right, others = told_as_simulated(log)
        assert right >= least
        assert all(isinstance(value, (str, float)) and value in [row[1] for row in DATA[name]] for value in others)


def test_coverage_tells_the_simulated_observation(log: list[tuple[str, Any]]) -> None:
    lm = tiny(4)

    def model(b: str, e: str) -> None:
        z = pyro.sample("z", lm.choice(b, options=["a", "b"]))
        pyro.sample("ending", lm(b, z, max_tokens=3, stop="."), obs=lm.encode(e))

    guide = guide_of("texts", lm, model, log)
    expected_coverage(model, guide, simulations=3, progress=False)("c", "a.")
    right, others = told_as_simulated(log)
    assert right >= 3
    assert others == []


# --- which arguments carry an observation, and which must not be asked for ---------------------------


def context(guide: Any, *args: Any, observations: dict[str, Tensor] | None = None) -> Tensor:
    fn = structure(guide, args, {"observations": observations}).nodes["z"]["fn"]
    return fn.context


def test_an_unrelated_argument_is_told_as_it_is_though_it_equals_an_observation(lm: LM) -> None:
    """A beginning that reads like the ending, and a length that is the number observed."""
    received: list[Any] = []

    def model(b: str, e: str, n: int, k: float, m: Any = None) -> None:
        z = pyro.sample("z", lm(b, max_tokens=n, stop="."))
        pyro.sample("ending", lm(b, z), obs=lm.encode(e))
        pyro.sample("number", dist.Normal(0.0, 1.0), obs=torch.tensor(k))

    def prompt(b: Any, e: Any, n: Any, k: Any, m: Any) -> list[Any]:
        received.append((b, e, n, k, m))
        return [b, e, f"{'a' * n}"]

    guide = PromptGuide(model, lm, prompt={"z": prompt})
    seen = {"ending": lm.encode("cc"), "number": torch.tensor(7.0)}
    told = context(guide, "ab", "ab", 3, 3.0, observations=seen)
    assert lm.decode(told) == "abccaaa"
    b, e, n, k, m = received[-1]
    assert (b, n, m) == ("ab", 3, None)
    assert e is seen["ending"]
    assert k is seen["number"]
    # One of the two alone, and none: the other is then the data's own, as it was passed.
    context(guide, "ab", "ab", 3, 3.0, observations={"ending": lm.encode("cc")})
    assert received[-1][3] == 3.0
    context(guide, "ab", "ab", 3, 3.0)
    assert received[-1] == ("ab", "ab", 3, 3.0, None)


def fails_with_others(lm: LM, e: str) -> Tensor:
    return lm.encode({"ab": "ba"}[e])


DERIVED: dict[str, tuple[Callable[[LM, Any], Any], Any, str]] = {
    "stripped": (lambda lm, e: lm.encode(e.strip(".")), "ab.", "the observation of site 'seen' is made from it"),
    "first letter": (lambda lm, e: lm.encode(e[:1]), "abc", "the observation of site 'seen' is made from it"),
    "logarithm": (lambda lm, e: torch.log(e), torch.tensor(2.0), "the observation of site 'seen' is made from it"),
    "length": (lambda lm, e: torch.tensor(len(e)), "ab", "the observation of site 'seen' is made from it"),
    "rounded": (lambda lm, e: torch.tensor(round(e)), 2.0, "the observation of site 'seen' is made from it"),
    "entry": (lambda lm, e: lm.encode(e[0]), ("ab", "c"), "the observation of site 'seen' is made from it"),
    "looked up": (
        fails_with_others,
        "ab",
        "cannot be seen: the program fails with each of the other values .*KeyError",
    ),
    "an object": (lambda lm, e: lm.encode(e.text), type("Datum", (), {"text": "ab"})(), "no other values are known"),
}


@pytest.mark.parametrize("name", list(DERIVED))
def test_an_argument_that_an_observation_is_made_from_is_refused(lm: LM, name: str) -> None:
    made, value, message = DERIVED[name]

    def model(b: str, e: Any) -> None:
        pyro.sample("z", lm(b, max_tokens=2))
        own = made(lm, e)
        law = lm(b) if own.dim() else dist.Normal(0.0, 1.0)
        pyro.sample("seen", law, obs=own)

    guide = PromptGuide(model, lm, prompt={"z": lambda b, e: [b]})
    assert context(guide, "ab", value) is not None  # nothing is simulated
    observations = simulate(model, ("ab", value), {})[1]
    with pytest.raises(ValueError, match=rf"prompt\['z'\] asks for 'e'.*{message}.*Ask for the site 'seen' instead"):
        context(guide, "ab", value, observations=observations)
    by_site = PromptGuide(model, lm, prompt={"z": lambda b, seen: [b]})
    assert context(by_site, "ab", value, observations=observations) is not None


def test_an_argument_observed_twice_is_refused(lm: LM) -> None:
    def model(e: str) -> None:
        pyro.sample("z", lm("a", max_tokens=2))
        for name in ("first", "second"):
            pyro.sample(name, lm("a"), obs=lm.encode(e))

    guide = PromptGuide(model, lm, prompt={"z": lambda e: [e]})
    with pytest.raises(ValueError, match=r"the observation of sites \['first', 'second'\] are made from it"):
        context(guide, "ab", observations={name: lm.encode("c") for name in ("first", "second")})


def test_relations_are_looked_at_once_for_each_kind_of_call(lm: LM) -> None:
    runs = 0

    def model(b: Any, e: Any) -> None:
        nonlocal runs
        runs += 1
        z = pyro.sample("z", lm(b, max_tokens=2))
        pyro.sample("ending", lm(b, z), obs=lm.encode(e))

    guide = PromptGuide(model, lm, prompt={"z": lambda b, e: [e, b]})
    random = torch.get_rng_state()
    context(guide, "a", "b", observations={"ending": lm.encode("c")})
    assert torch.equal(random, torch.get_rng_state())
    first, runs = runs, 0
    context(guide, "ab", "cc", observations={"ending": lm.encode("c")})
    assert runs == 2 < first  # to see the sites, and to propose
    copied = copy.deepcopy(guide)
    assert lm.decode(context(copied, "ab", "cc", observations={"ending": lm.encode("c")})) == "cab"


def test_particles_and_plates_broadcast(lm: LM) -> None:
    """Three numbers about one text, four particles: the prompt reduces the plate and keeps the particles."""
    shapes: list[Any] = []

    def model(x: str, ks: Tensor) -> None:
        z = pyro.sample("z", lm(x, max_tokens=3, stop="."))
        with pyro.plate("numbers", 3):
            pyro.sample("k", dist.Normal((z == 3).sum(-1).double(), 0.3), obs=ks)

    def prompt(x: str, ks: Tensor) -> list[Any]:
        shapes.append(tuple(ks.shape))
        return [written(lm, ks.mean(-1, keepdim=ks.dim() > 1)), x]

    guide = AutoregressiveGuide(model, lm, prompt={"z": prompt}, rank=1)
    ks = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    assert math.isfinite(WakeSleep(4, insomnia=0.0).loss(model, guide, "ab", ks))
    assert shapes[-1] == (4, 3)
    found = bounds(model, guide, 5, simulations=2)("ab", ks)
    assert np.isfinite(found.lower).all()
    assert shapes[-1] == (3,)


# --- what else may be asked for ----------------------------------------------------------------------


def test_other_latents_and_computed_sites_may_be_asked_for(lm: LM) -> None:
    """Numbers that another guide proposes, and what the program computes from this very run's latents, also where
    observations are simulated."""
    received: list[Any] = []

    def model(k: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        first = pyro.sample("first", lm("a", max_tokens=2))
        total = pyro.deterministic("total", first.sum(-1))
        z = pyro.sample("z", lm(first, max_tokens=2))
        pyro.sample("k", dist.Poisson(rate + total + z.sum(-1)), obs=k)

    def prompt(rate: Any, first: Any, total: Any, k: Any) -> list[Any]:
        received.append((rate, first, total, k))
        return [first]

    def others(k: Tensor) -> None:
        pyro.sample("rate", dist.Gamma(2.0, 1.0))

    guide = PromptGuide(model, lm, prompt={"z": prompt}, others=others)
    assert set(simulate(model, (torch.tensor(3.0),), {})[1]) == {"k"}
    trace = pyro.poutine.trace(guide).get_trace(torch.tensor(3.0), observations={"k": torch.tensor(9.0)})
    rate, first, total, k = received[-1]
    assert rate is trace.nodes["rate"]["value"]
    assert first is trace.nodes["first"]["value"]
    assert torch.equal(total, first.sum(-1))
    assert k == 9.0
    pair = simulated_pair(model, guide, (torch.tensor(3.0),), {}, 2, np.random.default_rng(0))
    assert pair.drawn is not None
    assert np.isfinite(pair.drawn.log_q).all()


def test_an_observed_delta_is_simulated(lm: LM) -> None:
    """A condition on the text is an observation like any other: simulated, it is that of the simulated text."""

    def model(n: Tensor) -> None:
        z = pyro.sample("z", lm("a", max_tokens=3, stop="."))
        pyro.sample("n", dist.Delta((z >= 0).sum(-1)), obs=n)

    for _ in range(5):
        latents, observations = simulate(model, (torch.tensor(9),), {})
        assert observations["n"] == (latents["z"] >= 0).sum(-1)


def test_what_a_prompt_may_not_ask_for_or_write(lm: LM) -> None:
    model = counts(lm)
    with pytest.raises(ValueError, match=r"asks for 'w', which is neither .* those are \['k', 'x'\]"):
        context(PromptGuide(model, lm, prompt={"z": lambda w: [w]}), "ab", 1.0)
    numbers = PromptGuide(model, lm, prompt={"z": lambda k: [f"{k}"]})
    with pytest.raises(TypeError, match=r"writes 'k', which is Tensor here, into a string. Write its rows one by one"):
        context(numbers, "ab", 1.0, observations={"k": torch.tensor([1.0, 2.0])})
