"""exact_posterior(): mass and log Z against sums by hand, whatever the sites, plates and branches."""

from __future__ import annotations

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story

from llmppl import LM, Grammar, exact_posterior
from llmppl.inference import enumeration
from llmppl.testing import tiny_lm
from llmppl.text import PAD

EXACT = 1e-9


@pytest.fixture
def small() -> LM:
    return tiny_lm(vocabulary=4, seed=0, dtype=torch.float64)


def test_a_latent_in_a_plate_has_a_value_for_each_entry(small: LM) -> None:
    """13 texts for each of three sentences, told together in one ending: 13³ combinations."""

    def model(ending: str) -> None:
        with pyro.plate("sentences", 3, dim=-1):
            middle = pyro.sample("middle", small(["a", "b", "c"], max_tokens=2, stop="."))
        pyro.sample("ending", small(*(middle[..., n : n + 1, :] for n in range(3))), obs=small.encode(ending))

    texts = small("a", max_tokens=2, stop=".").enumerate_support()
    prior = torch.stack([small(start, max_tokens=2, stop=".").log_prob(texts) for start in "abc"])
    index = torch.tensor(list(itertools.product(range(len(texts)), repeat=3)))
    log_joint = sum(prior[n, index[:, n]] for n in range(3))
    log_joint = log_joint + small(*(texts[index[:, n]] for n in range(3))).log_prob(small.encode("cb"))
    posterior = exact_posterior(model)("cb")
    assert posterior.samples["middle"].shape == (len(texts) ** 3, 3, 2)
    assert float(posterior.log_evidence) == pytest.approx(log_joint.logsumexp(0).item(), abs=EXACT)
    ours = {s.tobytes(): w for s, w in zip(posterior.samples["middle"], posterior.log_weights, strict=True)}
    assert len(ours) == len(texts) ** 3
    for n in range(0, len(index), 97):
        assert ours[texts[index[n]].numpy().tobytes()] == pytest.approx(log_joint[n].item(), abs=EXACT)


def test_inside_rows_of_observations_a_plate_multiplies_for_each_row_alone(small: LM) -> None:
    endings = ["ab", "cc"]

    def model(endings: list[str]) -> None:
        with pyro.plate("rows", len(endings), dim=-1):
            with pyro.plate("coins", 2, dim=-2):
                coin = pyro.sample("coin", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
            starts = small.encode(["a", "b", "c"])[coin.sum(-2, keepdim=True).long()]
            pyro.sample("ending", small(starts), obs=small.encode(endings))

    posterior = exact_posterior(model)(endings)
    assert posterior.samples["coin"].shape == (4, 2, 2)
    p = {0: 0.49, 1: 0.42, 2: 0.09}
    for row, ending in enumerate(endings):
        by_hand = np.log(sum(w * small("abc"[n]).log_prob(small.encode(ending)).exp().item() for n, w in p.items()))
        assert posterior.log_evidence[row] == pytest.approx(by_hand, abs=EXACT)


BRANCHES = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def branch_by_hand(lm: LM) -> float:
    total = []
    for plan, (start, most) in enumerate([("a", 2), ("ab", 3)]):
        prior = lm(start, max_tokens=most, stop=".")
        texts = prior.enumerate_support()
        total.append(BRANCHES[plan].log() + prior.log_prob(texts) + lm(texts, "b").log_prob(lm.encode("ca")))
    for heads, p in ((0, 0.6), (1, 0.4)):
        likelihood = lm("a" if heads else "c", "b").log_prob(lm.encode("ca"))
        total.append((BRANCHES[2].log() + np.log(p) + likelihood).reshape(1))
    return torch.cat(total).logsumexp(0).item()


def test_sites_and_supports_that_depend_on_earlier_values_are_enumerated_run_by_run(small: LM) -> None:
    def model() -> None:
        plan = pyro.sample("plan", dist.Categorical(BRANCHES))
        if plan < 2:
            text = pyro.sample("text", small("a" if plan == 0 else "ab", max_tokens=2 + int(plan), stop="."))
        else:
            coin = pyro.sample("coin", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
            text = small.encode("a" if coin else "c")
        pyro.sample("ending", small(text, "b"), obs=small.encode("ca"))

    for seed in range(4):  # whichever branch the first run takes
        pyro.set_rng_seed(seed)
        posterior = exact_posterior(model)()
        assert posterior.num_samples == 13 + 40 + 2
        assert float(posterior.log_evidence) == pytest.approx(branch_by_hand(small), abs=EXACT)
        # What a combination does not have is padding, or NaN.
        without = posterior.samples["plan"] == 2
        assert (posterior.samples["text"][without] == PAD).all()
        assert (posterior.samples["text"][~without][:, 0] != PAD).all()
        assert np.array_equal(np.isnan(posterior.samples["coin"]), ~without)
        assert (posterior.token_log_p["text"][without] == 0).all()


def test_a_support_that_only_the_values_know_is_not_taken_from_one_run(small: LM) -> None:
    """Vectorised, this runs without any error; the first run's support has 0 to 3 heads at most."""

    def model() -> None:
        coins = pyro.sample("coins", dist.Categorical(torch.full((4,), 0.25, dtype=torch.float64)))
        heads = pyro.sample("heads", dist.Binomial(coins.double(), torch.tensor(0.3, dtype=torch.float64)))
        pyro.factor("seen", 0.7 * heads)

    by_hand = np.log(np.mean([(0.7 + 0.3 * np.exp(0.7)) ** n for n in range(4)]))
    for seed in range(6):
        pyro.set_rng_seed(seed)
        posterior = exact_posterior(model)()
        assert posterior.num_samples == 1 + 2 + 3 + 4
        assert float(posterior.log_evidence) == pytest.approx(by_hand, abs=EXACT)


def test_a_branch_taken_for_all_combinations_at_once_is_noticed_by_its_joint(small: LM) -> None:
    """`.any()` over the particles runs without error and gives a wrong joint: it must not be believed."""

    def model() -> None:
        plan = pyro.sample("plan", dist.Categorical(BRANCHES))
        start = "ab" if bool((plan == 1).any()) else "c"
        pyro.sample("ending", small(start), obs=small.encode("ca"))

    by_hand = np.log(
        0.3 * small("ab").log_prob(small.encode("ca")).exp().item()
        + 0.7 * small("c").log_prob(small.encode("ca")).exp().item()
    )
    assert float(exact_posterior(model)().log_evidence) == pytest.approx(by_hand, abs=EXACT)


def test_a_rare_branch_of_a_large_choice_is_noticed(small: LM) -> None:
    options = ["".join(letters) for letters in itertools.product("abc", repeat=2)]

    def model() -> None:
        plan = pyro.sample("plan", small.choice("a", options=options))
        text = pyro.sample("text", small("b", plan, max_tokens=2, stop="."))
        here = bool((plan == small.encode("cb")).all())
        pyro.sample("ending", small("a" if here else "b", text), obs=small.encode("ca"))

    choice = small.choice("a", options=options)
    total = []
    for value in choice.enumerate_support():
        prior = small("b", value, max_tokens=2, stop=".")
        texts = prior.enumerate_support()
        start = "a" if small.decode(value) == "cb" else "b"
        total.append(choice.log_prob(value) + prior.log_prob(texts) + small(start, texts).log_prob(small.encode("ca")))
    assert float(exact_posterior(model)().log_evidence) == pytest.approx(
        torch.cat(total).logsumexp(0).item(), abs=EXACT
    )


def test_three_sites_of_each_kind_with_a_grammar(small: LM) -> None:
    grammar = Grammar.regex("(ab|c)b?")

    def model() -> None:
        plan = pyro.sample("plan", small.choice("a", options=["b", "ca"]))
        text = pyro.sample("text", small(plan, max_tokens=4, grammar=grammar))
        coin = pyro.sample("coin", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
        ends = small.encode(["a", "b"])[coin.long()]
        pyro.sample("ending", small(text, ends), obs=small.encode("c"))

    total = []
    choice = small.choice("a", options=["b", "ca"])
    for plan in choice.enumerate_support():
        prior = small(plan, max_tokens=4, grammar=grammar)
        texts = prior.enumerate_support()
        assert prior.log_prob(texts).logsumexp(0).item() == pytest.approx(0.0, abs=EXACT)
        for coin, end in enumerate("ab"):
            likelihood = small(texts, end).log_prob(small.encode("c"))
            total.append(choice.log_prob(plan) + prior.log_prob(texts) + np.log([0.6, 0.4][coin]) + likelihood)
    posterior = exact_posterior(model)()
    assert posterior.num_samples == len(torch.cat(total))
    assert float(posterior.log_evidence) == pytest.approx(torch.cat(total).logsumexp(0).item(), abs=EXACT)
    assert set(posterior.decode("text")) == {"ab.", "abb.", "c.", "cb."}


def test_the_prior_alone_has_mass_one(small: LM) -> None:
    def model() -> None:
        plan = pyro.sample("plan", small.choice("a", options=["b", "ca"]))
        first = pyro.sample("first", small(plan, max_tokens=2, stop=".", min_tokens=2, temperature=0.7))
        pyro.sample("second", small(first, max_tokens=2, stop=".", allowed=[0, 1, 2]))

    assert float(exact_posterior(model)().log_evidence) == pytest.approx(0.0, abs=EXACT)


def test_blocks_change_nothing(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = exact_posterior(story.program)(*story.args)
    monkeypatch.setattr(enumeration, "BLOCK", 7)
    parts = exact_posterior(story.program)(*story.args)
    assert np.array_equal(whole.samples["middle"], parts.samples["middle"])
    np.testing.assert_allclose(whole.log_weights, parts.log_weights, atol=1e-12)


def test_what_cannot_be_enumerated_is_refused(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = story.lm

    def wide() -> None:
        with pyro.plate("sentences", 8):
            middle = pyro.sample("middle", lm("a", max_tokens=2, stop="."))
        pyro.factor("seen", (middle == 1).double().sum((-1, -2)))

    with pytest.raises(ValueError, match=r"combinations \(middle: 852,891,037,441\); at most 1,000,000"):
        exact_posterior(wide)()

    def joined() -> None:
        pyro.sample("coins", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))

    with pytest.raises(ValueError, match=r"'coins' \(Independent\) cannot be enumerated"):
        exact_posterior(joined)()

    def plates() -> None:
        plan = pyro.sample("plan", dist.Categorical(torch.ones(2)))
        with pyro.plate("rows", 2, dim=-1 - int(plan)):
            pyro.factor("seen", torch.zeros(2))

    with pytest.raises(ValueError, match="plates depend on sampled values"):
        exact_posterior(plates)()

    def branching() -> None:
        middle = pyro.sample("middle", lm("a", max_tokens=3, stop="."))
        if middle[..., 0] == 1:
            pyro.sample("coin", dist.Bernoulli(torch.tensor(0.5)))

    monkeypatch.setattr("llmppl.posterior.combinations.MOST_RUNS", 100)
    with pytest.raises(ValueError, match="must be run for each combination of values, because .* more than 100 runs"):
        exact_posterior(branching)()


def test_two_plates_of_one_size_are_no_rows_of_their_own(lm: LM) -> None:
    """What stands in the second depends on all that stands in the first."""
    p, y = torch.tensor([0.2, 0.7]), torch.tensor([0.5, 1.5])

    def program() -> None:
        with pyro.plate("a", 2):
            z = pyro.sample("z", dist.Bernoulli(p))
        with pyro.plate("b", 2):
            pyro.sample("y", dist.Normal(z.sum(-1, keepdim=True), torch.tensor([1.0, 2.0])), obs=y)

    found = exact_posterior(program)()
    each = [
        float(dist.Bernoulli(p).log_prob(torch.tensor(z)).sum())
        + float(dist.Normal(sum(z), torch.tensor([1.0, 2.0])).log_prob(y).sum())
        for z in itertools.product([0.0, 1.0], repeat=2)
    ]
    assert found.batch_shape == ()
    assert float(found.log_evidence) == pytest.approx(float(np.logaddexp.reduce(each)), abs=1e-6)


def test_a_row_without_weight_has_an_effective_sample_size_of_zero(lm: LM) -> None:
    def program(possible: torch.Tensor) -> None:
        with pyro.plate("rows", 2):
            pyro.sample("z", lm("a", max_tokens=1))
            pyro.factor("possible", torch.where(possible, 0.0, -torch.inf))

    found = exact_posterior(program)(torch.tensor([True, False]))
    assert found.ess[0] > 1
    assert found.ess[1] == 0
    np.testing.assert_allclose(found.weights.sum(0), [1.0, 0.0])


def test_observed_texts_of_an_inner_plate_go_to_their_rows(lm: LM) -> None:
    endings = lm.encode(["aa", "bb", "cc", "dd", "ee", "ab"]).reshape(3, 2, 2)  # inner plate, rows, tokens

    def program(endings: torch.Tensor) -> None:
        with pyro.plate("rows", 2, dim=-1):
            middle = pyro.sample("middle", lm("ab", max_tokens=1))
            with pyro.plate("inner", 3, dim=-2):
                pyro.sample("ending", lm("ab", middle), obs=endings)

    found = exact_posterior(program)(endings)
    assert [found.row(n).decode("ending") for n in range(2)] == [["aa", "cc", "ee"], ["bb", "dd", "ab"]]


def test_observed_texts_of_an_inner_plate_as_large_as_the_rows_are_of_each_row(lm: LM) -> None:
    def program(endings: list[str]) -> None:
        with pyro.plate("rows", 2, dim=-2):
            middle = pyro.sample("middle", lm("ab", max_tokens=1))
            with pyro.plate("inner", 2, dim=-1):
                pyro.sample("ending", lm("ab", middle), obs=lm.encode(endings))

    found = exact_posterior(program)(["ab", "ba"])
    assert [found.row(n).decode("ending") for n in range(2)] == [["ab", "ba"]] * 2
    assert found.to_arviz().observed_data.ending.dims == ("rows", "inner", "ending_token")
