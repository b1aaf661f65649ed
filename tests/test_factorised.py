"""Independent tokens under a text's law: mass, sampling against scoring, rows that share logits."""

from __future__ import annotations

import pyro
import pytest
import torch
from scipy.stats import chisquare
from test_autoregressive import LAWS
from torch import Tensor

from llmppl import LM, Grammar
from llmppl.distributions import FactorisedText
from llmppl.network.text_law import enumerate_texts
from llmppl.network.text_tensors import lengths
from llmppl.text import PAD

# Fewest tokens before a stop string of several tokens tie tokens together, as a grammar does.
FREE = {name: law for name, law in LAWS.items() if "grammar" not in law and name != "stops of several kinds"}
BATCHES: dict[str, tuple[int, ...]] = {"one": (), "rows": (3,), "rows that share logits": (4, 1, 3)}


def factorised(lm: LM, law: str, batch: tuple[int, ...] = (), width: int = 6) -> FactorisedText:
    """One row of logits for each of the last batch dimension, shared by those before it."""
    prior = lm("ab", **FREE[law])
    generator = torch.Generator().manual_seed(3)
    shape = (*batch[-1:], prior.law.max_tokens, width)
    logits = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return FactorisedText(lm, prior.context, prior.law, logits).expand(torch.Size(batch))


def by_hand(d: FactorisedText, logits: Tensor, text: list[int]) -> float:
    """The log-probability of one text, token by token, from the definition."""
    total = 0.0
    for t, token in enumerate(n for n in text if n != PAD):
        weights = (logits[t] / d.law.temperature).exp()
        for v in range(len(weights)):
            early = v in d.law.stop.tolist() and t < d.law.min_tokens - 1
            if early or (d.law.allowed is not None and not d.law.allowed[v]):
                weights[v] = 0.0
        total += float((weights[token] / weights.sum()).log())
    return total


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("law", FREE)
def test_probabilities_sum_to_one_over_the_priors_support(lm: LM, law: str, batch: str) -> None:
    d = factorised(lm, law, BATCHES[batch])
    texts = enumerate_texts(d.law)
    assert torch.equal(texts, lm("ab", **FREE[law]).enumerate_support())
    assert d.support.check(texts).all()
    log_q = d.log_prob(texts.reshape(-1, *(1,) * len(d.batch_shape), texts.shape[-1]))
    assert log_q.shape == (len(texts), *d.batch_shape)
    torch.testing.assert_close(log_q.exp().sum(0), torch.ones(d.batch_shape).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("law", FREE)
def test_a_text_has_the_product_of_its_tokens_probabilities(lm: LM, law: str) -> None:
    d = factorised(lm, law)
    logits = d._table.logits
    assert isinstance(logits, Tensor)
    texts = enumerate_texts(d.law)
    expected = [by_hand(d, logits, text) for text in texts.tolist()]
    torch.testing.assert_close(d.log_prob(texts), torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("law", FREE)
def test_samples_follow_the_enumerated_probabilities(lm: LM, law: str) -> None:
    d = factorised(lm, law)
    texts, draws = enumerate_texts(d.law), d.sample((4000,))
    index = (draws[:, None] == texts).all(-1)
    assert index.any(-1).all(), "a sample outside the enumerated support"
    expected = d.log_prob(texts).exp() * len(draws)
    common = expected >= 5
    counts = index.sum(0).double()
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    keep = wanted > 0
    # Fixed seed; a law that is off by 10 % in one frequent text gives p below 1e-4 at 4000 draws.
    assert chisquare(observed[keep], wanted[keep]).pvalue > 1e-3


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("law", FREE)
def test_the_recorded_log_probability_is_the_rescored_one(lm: LM, law: str, batch: str) -> None:
    d = factorised(lm, law, BATCHES[batch])
    value, recorded = d.sample_with_log_prob((5,))
    assert recorded.shape == (5, *d.batch_shape)
    torch.testing.assert_close(d.log_prob(value), recorded, atol=1e-12, rtol=0)
    torch.testing.assert_close(d.token_log_prob(value).sum(-1), recorded, atol=1e-12, rtol=0)


def test_every_row_of_a_batch_is_drawn_from_its_own_logits(lm: LM) -> None:
    """Also where rows are drawn at several temperatures, in several blocks, in any order."""
    d = factorised(lm, "stop", (3,)).expand(torch.Size([6000, 3]))
    heat = torch.tensor([1.0, 4.0]).repeat(3000)[:, None]
    for cells in (2**24, 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llmppl.distributions.factorised_text.CELLS", cells)
            value, recorded = d.sample_with_log_prob(temperature=heat)
        torch.testing.assert_close(d.log_prob(value), recorded)
        for row in range(3):
            table = d.log_probs[0, row, 0]
            for start, temperature in ((0, 1.0), (1, 4.0)):
                share = torch.bincount(value[start::2, row, 0], minlength=6) / 3000
                expected = (table / temperature).softmax(-1)
                # Five standard errors of a share of 3000 draws.
                assert float((share - expected).abs().max()) < 5 * 0.5 / 3000**0.5


def test_rows_that_share_logits_share_them_in_memory(lm: LM) -> None:
    d = factorised(lm, "stop").expand(torch.Size([50_000]))
    logits = d._table.logits
    assert isinstance(logits, Tensor)
    assert logits.shape == (3, 6)
    scaled, row = d._scaled()
    assert scaled.shape == (1, 3, 6)
    assert row.numel() == 1
    assert d.log_probs.shape == (50_000, 3, 6)
    assert d.log_probs.untyped_storage().nbytes() == 3 * 6 * 8
    assert d.log_prob(d.sample()).shape == (50_000,)


def test_a_function_of_the_contexts_is_asked_once_for_each_distinct_one(lm: LM) -> None:
    prior = lm(["a", "bc", "a"], max_tokens=2).expand(torch.Size([5, 3]))
    asked: list[Tensor] = []
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def logits(contexts: Tensor) -> Tensor:
        asked.append(contexts)
        return (contexts.sum(-1).double()[:, None, None] * weight).expand(-1, 2, 6)

    d = FactorisedText(lm, prior.context, prior.law, logits)
    assert not asked, "asked before anything was wanted"
    value = d.expand(torch.Size([7, 5, 3])).sample()
    assert value.shape == (7, 5, 3, 2)
    assert [len(contexts) for contexts in asked] == [2]
    score = d.log_prob(value)
    assert len(asked) == 1, "the logits of drawing serve scoring, gradients and all"
    torch.testing.assert_close(d.log_probs[0, 0], d.log_probs[3, 2])
    assert not torch.allclose(d.log_probs[0, 0], d.log_probs[0, 1])
    score.sum().backward()
    assert weight.grad is not None
    d.log_prob(value).sum().backward()  # another graph


def test_the_gradient_of_a_score_is_the_tokens_own(lm: LM) -> None:
    """d log q / d λ_t is the one-hot of the token less the law, at positions that are reached."""
    prior = lm("ab", max_tokens=3, stop=".")
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    d = FactorisedText(lm, prior.context, prior.law, logits)
    value = lm.encode("c.")
    d.log_prob(torch.nn.functional.pad(value, (0, 1), value=PAD)).backward()
    expected = torch.nn.functional.one_hot(value, 6) - logits[:2].softmax(-1)
    torch.testing.assert_close(logits.grad, torch.cat([expected, torch.zeros(1, 6)]).double().detach())


def test_log_prob_broadcasts_a_value_against_the_batch(lm: LM) -> None:
    d = factorised(lm, "stop", (2,))
    value = d.sample()[0]
    assert d.log_prob(value).shape == (2,)
    assert d.log_prob(value.expand(5, 1, 3)).shape == (5, 2)
    torch.testing.assert_close(d.log_prob(value)[1], d.log_prob(value.expand(5, 1, 3))[3, 1])


def test_ids_beyond_the_tokenizers_vocabulary_are_no_text(lm: LM) -> None:
    """Embedding matrices are often padded."""
    d = factorised(lm, "stop", width=9)
    assert int(d.sample((500,)).max()) < 6
    total = d.log_prob(enumerate_texts(d.law)).exp().sum()
    torch.testing.assert_close(total, torch.ones(()).double())


def test_sampling_at_a_temperature_leaves_the_law_alone_and_seeds_reproduce(lm: LM) -> None:
    d = factorised(lm, "stop").expand(torch.Size([2000]))
    pyro.set_rng_seed(1)
    hot, recorded = d.sample_with_log_prob(temperature=torch.full((2000,), 30.0))
    torch.testing.assert_close(d.log_prob(hot), recorded)
    assert torch.bincount(hot[:, 0], minlength=6).min() > 2000 / 6 * 0.8
    assert int(lengths(hot).max()) == 3
    pyro.set_rng_seed(1)
    assert torch.equal(hot, d.sample(temperature=torch.full((2000,), 30.0)))


def test_texts_outside_the_support_and_unusable_laws_are_refused(lm: LM) -> None:
    d = factorised(lm, "min tokens")
    with pytest.raises(ValueError, match="fewer than min_tokens=3"):
        d.log_prob(lm.encode("a."))
    quiet = FactorisedText(lm, d.context, d.law, d._table.logits, validate_args=False)
    assert quiet.log_prob(lm.encode("a.")) == -torch.inf
    assert quiet.log_prob(lm.encode("aaaaa")) == -torch.inf
    logits = torch.zeros(4, 6)
    grammar = lm("ab", max_tokens=4, grammar=Grammar.regex("a[bc]*"))
    with pytest.raises(ValueError, match="Use an AutoregressiveGuide"):
        FactorisedText(lm, grammar.context, grammar.law, logits)
    with pytest.raises(ValueError, match="unbounded stream"):
        FactorisedText(lm, d.context, lm("ab").law, logits)
    with pytest.raises(ValueError, match=r"logits has shape \(3, 6\)"):
        FactorisedText(lm, d.context, d.law, torch.zeros(3, 6))
    broken = FactorisedText(lm, d.context, d.law, torch.full((4, 6), torch.nan))
    broken.site = "middle"
    with pytest.raises(ValueError, match="site 'middle': the logits of token 0 are not finite"):
        broken.sample()


def test_the_repr_tells(lm: LM) -> None:
    assert repr(factorised(lm, "stop", (3,))) == "FactorisedText(batch_shape=(3,), max_tokens=3, 1 stop tokens)"
