"""Refined samples have exact weights: by enumeration of every start, move and acceptance on 5 symbols and 3 tokens."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pyro
import pytest
import torch
from pyro.infer import Predictive
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from llmppl import importance, mcmc, smc
from llmppl.diagnostics import bounds, calibrate, diagnose, gap_report
from llmppl.distributions import masked_text as masked
from llmppl.distributions.masked_text import MaskedText
from llmppl.guides import RefinementGuide
from llmppl.masked_lm import MaskedLM
from llmppl.objectives import Denoising, LeaveOneOutELBO, TrajectoryBalance
from llmppl.refinement import annealing, mixture
from llmppl.refinement.annealing import anneal, anneal_back, schedule
from llmppl.refinement.configurations import Configuration, Configurations
from llmppl.testing import tiny_lm
from llmppl.training.evaluation import Evaluation
from llmppl.training.fit import fit


class Toy:
    """An infilling with all its 85 middles, and an untrained network."""

    def __init__(self, **options: object) -> None:
        self.lm = tiny_lm(vocabulary=5, seed=0, dtype=torch.float64)
        self.network = MaskedLM.from_scratch(self.lm, max_tokens=3, width=8, layers=1, heads=2, seed=0)
        with torch.no_grad():
            for p in self.network.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p.dtype))
        self.guide = RefinementGuide(self.program, self.lm, network=self.network, **{"steps": 2, **options})  # type: ignore[arg-type]
        prior = self.lm("ab", max_tokens=3, stop=".")
        self.texts = prior.enumerate_support()
        self.log_p = prior.log_prob(self.texts) + self.lm("ab", self.texts).log_prob(self.lm.encode("cd"))
        self.log_z = float(self.log_p.logsumexp(0))

    def program(self, beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", self.lm(beginning, max_tokens=3, stop="."))
        pyro.sample("ending", self.lm(beginning, middle), obs=self.lm.encode(ending))

    def space(self, units: int) -> Configurations:
        frames = (CondIndepStackFrame("_particles", -1, units, 0),)
        return Configurations(lambda: self.program("ab", "cd"), lambda: self.guide("ab", "cd"), frames)

    def at(self, rows: Tensor) -> Configuration:
        return self.space(len(rows)).at({"middle": self.texts[rows]})

    def rows_of(self, values: Tensor) -> Tensor:
        return (values.reshape(-1, 1, 3) == self.texts).all(-1).long().argmax(-1)


@pytest.fixture
def toy() -> Toy:
    return Toy()


def states_of(toy: Toy) -> Configuration:
    everything = toy.at(torch.arange(len(toy.texts)))
    torch.testing.assert_close(everything.log_p, toy.log_p)
    assert float(everything.log_q.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    return everything


def with_chances(toy: Toy, states: Configuration, ratio: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    matrix = torch.zeros(len(toy.texts), len(toy.texts), dtype=torch.float64)
    matrix.index_put_((a, b), weight * ratio.exp().clamp(max=1.0), accumulate=True)
    matrix.fill_diagonal_(0.0)
    return matrix + torch.diag(1 - matrix.sum(-1))


def independent_matrix(toy: Toy, states: Configuration, beta: float, patch: pytest.MonkeyPatch) -> Tensor:
    """Every state with every proposal, through the code's own acceptance."""
    n = len(toy.texts)
    a, b = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    old, new = (Configuration({"middle": toy.texts[r]}, {}, states.log_q[r], states.log_p[r]) for r in (a, b))
    ratio = seen_ratio(patch, lambda: annealing.independent(Proposing(new), old, beta))  # type: ignore[arg-type]
    return with_chances(toy, states, ratio, a, b, states.log_q[b].exp())


def remasked_matrix(
    toy: Toy, states: Configuration, beta: float, patch: pytest.MonkeyPatch, accepting: bool = True
) -> Tensor:
    """Every state with every set of masks and every text filled in, through the code's own acceptance, or without."""
    rows = []
    sizes = (toy.texts >= 0).sum(-1).tolist()
    for count in range(1, 4):
        same = [n for n, size in enumerate(sizes) if size == count]
        for size in range(1, count + 1):
            chance = math.log((size + 1) / size) / math.log(count + 1) / math.comb(count, size)
            for places in itertools.combinations(range(count), size):
                kept = [t for t in range(3) if t not in places]
                for i in same:
                    for j in same:
                        if torch.equal(toy.texts[i, kept], toy.texts[j, kept]):
                            rows.append((i, j, chance, [t in places for t in range(3)]))
    a, b = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    chance, masks = torch.tensor([r[2] for r in rows], dtype=torch.float64), torch.tensor([r[3] for r in rows])
    old, target = toy.at(a), toy.texts[b]
    patch.setattr(annealing, "draw_masks", lambda value: masks)
    patch.setattr(masked, "_parts", lambda rows, *_: [rows])
    patch.setattr(masked, "choose", lambda log_probs: target[masks])
    there: list[Tensor] = []
    real = MaskedText.refill

    def refill(fn: MaskedText, value: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = real(fn, value, wanted)
        there.append(found[1])
        torch.testing.assert_close(found[0], target)
        return found

    patch.setattr(MaskedText, "refill", refill)
    ratio = seen_ratio(patch, lambda: annealing.remasked(toy.space(len(a)), old, beta))
    patch.undo()
    ratio = ratio if accepting else torch.full_like(ratio, torch.inf)
    return with_chances(toy, states, ratio, a, b, chance * there[0].exp())


class Proposing:
    def __init__(self, new: Configuration) -> None:
        self.new = new

    def draw(self) -> Configuration:
        return self.new


def seen_ratio(patch: pytest.MonkeyPatch, move: object) -> Tensor:
    seen: list[Tensor] = []
    with patch.context() as local:
        local.setattr(annealing, "accepted", lambda state, new, ratio: seen.append(ratio) or state)
        move()  # type: ignore[operator]
    return seen[0]


@pytest.mark.long
def test_moves_leave_their_targets_invariant_and_annealed_weights_have_mean_z(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = states_of(toy)
    betas = schedule(2)
    log_w = states.log_p - states.log_q
    mean, before = states.log_q.exp(), 0.0
    unadjusted, refilled = mean.clone(), mean.clone()
    for beta in betas:
        target = ((1 - beta) * states.log_q + beta * states.log_p).softmax(0)
        mean, unadjusted, refilled = (v * ((beta - before) * log_w).exp() for v in (mean, unadjusted, refilled))
        for make in (independent_matrix, remasked_matrix):
            matrix = make(toy, states, beta, monkeypatch)
            assert float(matrix.min()) >= -1e-12
            assert float((target @ matrix - target).abs().max()) < 1e-12
            assert float(matrix.diagonal().mean()) < 0.95  # it moves
            mean = mean @ matrix
        # Without acceptance, the same weights: another start of the guide, whatever the target.
        unadjusted = unadjusted.sum() * states.log_q.exp()
        refilled = refilled @ remasked_matrix(toy, states, beta, monkeypatch, accepting=False)
        before = beta
    mean, unadjusted, refilled = (v * ((1 - before) * log_w).exp() for v in (mean, unadjusted, refilled))
    assert float(mean.sum()) / math.exp(toy.log_z) == pytest.approx(1.0, abs=1e-9)
    # Always accepted, the mean weight is far from Z, be it a new draw or some tokens filled in anew.
    assert float(unadjusted.sum()) / math.exp(toy.log_z) == pytest.approx(0.6398, abs=1e-3)
    assert float(refilled.sum()) / math.exp(toy.log_z) == pytest.approx(0.8458, abs=1e-3)


def test_a_trajectory_has_the_same_weight_forwards_and_backwards(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the sum written out, along 40 random paths."""
    states, betas = states_of(toy), [0.0, *schedule(2), 1.0]
    path = torch.randint(len(toy.texts), (3, 40))
    log_w = (states.log_p - states.log_q)[path]
    expected = sum((betas[t + 1] - betas[t]) * log_w[t] for t in range(3))
    stops = [toy.at(rows) for rows in path]

    def along(order: list[int]) -> None:
        todo = iter(order)
        monkeypatch.setattr(annealing, "independent", lambda space, state, beta: state)
        monkeypatch.setattr(annealing, "remasked", lambda space, state, beta: stops[next(todo)])

    space = toy.space(40)
    monkeypatch.setattr(space, "draw", lambda: stops[0])
    along([1, 2])
    values, log_q = anneal(space, 2)
    torch.testing.assert_close(values["middle"], toy.texts[path[2]])
    torch.testing.assert_close(states.log_p[path[2]] - log_q, expected)
    along([1, 0])
    torch.testing.assert_close(anneal_back(space, 2, stops[2].values), log_q)


@pytest.mark.long
def test_the_moves_of_the_code_are_those_of_the_matrices(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 000 moves from one state each; frequencies against the matrix's row, by chi-square, 5 deviations."""
    states = states_of(toy)
    start = int(states.log_p.argmax())
    units = 20_000
    for make, move in ((independent_matrix, annealing.independent), (remasked_matrix, annealing.remasked)):
        row = make(toy, states, 0.4, monkeypatch)[start] * units
        one = states
        old = Configuration(
            {"middle": toy.texts[[start] * units]}, {}, one.log_q[[start] * units], one.log_p[[start] * units]
        )
        counts = toy.rows_of(move(toy.space(units), old, 0.4).values["middle"]).bincount(minlength=len(row))
        assert not bool(counts[row < 1e-9].any())
        often = row > 5
        statistic = float(((counts - row)[often] ** 2 / row[often]).sum())
        degrees = int(often.sum())
        assert statistic < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("count", [2, 3])
def test_the_mixture_is_a_density_on_all_texts_given_any_parents(
    toy: Toy, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each of 20 sets of parents and masks; without its defensive part it is one, too, but misses texts."""
    states = states_of(toy)
    space, n, sets = toy.space(20 * len(toy.texts)), len(toy.texts), 20
    parents = mixture.draw_parents(space, count)
    row = torch.arange(sets).repeat_interleave(n) * n  # every text of a set has the parents of its first
    own = parents.configuration
    parents = replace(
        parents,
        configuration=Configuration({"middle": own.values["middle"][:, row]}, {}, own.log_q[:, row], own.log_p[:, row]),
        masks=parents.masks[:, row],
        log_alpha=parents.log_alpha[:, row],
    )
    values = {"middle": toy.texts.repeat(sets, 1)}
    log_q = states.log_q.repeat(sets)
    found = mixture.log_density(space, parents, values, log_q).reshape(sets, n)
    assert float((found.exp().sum(-1) - 1).abs().max()) < 1e-9
    weights = (states.log_p - found).exp()
    mean = (found.exp() * weights).sum(-1) / math.exp(toy.log_z)
    torch.testing.assert_close(mean, torch.ones_like(mean), atol=1e-9, rtol=0)
    monkeypatch.setattr(mixture, "DEFENSIVE", 1e-300)
    bare = mixture.log_density(space, parents, values, log_q).reshape(sets, n)
    reached = bare > -300
    missing = (states.log_p.exp() * reached).sum(-1) / math.exp(toy.log_z)
    # 0.49 of Z with two parents, 0.63 with three.
    assert float(missing.mean()) < 0.8


@pytest.mark.long
def test_draws_of_the_mixture_follow_its_density(toy: Toy) -> None:
    """Means of 12 000 weights, overall and of an event, within 4 standard errors (3 % each)."""
    states = states_of(toy)
    values, log_q = mixture.mix(toy.space(12_000), 3)
    row = toy.rows_of(values["middle"])
    for event in (torch.ones(len(toy.texts)), (toy.texts[:, 0] == 1).double()):
        weights = (states.log_p[row] - log_q).exp() * event[row] / math.exp(toy.log_z)
        truth = float((states.log_p.exp() * event).sum()) / math.exp(toy.log_z)
        assert float(weights.mean()) == pytest.approx(truth, abs=4 * float(weights.std()) / math.sqrt(12_000))


@pytest.mark.long
def test_the_gap_falls_and_the_bracket_closes_with_temperatures(toy: Toy) -> None:
    """600 samples, standard errors of 0.1 nats at most; both bounds within 3 standard errors of the truth."""
    gaps, widths = [], []
    for temperatures in (0, 4, 16):
        guide = toy.guide.at(refine="ais", temperatures=temperatures)
        space = Configurations(
            lambda: toy.program("ab", "cd"),
            lambda: toy.guide("ab", "cd"),
            (CondIndepStackFrame("_particles", -1, 600, 0),),
        )
        states = toy.at(torch.distributions.Categorical(logits=toy.log_p).sample((600,)))
        low_values, low_q = anneal(space, temperatures)
        low = toy.log_p[toy.rows_of(low_values["middle"])] - low_q
        high = states.log_p - anneal_back(space, temperatures, states.values)
        assert low.mean() - 3 * low.std() / 600**0.5 < toy.log_z < high.mean() + 3 * high.std() / 600**0.5
        gaps.append(toy.log_z - float(low.mean()))
        widths.append(float(high.mean() - low.mean()))
        assert guide.exactness == "extended"
    assert gaps[0] > 1.5 * gaps[1] > 2.25 * gaps[2]
    assert widths[0] > 1.5 * widths[1] > 2.25 * widths[2]
    assert gaps[0] > 0.3


@pytest.mark.long
@pytest.mark.parametrize("options", [{"refine": "ais", "temperatures": 2}, {"refine": "mixture", "parents": 3}])
def test_several_sites_plates_and_random_orders_keep_the_evidence(options: dict[str, object]) -> None:
    """Two latents, one in a plate of its own; 4 standard errors of 320 samples."""
    toy = Toy(order="random", num_orders=2)
    lm = toy.lm

    def model(ending: str) -> None:
        first = pyro.sample("first", lm("a", max_tokens=2, stop="."))
        with pyro.plate("readers", 2):
            own = pyro.sample("own", lm(first, max_tokens=1))
        pyro.sample("close", lm(first), obs=lm.encode(ending))
        assert own.shape[-1] == 1

    guide = RefinementGuide(model, lm, network=toy.network, steps=1, order="random", num_orders=2, **options)  # type: ignore[arg-type]
    texts = lm("a", max_tokens=2, stop=".").enumerate_support()
    log_z = float((lm("a", max_tokens=2, stop=".").log_prob(texts) + lm(texts).log_prob(lm.encode("b"))).logsumexp(0))
    posterior = importance(model, guide, 320)("b")
    assert float(posterior.log_evidence) == pytest.approx(log_z, abs=4 * float(posterior.log_evidence_error))
    assert posterior.samples["own"].shape == (320, 2, 1)


@pytest.mark.long
@pytest.mark.parametrize("options", [{"refine": "ais", "temperatures": 2}, {"refine": "mixture"}])
def test_refined_guides_work_wherever_weights_do_and_are_not_trained(toy: Toy, options: dict[str, object]) -> None:
    guide = toy.guide.at(**options)  # type: ignore[arg-type]
    posterior = importance(toy.program, guide, 128, vectorize_data=True)(["ab", "ab"], ["cd", "cd"])
    assert posterior.exactness == guide.exactness != toy.guide.exactness
    assert posterior.log_evidence == pytest.approx([toy.log_z] * 2, abs=4 * posterior.log_evidence_error.max())
    found = bounds(toy.program, guide, 4, vectorize_data=True)(["ab"] * 30, ["cd"] * 30)
    assert found.kl_sum.value > 0
    assert Predictive(toy.program, guide=guide, num_samples=2)("ab", "cd")["middle"].shape == (2, 3)
    for objective in (LeaveOneOutELBO(2), TrajectoryBalance(2)):
        with pytest.raises(ValueError, match=r"Train it with refine=None"):
            objective.loss_and_grads(toy.program, guide, "ab", "cd")
    with pytest.raises(TypeError, match="RefinementGuide"):
        Denoising(2).loss_and_grads(toy.program, guide, "ab", "cd")
    trace = pyro.poutine.trace(guide).get_trace("ab", "cd")
    other = toy.texts[(toy.rows_of(trace.nodes["middle"]["value"])[0] + 1) % len(toy.texts)]
    with pytest.raises(ValueError, match="drawn and then replaced"):
        trace.nodes["middle"]["fn"].log_prob(other)
    assert f"refine={options['refine']!r}" in repr(guide)
    assert "refine" not in repr(guide.at(refine=None))
    assert guide.at(steps=1).exactness == guide.exactness


def test_malformed_refinements_are_refused(toy: Toy) -> None:
    with pytest.raises(ValueError, match="refine='annealing' is no refinement. Use one of"):
        toy.guide.at(refine="annealing")
    with pytest.raises(ValueError, match="temperatures must be a whole number of at least 0, got -1"):
        toy.guide.at(refine="ais", temperatures=-1)
    with pytest.raises(ValueError, match="parents must be a whole number of at least 1, got 0"):
        Toy(refine="mixture", parents=0)


def test_a_guide_without_density_is_refused_by_everything_that_weighs(toy: Toy) -> None:
    class Inexact(RefinementGuide):
        exactness = "none"  # type: ignore[assignment]

    guide = Inexact(toy.program, toy.lm, network=toy.network)
    data = [("ab", "cd")]
    for ask in (
        lambda: importance(toy.program, guide, 2),
        lambda: smc(toy.program, guide, 2),
        lambda: mcmc(toy.program, guide),
        lambda: bounds(toy.program, guide, 2),
        lambda: calibrate(toy.program, guide),
        lambda: diagnose(toy.program, guide, data),
        lambda: gap_report(toy.program, guide, data),
        lambda: fit(toy.program, guide, data, Denoising(2), steps=1, evaluation=Evaluation(data), progress=False),
    ):
        with pytest.raises(ValueError, match="Inexact has no exact density .exactness 'none'., so its samples have no"):
            ask()
