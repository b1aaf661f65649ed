"""decode(): point answers of the posterior, against enumeration."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story
from scipy import stats
from test_objectives import perturbed

from llmppl import LM, Grammar, decode, exact_posterior
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.inference.decoding import _Rule
from llmppl.models import infilling
from llmppl.posterior.posterior import Posterior
from llmppl.programs.structure import structure
from llmppl.testing import tiny_lm
from llmppl.text import PAD


def ids(posterior: Posterior, site: str = "middle") -> torch.Tensor:
    return torch.as_tensor(posterior.samples[site])


def of_guide(story: Story, guide: PromptGuide) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All texts, their log q and their log-joint."""
    texts, log_joint = story.joint()
    with torch.no_grad():
        return texts, structure(guide, story.args, {}).nodes["middle"]["fn"].log_prob(texts), log_joint


def guides(story: Story) -> list[PromptGuide]:
    return [
        PromptGuide(story.program, story.lm),
        perturbed(AutoregressiveGuide(story.program, story.lm, rank=2), 0.1),
    ]


def test_answers_have_their_exact_joint_and_no_weights(story: Story) -> None:
    texts, _, log_joint = of_guide(story, guides(story)[0])
    options = {
        "greedy": {},
        "temperature": {"temperature": 0.5, "num_samples": 5},
        "top-k": {"top_k": 3, "num_samples": 5},
        "nucleus": {"top_p": 0.8, "num_samples": 5},
        "beam": {"num_beams": 5},
        "best-of-n": {"num_samples": 5},
    }
    for method, told in options.items():
        posterior = decode(story.program, guides(story)[0], method, seed=0, **told)(*story.args)
        assert posterior.method == "decoding"
        assert posterior.samples["middle"].shape == (5 if told and method != "best-of-n" else 1, 3)
        assert np.isnan(posterior.log_weights).all()
        index = (ids(posterior)[:, None] == texts).all(-1).long().argmax(-1)
        assert bool((ids(posterior) == texts[index]).all())
        np.testing.assert_allclose(posterior.log_joint, log_joint[index].numpy(), atol=1e-9)
        assert posterior.token_log_q["middle"].shape == posterior.token_log_p["middle"].shape
        assert "points, no weights" in repr(posterior)
        with pytest.raises(ValueError, match="a posterior by decoding has none"):
            _ = posterior.log_evidence


def test_greedy_takes_the_most_probable_token_each_time(story: Story) -> None:
    for guide in guides(story):
        texts, log_q, _ = of_guide(story, guide)
        begun: list[int] = []
        for step in range(3):
            fits = (texts[:, :step] == torch.tensor(begun, dtype=torch.long)).all(-1)
            mass = {t: log_q[fits & (texts[:, step] == t)].exp().sum().item() for t in range(6)}
            begun.append(max(mass, key=mass.__getitem__))
            if begun[-1] == 0:
                break
        found = decode(story.program, guide)(*story.args)
        assert [t for t in ids(found)[0].tolist() if t != PAD] == begun
        cold = decode(story.program, guide, "temperature", num_samples=20, temperature=1e-6)(*story.args)
        assert bool((ids(cold) == ids(found)).all())
        for told in ({"method": "top-k", "top_k": 1}, {"method": "nucleus", "top_p": 1e-9}):
            assert bool((ids(decode(story.program, guide, num_samples=9, **told)(*story.args)) == ids(found)).all())


def test_a_wide_beam_finds_the_most_probable_texts_of_the_guide(story: Story) -> None:
    """180 beams hold every prefix; ranked by the joint, they are all texts in its order."""
    for guide in guides(story):
        texts, log_q, log_joint = of_guide(story, guide)
        wide = decode(story.program, guide, "beam", num_beams=180)(*story.args)
        assert len({tuple(t) for t in ids(wide).tolist()}) == len(texts) == 156
        assert (np.diff(wide.log_joint) <= 0).all()
        np.testing.assert_allclose(wide.log_joint[0], log_joint.max().item(), atol=1e-9)
        # No prefix is pruned whose texts are among the best: a beam of 30 has the guide's mode.
        some = decode(story.program, guide, "beam", num_beams=30)(*story.args)
        mode = texts[log_q.argmax()]
        assert bool((ids(some) == mode).all(-1).any())
        again = decode(story.program, guide, "beam", num_beams=30)(*story.args)
        assert np.array_equal(some.samples["middle"], again.samples["middle"])
        one = decode(story.program, guide, "beam", num_beams=1)(*story.args)
        assert np.array_equal(one.samples["middle"], decode(story.program, guide)(*story.args).samples["middle"])


def beam_by_hand(texts: torch.Tensor, log_q: torch.Tensor, beams: int) -> set[tuple[int, ...]]:
    """Beam search over enumerated texts: the mass of a prefix is that of the texts that begin with it."""
    rows, kept = [tuple(t) for t in texts.tolist()], {(): 0.0}
    for step in range(texts.shape[-1]):
        grown = {}
        for prefix in kept:
            if len(prefix) < step or (prefix and prefix[-1] == 0):
                grown[prefix] = kept[prefix]
                continue
            for token in range(6):
                new = (*prefix, token)
                begins = torch.tensor([row[: step + 1] == new for row in rows])
                grown[new] = log_q[begins].logsumexp(0).item()
        kept = dict(sorted(grown.items(), key=lambda item: -item[1])[:beams])
    return {prefix + (PAD,) * (texts.shape[-1] - len(prefix)) for prefix in kept}


@pytest.mark.parametrize("beams", [2, 3, 7])
def test_beams_are_those_of_a_search_by_hand(story: Story, beams: int) -> None:
    for guide in guides(story):
        texts, log_q, _ = of_guide(story, guide)
        found = decode(story.program, guide, "beam", num_beams=beams)(*story.args)
        assert {tuple(t) for t in ids(found).tolist()} == beam_by_hand(texts, log_q, beams)


def test_beams_run_over_several_sites_and_rows(story: Story) -> None:
    lm = tiny_lm(4, dtype=torch.float64)

    def model(ending: str) -> None:
        plan = pyro.sample("plan", lm.choice("ab", options=["c", "b."]))
        coin = pyro.sample("coin", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
        first = pyro.sample("first", lm(plan, max_tokens=2, stop="."))
        pyro.sample("ending", lm(lm.encode(["a", "b"])[coin.long()], plan, first), obs=lm.encode(ending))

    exact = exact_posterior(model)("cb")
    wide = decode(model, None, "beam", num_beams=60)("cb")
    np.testing.assert_allclose(np.unique(wide.log_joint.round(8)), np.unique(exact.log_joint.round(8)), atol=1e-7)
    assert wide.log_joint[0] == pytest.approx(exact.log_joint.max(), abs=1e-9)
    rows = decode(story.program, None, "beam", num_beams=4, vectorize_data=True)(["ab", "d", "c"], ["cd", "ea", "b"])
    assert rows.samples["middle"].shape == (4, 3, 3)
    for n, args in enumerate((("ab", "cd"), ("d", "ea"), ("c", "b"))):
        alone = decode(story.program, None, "beam", num_beams=4)(*args)
        assert np.array_equal(rows.samples["middle"][:, n], alone.samples["middle"])
        np.testing.assert_allclose(rows.log_joint[:, n], alone.log_joint, atol=1e-9)


def test_best_of_n_is_the_largest_joint_of_its_draws(story: Story) -> None:
    guide = guides(story)[0]
    drawn = decode(story.program, guide, "temperature", num_samples=40, temperature=1.0, seed=3)(*story.args)
    best = decode(story.program, guide, "best-of-n", num_samples=40, seed=3)(*story.args)
    assert best.num_samples == 1
    assert best.log_joint[0] == drawn.log_joint.max()
    assert np.array_equal(best.samples["middle"][0], drawn.samples["middle"][drawn.log_joint.argmax()])


@pytest.mark.long
@pytest.mark.parametrize("told", [{"method": "top-k", "top_k": 6}, {"method": "nucleus", "top_p": 1.0}])
def test_a_truncation_that_truncates_nothing_is_sampling(story: Story, told: dict) -> None:
    """Chi-square of 3000 draws against the guide at the 0.1 % level."""
    guide = guides(story)[0]
    texts, log_q, _ = of_guide(story, guide)
    found = ids(decode(story.program, guide, num_samples=3000, seed=1, **told)(*story.args))
    counts = np.bincount((found[:, None] == texts).all(-1).long().argmax(-1).numpy(), minlength=len(texts))
    due = 3000 * log_q.exp().numpy()
    often = due >= 5
    seen, wanted = np.append(counts[often], counts[~often].sum()), np.append(due[often], due[~often].sum())
    assert stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-3


def test_truncated_laws_are_those_of_their_definitions() -> None:
    p = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05], dtype=torch.float64).log().expand(20_000, 5)
    cases = {
        _Rule(False, 1.0, 2, None): [0, 0.4, 0, 0.25, 0],
        _Rule(False, 1.0, None, 0.64): [0, 0.4, 0, 0.25, 0],
        _Rule(False, 1.0, None, 0.66): [0, 0.4, 0.2, 0.25, 0],
        _Rule(False, 1.0, None, 0.3): [0, 1, 0, 0, 0],
        _Rule(False, 0.5, None, None): [0.01, 0.16, 0.04, 0.0625, 0.0025],
        _Rule(False, 0.5, 2, None): [0, 0.16, 0, 0.0625, 0],
    }
    for rule, weights in cases.items():
        seen = np.bincount(rule(p).numpy(), minlength=5) / 20_000
        # four standard errors of 20 000 draws
        np.testing.assert_allclose(seen, np.array(weights) / sum(weights), atol=0.015)
        assert (seen[np.array(weights) == 0] == 0).all()


def test_texts_obey_the_law_of_their_site(story: Story) -> None:
    lm = story.lm

    def model() -> None:
        first = pyro.sample("first", lm("ab", max_tokens=6, min_tokens=4, stop=".", allowed=[0, 1, 2]))
        pyro.sample("second", lm(first, max_tokens=5, grammar=Grammar.regex("(ab|c)b?")))

    for told in (
        {},
        {"method": "beam", "num_beams": 6},
        {"method": "temperature", "temperature": 3.0, "num_samples": 30},
    ):
        posterior = decode(model, seed=0, **told)()
        assert np.isfinite(posterior.log_joint).all()
        assert ((ids(posterior, "first") != PAD).sum(-1) >= 4).all()
        assert set(posterior.decode("second")) <= {"ab.", "abb.", "c.", "cb."}


def test_what_means_nothing_to_a_method_is_refused(story: Story) -> None:
    program = story.program
    for message, told in (
        ("method='gready' must be one of", {"method": "gready"}),
        ("top_k=5 means nothing to method='greedy', which takes no options", {"top_k": 5}),
        ("num_samples=2 means nothing to method='beam', which takes num_beams", {"method": "beam", "num_samples": 2}),
        ("top_p=0.5 means nothing to method='top-k'", {"method": "top-k", "top_k": 2, "top_p": 0.5}),
        ("method='top-k' needs top_k=", {"method": "top-k"}),
        ("method='beam' needs num_beams=", {"method": "beam"}),
        ("method='temperature' needs temperature=", {"method": "temperature"}),
        ("top_k must be a whole number of at least 1, got 0", {"method": "top-k", "top_k": 0}),
        ("num_samples must be a whole number", {"method": "best-of-n", "num_samples": 0}),
        ("temperature must be positive and finite, got 0", {"method": "temperature", "temperature": 0.0}),
        ("top_p is a share of the mass", {"method": "nucleus", "top_p": 1.5}),
    ):
        with pytest.raises(ValueError, match=message):
            decode(program, **told)

    def continuous() -> None:
        pyro.sample("rate", dist.Beta(2.0, 2.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))

    with pytest.raises(ValueError, match=r"'rate' \(Beta\) has no finite list of values"):
        decode(continuous)()
    assert decode(continuous, method="best-of-n")().samples["rate"].shape == (1,)

    def plate() -> None:
        with pyro.plate("parts", 2):
            pyro.sample("part", story.lm(["a", "b"], max_tokens=2, stop="."))
        pyro.factor("seen", torch.tensor(0.0))

    with pytest.raises(ValueError, match="'part' stands in a plate that does not contain every site"):
        decode(plate, method="beam", num_beams=3)()
    assert decode(plate)().samples["part"].shape == (1, 2, 2)


def test_a_real_model_is_searched(smollm2: LM) -> None:
    story = infilling(smollm2, max_tokens=6)
    posterior = decode(story, None, "beam", num_beams=4)("Tom lost his key", " home.")
    assert len(set(posterior.decode("middle"))) == 4
    assert (np.diff(posterior.log_joint) <= 0).all()
    greedy = decode(story)("Tom lost his key", " home.")
    assert np.isfinite(greedy.log_joint).all()
