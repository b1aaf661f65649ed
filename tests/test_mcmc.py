"""mcmc(): detailed balance by enumerated kernels, and chains against the exact posterior."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story
from scipy import stats
from test_objectives import perturbed
from torch import Tensor

from llmppl import LM, Grammar, exact_posterior, mcmc
from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.inference.mcmc import _Chains, independence_chain
from llmppl.inference.rewriting import alternatives, log_ratio, propose, rewrite
from llmppl.models import infilling
from llmppl.network.text_tensors import lengths
from llmppl.posterior.posterior import Posterior
from llmppl.programs.plates import in_data_plate
from llmppl.testing import tiny_lm
from llmppl.text import PAD

TEXTS = {
    "stop": {"max_tokens": 3, "stop": "."},
    "shortest of two tokens": {"max_tokens": 4, "stop": ".", "min_tokens": 2, "allowed": [0, 1, 2]},
    "of one length": {"max_tokens": 3, "temperature": 0.7},
    "several stops": {"max_tokens": 3, "stop": [0, 3]},
    "grammar": {"max_tokens": 5, "grammar": "(ab|c)+b?"},
}


@pytest.fixture
def small() -> LM:
    return tiny_lm(vocabulary=4, seed=0, dtype=torch.float64)


def prior_of(lm: LM, kind: str, context: str = "ab") -> AutoregressiveText:
    options = dict(TEXTS[kind])
    if "grammar" in options:
        options["grammar"] = Grammar.regex(options["grammar"])
    return lm(context, **options)


def densities(proposal: AutoregressiveText, texts: Tensor, start: int, block: int) -> Tensor:
    """log q(z' | z, t) between all texts, ``(z, z')``; rows whose text has no such place are left out."""
    n = len(texts)
    fn = proposal.expand((n * n,))
    sources, targets = texts.repeat_interleave(n, 0), texts.repeat(n, 1)
    exists = lengths(sources) > start
    found = torch.full((n * n,), -torch.inf, dtype=torch.float64)
    fn = fn.with_context(fn.context[exists], fn.adapter)
    starts = torch.full((int(exists.sum()),), start)
    found[exists] = rewrite(fn, sources[exists], starts, block, targets[exists])[1]
    return found.reshape(n, n)


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("block", [2, 99])
def test_every_kernel_is_in_detailed_balance_with_the_posterior(small: LM, kind: str, block: int) -> None:
    """The whole transition matrix, from the densities that the chains use, with a proposal that is not the prior:
    rows sum to one, p(z) T(z, z') = p(z') T(z', z), p T = p, to 1e-9."""
    prior, proposal = prior_of(small, kind), prior_of(small, kind, context="cb")
    texts = prior.enumerate_support()
    log_p = (prior.log_prob(texts) + small("ab", texts).log_prob(small.encode("ca"))).log_softmax(0)
    count, n = lengths(texts), len(texts)
    kernel = torch.zeros(n, n, dtype=torch.float64)
    block = min(block, texts.shape[-1])
    for start in range(texts.shape[-1]):
        log_q = densities(proposal, texts, start, block)
        there = count > start
        mass = log_q.exp().sum(-1)[there]
        if kind != "grammar":  # a block may then be rewritten to something that no tail fits
            torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-9)
        assert bool((mass <= 1 + 1e-9).all())
        lengths_of = (count[:, None].expand(n, n).reshape(-1), count.expand(n, n).reshape(-1))
        ratio = log_ratio(*lengths_of, log_q.reshape(-1), log_q.T.reshape(-1)).reshape(n, n)
        accept = (log_p[None, :] - log_p[:, None] + ratio).clamp(max=0).exp()
        place = there.double() / count
        kernel += place[:, None] * (log_q.exp() * accept)
    kernel.fill_diagonal_(0.0)
    assert bool((kernel.sum(-1) <= 1 + 1e-9).all())
    kernel += torch.diag(1 - kernel.sum(-1))
    flow = log_p.exp()[:, None] * kernel
    torch.testing.assert_close(flow, flow.T, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(log_p.exp() @ kernel, log_p.exp(), rtol=0, atol=1e-9)
    # And nothing else is stationary: every text is reached from every other.
    ways = (kernel > 0).double()
    for _ in range(6):
        ways = (ways @ ways > 0).double()
    assert bool((ways > 0).all()), "some text is not reached"
    assert float(flow.sum() - flow.diagonal().sum()) > 1e-3


@pytest.mark.parametrize("kind", ["stop", "shortest of two tokens", "grammar"])
def test_rewritings_are_drawn_with_the_density_that_is_reported(small: LM, kind: str) -> None:
    """From each of three texts 4000 rewritings, by chi-square at the 0.1 % level; and each log-ratio is that of the
    enumerated densities, to 1e-9."""
    proposal = prior_of(small, kind, context="cb")
    texts = proposal.enumerate_support()
    count = lengths(texts)
    block = 2
    log_q = torch.stack([densities(proposal, texts, start, block) for start in range(texts.shape[-1])])
    places = torch.arange(texts.shape[-1])
    by_place = (
        log_q - count.double().log()[:, None] + torch.where(places[:, None, None] < count[:, None], 0.0, -torch.inf)
    )
    for source in (0, len(texts) // 2, len(texts) - 1):
        rows = texts[source].repeat(4000, 1)
        new, ratios = propose(proposal.expand((4000,)), rows, block)
        found = ratios.isfinite()
        index = (new[:, None] == texts).all(-1).long().argmax(-1)
        inside = (new[:, None] == texts).all(-1).any(-1)
        ratios_of = by_place[:, :, source] - by_place[:, source, :]  # (place, target)
        known = ratios_of[:, index[inside & found]]
        nearest = (known - ratios[inside & found]).abs().nan_to_num(torch.inf).amin(0)
        assert float(nearest.max()) < 1e-9
        # Of texts outside the support a kept tail is the reason; their posterior is zero.
        due = by_place[:, source].exp().sum(0).numpy() * 4000
        seen = np.bincount(index[inside & found].numpy(), minlength=len(texts))
        due, seen = np.append(due, 4000 - due.sum()), np.append(seen, 4000 - seen.sum())
        rare = due < 5
        due, seen = np.append(due[~rare], due[rare].sum()), np.append(seen[~rare], seen[rare].sum())
        positive = due > 1e-9
        assert seen[~positive].sum() == 0
        assert stats.chisquare(seen[positive], due[positive] * 4000 / due[positive].sum()).pvalue > 1e-3


def test_the_alternatives_of_a_token_are_the_texts_that_differ_there_alone(small: LM) -> None:
    for kind in ("stop", "shortest of two tokens", "of one length", "several stops"):
        prior = prior_of(small, kind)
        texts = prior.enumerate_support()
        for start in range(texts.shape[-1]):
            here = texts[lengths(texts) > start]
            permitted = alternatives(prior.law, here, torch.full((len(here),), start))
            for text, tokens in zip(here, permitted, strict=True):
                same_rest = (texts == text) | (torch.arange(texts.shape[-1]) == start)
                equal = texts[same_rest.all(-1) & (texts[:, start] != PAD)]
                assert sorted(equal[:, start].tolist()) == tokens.nonzero()[:, 0].tolist()


def test_an_independence_chain_follows_its_weights() -> None:
    """Stationary probabilities of four states, by the proposals' frequencies over 200 000 steps."""
    p, q = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.3, 0.2, 0.1])
    generator = np.random.default_rng(0)
    drawn = generator.choice(4, p=q, size=(20, 10_001))
    log_weights = np.log(p / q)[drawn]
    index, accepted = independence_chain(log_weights, generator.random(log_weights.shape))
    states = np.take_along_axis(drawn, index, 1)[:, 100:]
    # The acceptance in equilibrium, Σ p q' min(1, w'/w), makes about 3 steps one independent draw.
    expected = sum(p[i] * q[j] * min(1, p[j] * q[i] / (q[j] * p[i])) for i in range(4) for j in range(4))
    assert accepted[:, 100:].mean() == pytest.approx(expected, abs=0.005)
    np.testing.assert_allclose(np.bincount(states.ravel()) / states.size, p, atol=0.006)


def check_against(posterior: Posterior, site: str, exact: Posterior) -> None:
    """Frequencies of the values of 2 % and more within 4.5 standard errors, by the ESS of each value's own
    indicator (ArviZ)."""
    import arviz

    due: dict[bytes, float] = {}
    for value, weight in zip(exact.samples[site], exact.weights, strict=True):
        due[value.tobytes()] = due.get(value.tobytes(), 0.0) + float(weight)
    seen = [np.ascontiguousarray(value).tobytes() for value in posterior.samples[site]]
    assert set(seen) <= set(due)
    frequent = {value: p for value, p in due.items() if p >= 0.02}
    assert len(frequent) >= 2
    for value, p in frequent.items():
        hits = np.array([s == value for s in seen], dtype=float).reshape(posterior.num_chains, -1)
        ess = float(arviz.ess(hits))
        assert ess > 30
        assert hits.mean() == pytest.approx(p, abs=4.5 * np.sqrt(p * (1 - p) / ess))


@pytest.mark.long
@pytest.mark.parametrize("guided", [False, True])
def test_independence_chains_reach_the_exact_posterior(story: Story, guided: bool) -> None:
    story.ending = "c"
    told = {"middle": lambda beginning: [beginning]}
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, told, rank=2), 0.03) if guided else None
    posterior = mcmc(story.program, guide, num_samples=400, num_chains=8, seed=1)(*story.args)
    check_against(posterior, "middle", exact_posterior(story.program)(*story.args))
    assert posterior.rhat < 1.2
    assert 20 < posterior.ess < 3200
    assert "8 chains, accepted" in repr(posterior)


def at_the_posterior(chains: _Chains, exact: Posterior, count: int) -> None:
    """Put chains without rows where exact draws of the posterior are."""
    draws = exact.resample(count, seed=7)
    chains.values = {
        name: torch.as_tensor(draws.samples[name]).reshape(value.shape).to(value.dtype)
        for name, value in chains.values.items()
    }
    chains.log_p = chains._log_joint(chains.values, chains.stages)


def pvalue(values: np.ndarray, exact: Posterior, site: str) -> float:
    """Chi-square of independent chains' values against the exact posterior."""
    due: dict[bytes, float] = {}
    for value, weight in zip(exact.samples[site], exact.weights, strict=True):
        due[value.tobytes()] = due.get(value.tobytes(), 0.0) + float(weight) * len(values)
    seen = dict.fromkeys(due, 0)
    for value in np.ascontiguousarray(values.astype(exact.samples[site].dtype)):
        seen[value.tobytes()] += 1
    often = [value for value, count in due.items() if count >= 5]
    assert len(often) >= 2
    counts = np.array([seen[v] for v in often] + [len(values) - sum(seen[v] for v in often)])
    wanted = np.array([due[v] for v in often] + [len(values) - sum(due[v] for v in often)])
    return float(stats.chisquare(counts, wanted * counts.sum() / wanted.sum()).pvalue)


@pytest.mark.long
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kernel", ["suffix", "block", "gibbs"])
def test_chains_that_start_at_the_posterior_stay_there(story: Story, kernel: str, guided: bool) -> None:
    """1500 independent chains from stratified exact draws, whose law must not change in 8 steps: chi-square at the
    0.1 % level. A good part of them has moved by then."""
    story.ending = "c"
    told = {"middle": lambda beginning: [beginning]}
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, told, rank=2), 0.03) if guided else None
    exact = exact_posterior(story.program)(*story.args)
    with torch.no_grad():
        chains = _Chains(story.program, guide, story.args, {}, 1500, kernel, 2)
        at_the_posterior(chains, exact, 1500)
        before = chains.values["middle"].clone()
        for _ in range(8):
            chains.step(counts=True)
    assert pvalue(chains.values["middle"].numpy(), exact, "middle") > 1e-3
    moved = (chains.values["middle"] != before).any(-1).double().mean()
    assert float(moved) > 0.1
    log_p = chains._log_joint(chains.values, chains.stages)
    torch.testing.assert_close(log_p, chains.log_p, rtol=0, atol=1e-9)


def test_a_run_gives_scored_samples(story: Story) -> None:
    guide = PromptGuide(story.program, story.lm)
    texts, log_joint = story.joint()
    for kernel in ("suffix", "block", "gibbs"):
        for q in (None, guide):
            posterior = mcmc(story.program, q, kernel, 5, num_chains=3, warmup=1, seed=1)(*story.args)
            assert posterior.method == "mcmc"
            assert posterior.samples["middle"].shape == (15, 3)
            assert posterior.acceptance.shape == (3,)
            assert (posterior.log_weights == 0).all()
            index = (torch.as_tensor(posterior.samples["middle"])[:, None] == texts).all(-1).long().argmax(-1)
            np.testing.assert_allclose(posterior.log_joint, log_joint[index].numpy(), atol=1e-9)
            assert ("middle" in posterior.token_log_q) == (q is not None)
            assert posterior.log_likelihood["ending"].shape == (15,)


@pytest.mark.long
def test_rows_have_chains_of_their_own(story: Story) -> None:
    beginnings, endings = ["ab", "d"], ["c", "e"]
    exact = [exact_posterior(story.program)(*args) for args in zip(beginnings, endings, strict=True)]
    posterior = mcmc(story.program, None, num_samples=300, num_chains=8, vectorize_data=True, seed=0)(
        beginnings, endings
    )
    assert posterior.batch_shape == (2,)
    assert posterior.acceptance.shape == (8, 2)
    for row in range(2):
        check_against(posterior.row(row), "middle", exact[row])
    with torch.no_grad():
        chains = _Chains(in_data_plate(story.program), None, (beginnings, endings), {}, 1000, "block", 2)
        starts = [torch.as_tensor(e.resample(1000, seed=7).samples["middle"]) for e in exact]
        chains.values = {"middle": torch.stack(starts, 1)}
        chains.log_p = chains._log_joint(chains.values, chains.stages)
        for _ in range(6):
            chains.step(counts=True)
    assert chains.accepted.shape == (1000, 2)
    for row in range(2):
        assert pvalue(chains.values["middle"][:, row].numpy(), exact[row], "middle") > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("kernel", ["suffix", "gibbs"])
def test_sites_of_every_kind_move_in_turn(small: LM, kernel: str) -> None:
    """A choice, a coin for each of two entries of a plate, and a text for each: 1000 chains stay at the posterior."""

    def model(ending: str) -> None:
        plan = pyro.sample("plan", small.choice("ab", options=["c", "b."]))
        with pyro.plate("parts", 2, dim=-1):
            coin = pyro.sample("coin", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
            starts = small.encode(["a", "b"])[coin.long()]
            part = pyro.sample("part", small(starts, max_tokens=2, stop="."))
        parts = (part[..., n : n + 1, :] for n in range(2))
        pyro.sample("ending", small(plan, *parts), obs=small.encode(ending))

    exact = exact_posterior(model)("c")
    assert exact.num_samples == 2 * 4 * 13**2
    with torch.no_grad():
        chains = _Chains(model, None, ("c",), {}, 1000, kernel, 2)
        at_the_posterior(chains, exact, 1000)
        before = {name: value.clone() for name, value in chains.values.items()}
        for _ in range(6):
            chains.step(counts=True)
    for site in ("plan", "coin", "part"):
        value = chains.values[site].reshape(1000, *exact.samples[site].shape[1:])
        assert pvalue(value.numpy(), exact, site) > 1e-3
        assert float((chains.values[site] != before[site]).double().mean()) > 0.02


@pytest.mark.long
def test_samples_stand_chain_after_chain_and_reproduce_from_a_seed(story: Story) -> None:
    for kernel in ("independence", "suffix"):
        before = torch.get_rng_state()
        first = mcmc(story.program, None, kernel, 40, 3, warmup=0, seed=5)(*story.args)
        assert torch.equal(before, torch.get_rng_state())
        again = mcmc(story.program, None, kernel, 40, 3, warmup=0, seed=5)(*story.args)
        assert np.array_equal(first.samples["middle"], again.samples["middle"])
        other = mcmc(story.program, None, kernel, 40, 3, warmup=0, seed=6)(*story.args)
        assert not np.array_equal(first.samples["middle"], other.samples["middle"])
        # A rejected step repeats a sample of its own chain: no more changes than accepted moves.
        chains = first.samples["middle"].reshape(3, 40, 3)
        changes = (chains[:, 1:] != chains[:, :-1]).any(-1).sum(-1)
        assert (changes <= np.round(first.acceptance * 40)).all()
        assert (first.acceptance < 1).all()


@pytest.mark.long
def test_chains_start_where_the_posterior_is_positive(story: Story) -> None:
    lm = story.lm

    def model(letter: int) -> None:
        middle = pyro.sample("middle", lm("ab", max_tokens=3, stop="."))
        pyro.factor("has", torch.where((middle == letter).any(-1), 0.0, -torch.inf))

    for kernel in ("independence", "suffix"):
        posterior = mcmc(model, None, kernel, 20, 6, warmup=60, seed=0)(5)
        assert (posterior.samples["middle"] == 5).any(-1).all()
    with pytest.raises(ValueError, match="no start of positive probability in 100 draws"):
        mcmc(model, None, "suffix", 20, 2, warmup=0, seed=0)(99)
    with pytest.raises(ValueError, match="has positive weight"):
        mcmc(model, None, "independence", 20, 2, warmup=0, seed=0)(99)


def test_what_makes_no_chain_is_refused(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    program, lm, module = story.program, story.lm, sys.modules["llmppl.inference.mcmc"]
    with pytest.raises(ValueError, match="kernel='gips' must be one of"):
        mcmc(program, kernel="gips")
    with pytest.raises(ValueError, match="num_samples must be at least 4, got 3"):
        mcmc(program, num_samples=3)
    with pytest.raises(ValueError, match="num_chains must be at least 1"):
        mcmc(program, num_chains=0)
    with pytest.raises(ValueError, match="warmup must be at least 0"):
        mcmc(program, warmup=-1)
    with pytest.raises(ValueError, match="block= is for kernel='block'"):
        mcmc(program, block=3)
    with pytest.raises(ValueError, match="block must be at least 2 tokens"):
        mcmc(program, kernel="block", block=1)
    guide = PromptGuide(program, lm)
    guide.exactness = "extended"
    with pytest.raises(ValueError, match="needs the guide's exact density, and PromptGuide has exactness 'extended'"):
        mcmc(program, guide, kernel="suffix")

    def joint() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))

    from pyro.infer.autoguide import AutoMultivariateNormal

    with pytest.raises(ValueError, match="together with others, by an auxiliary site or a Delta"):
        mcmc(joint, AutoMultivariateNormal(joint), "suffix", 10, 2)()
    with pytest.raises(ValueError, match="'middle' is scaled"):
        mcmc(pyro.poutine.scale(program, 2.0), None, "suffix", 10, 2)(*story.args)
    monkeypatch.setattr(module, "GIBBS_TOKENS", 5)
    with pytest.raises(ValueError, match="scores every token of the vocabulary at a place: 6 of them; the most is 5"):
        mcmc(program, None, "gibbs", 10, 2)(*story.args)


@pytest.mark.long
def test_a_real_model_moves(smollm2: LM) -> None:
    story = infilling(smollm2, max_tokens=4)
    posterior = mcmc(story, None, "block", 10, 2, warmup=0, block=2, seed=0)("Tom lost his key", " home.")
    assert posterior.samples["middle"].shape == (20, 4)
    assert np.isfinite(posterior.log_joint).all()
    # The joint carried along the chains is that of the final scores: a repeated text has one joint.
    by_text: dict[bytes, set[float]] = {}
    for text, score in zip(posterior.samples["middle"], posterior.log_joint, strict=True):
        by_text.setdefault(text.tobytes(), set()).add(round(float(score), 2))
    assert max(max(s) - min(s) for s in by_text.values()) <= 0.011


def test_a_gibbs_move_draws_from_the_conditional(story: Story) -> None:
    """4000 chains at one text make one move of a token each: chi-square at the 0.1 % level against the place's
    choice times the conditional among all texts that differ there alone."""
    texts, log_joint = story.joint()
    width = torch.arange(texts.shape[-1])
    with torch.no_grad():
        chains = _Chains(story.program, None, story.args, {}, 4000, "gibbs", 2)
        fn = chains.stages.run(chains.stages.guide, chains.values).nodes["middle"]["fn"]
        for source in (4, 30, 155):
            count = int(lengths(texts[source]))
            due = torch.zeros(len(texts), dtype=torch.float64)
            for place in range(count):
                alike = ((texts == texts[source]) | (width == place)).all(-1) & (texts[:, place] != PAD)
                due += log_joint.masked_fill(~alike, -torch.inf).softmax(0) / count
            chains.values = {"middle": texts[source].repeat(4000, 1)}
            chains._resample_token("middle", fn)
            found = (chains.values["middle"][:, None] == texts).all(-1).long().argmax(-1)
            torch.testing.assert_close(chains.log_p, log_joint[found], rtol=0, atol=1e-9)
            seen, wanted = np.bincount(found.numpy(), minlength=len(texts)), 4000 * due.numpy()
            often = wanted >= 5
            seen, wanted = np.append(seen[often], seen[~often].sum()), np.append(wanted[often], wanted[~often].sum())
            wanted = np.maximum(wanted, 1e-9)
            assert stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-3
