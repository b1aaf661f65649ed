"""Virtual tokens, and the guide whose parameters they are, against the transformer fed with embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from conftest import Story, kl
from test_long_runs import same
from test_objectives import CASES, HOTTER, forward_kl, gradient, perturbed, proposal
from torch import Tensor

from llmppl import LM, bounds, decode, fit, gap_report, importance, mcmc, smc
from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.distributions.conditioned_text import score_together
from llmppl.guides import AutoregressiveGuide, PromptGuide, SoftPromptGuide
from llmppl.inference.rewriting import rewrite
from llmppl.network.scoring import Request, score
from llmppl.network.text_law import TextLaw
from llmppl.objectives import SubTrajectoryBalance, TrajectoryBalance
from llmppl.objectives.behaviour import Behaviour
from llmppl.programs.plates import in_data_plate
from llmppl.programs.structure import structure
from llmppl.testing import tiny_lm
from llmppl.text import PAD

WIDTH = 32
"""Of the tiny model."""


def random_embeddings(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)


def by_embeddings(lm: LM, embeddings: Tensor, before: list[int], context: list[int], text: list[int]) -> Tensor:
    """Log-probabilities of a text's tokens by plain transformers: ``before``, the embeddings, the context."""
    words = lm.transformer.get_input_embeddings()
    first, rest = words(torch.tensor(before, dtype=torch.long)), words(torch.tensor(context + text))
    logits = lm.transformer(inputs_embeds=torch.cat([first, embeddings, rest])[None]).logits[0]
    behind = len(before) + len(embeddings) + len(context) - 1
    log_probs = logits[behind : behind + len(text)].log_softmax(-1)
    return log_probs.gather(-1, torch.tensor(text)[:, None])[:, 0]


def plain_total(lm: LM, embeddings: Tensor, context: list[int], text: list[int]) -> Tensor:
    """Log-probability of a text by plain transformers, with virtual tokens anywhere in its context."""
    table = torch.cat([lm.transformer.get_input_embeddings().weight, embeddings])
    logits = lm.transformer(inputs_embeds=table[context + text][None]).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(text)[:, None]).sum()


def text_of(lm: LM, context: list[int], adapter: str | None) -> AutoregressiveText:
    return lm("a", max_tokens=2, stop=".").with_context(torch.tensor(context), adapter)


# --- virtual tokens -------------------------------------------------------------------------------


def test_a_virtual_token_reads_as_an_ordinary_one_with_its_embedding(lm: LM) -> None:
    words = lm.transformer.get_input_embeddings().weight
    ids = lm.adapters.add_virtual_tokens("copies", words[[3, 1]])
    assert ids == range(6, 8)
    for virtual, ordinary in (([6, 2, 7, 4], [3, 2, 1, 4]), ([7, 7], [1, 1]), ([2, 4], [2, 4])):
        copied, plain = text_of(lm, virtual, "copies"), text_of(lm, ordinary, None)
        texts = plain.enumerate_support()
        torch.testing.assert_close(copied.log_prob(texts), plain.log_prob(texts), rtol=0, atol=1e-12)
        values, recorded = copied.sample_with_log_prob((20,))
        torch.testing.assert_close(plain.log_prob(values), recorded, rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_nodes", [384, 3], ids=["in one pass", "in chunks"])
def test_the_gradient_of_a_virtual_token_is_that_of_finite_differences(lm: LM, max_nodes: int) -> None:
    first = lm.adapters.add_virtual_tokens("soft", random_embeddings(2)).start
    embeddings = lm.adapters.parameters("soft")["virtual_tokens"]
    law = TextLaw(6, 3, 0, torch.tensor([0]))
    # Between ordinary tokens, at the end of a context and twice in one.
    contexts, texts = [[first, 2, first + 1], [first, first, 4]], [[1, 3, 0], [5, 5, 2]]

    def total() -> Tensor:
        with lm.using("soft"):
            return score(lm.network, [Request(law, contexts, texts, 3)], max_nodes)[0].sum()

    (found,) = torch.autograd.grad(total(), embeddings)
    direction, step = random_embeddings(2, seed=3) / 0.3, 1e-3
    with torch.no_grad():
        for n in range(2):
            values = []
            for sign in (1, -1):
                embeddings[n] += sign * step * direction[n]
                values.append(float(total()))
                embeddings[n] -= sign * step * direction[n]
            # The network normalises in single precision: 1e-6 over the step. The rest is the step's square.
            difference = (values[0] - values[1]) / (2 * step)
            assert abs(difference) > 0.5
            assert float((found[n] * direction[n]).sum()) == pytest.approx(difference, rel=0.02)
    rows = zip(contexts, texts, strict=True)
    expected = sum(plain_total(lm, embeddings, context, text) for context, text in rows)
    (exact,) = torch.autograd.grad(expected, embeddings)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_virtual_tokens_are_off_outside_their_adapter(lm: LM) -> None:
    texts = lm("a", max_tokens=2, stop=".").enumerate_support()
    before = text_of(lm, [2, 3], None).log_prob(texts)
    first = lm.adapters.add_virtual_tokens("one", random_embeddings(3)).start
    assert lm.adapters.add_virtual_tokens("two", random_embeddings(1, seed=2)).start == first
    lm.adapters.add("lora", 2, 4.0)
    one, two = (text_of(lm, [first, 2], name) for name in ("one", "two"))
    assert not torch.allclose(one.log_prob(texts), two.log_prob(texts), atol=0.05)
    for name in ("one", "two"):
        embeddings = lm.adapters.parameters(name)["virtual_tokens"][:1]
        expected = by_embeddings(lm, embeddings, [], [2], [1, 3])
        fn = text_of(lm, [first, 2], name)
        torch.testing.assert_close(fn.token_log_prob(torch.tensor([1, 3])), expected, rtol=0, atol=1e-12)
    # Elsewhere there is no such token, nor is anything else changed.
    for adapter, context in ((None, [first, 2]), ("lora", [first, 2]), ("two", [first + 1, 2])):
        with pytest.raises(IndexError):
            text_of(lm, context, adapter).log_prob(texts)
    assert torch.equal(text_of(lm, [2, 3], None).log_prob(texts), before)
    assert torch.equal(text_of(lm, [2, 3], "one").log_prob(texts).detach(), before)


def test_one_adapter_may_have_layers_and_virtual_tokens(lm: LM) -> None:
    lm.adapters.add("both", 2, 4.0, ["q_proj", "v_proj"])
    first = lm.adapters.add_virtual_tokens("both", random_embeddings(1)).start
    log_prob = text_of(lm, [first, 2], "both").log_prob(torch.tensor([1, 3]))
    gradients = torch.autograd.grad(log_prob, list(lm.adapters.parameters("both").values()))
    assert len(gradients) == 9
    # LoRA's first factor has no gradient while the second is zero.
    assert sum(bool(g.abs().sum() > 0) for g in gradients) == 5
    with pytest.raises(ValueError, match="'both' has virtual tokens already"):
        lm.adapters.add_virtual_tokens("both", random_embeddings(1))
    with pytest.raises(ValueError, match="'both' exists on this model already"):
        lm.adapters.add("both", 2, 4.0)


# --- the guide's law ------------------------------------------------------------------------------


def soft(story: Story, num_virtual_tokens: int = 3, seed: int | None = 0, **options: Any) -> SoftPromptGuide:
    return SoftPromptGuide(story.program, story.lm, num_virtual_tokens=num_virtual_tokens, seed=seed, **options)


def halfway(story: Story) -> SoftPromptGuide:
    """A guide on its way to the posterior: with all of it among its proposals, and with gradients still."""
    guide = soft(story, 2)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        forward_kl(story, guide).backward()
        optimizer.step()
    return guide


def context_of(guide: SoftPromptGuide) -> list[list[int]]:
    """Tokens of the latent's contexts, the virtual ones as they are."""
    context = structure(guide, ("ab", "cd"), {}).nodes["middle"]["fn"].context
    return [[t for t in row if t != PAD] for row in context.reshape(-1, context.shape[-1]).tolist()]


def test_scores_are_those_of_the_embeddings_through_the_plain_transformer(story: Story) -> None:
    """For rows of different lengths, scored and drawn."""
    guide = perturbed(soft(story))
    embeddings = guide.tensors()["virtual_tokens"]
    args = (["ab", "cde", "e"], ["cd", "a", "bdb"])
    fn = structure(in_data_plate(guide), args, {}).nodes["middle"]["fn"]
    assert fn.batch_shape == (3,)
    with torch.no_grad():
        texts, recorded = fn.sample_with_log_prob((20,))
    token_log_probs = fn.token_log_prob(texts)
    torch.testing.assert_close(token_log_probs.sum(-1).detach(), recorded, rtol=0, atol=1e-10)
    for n, (beginning, ending) in enumerate(zip(*args, strict=True)):
        context = story.lm.encode(ending + beginning).tolist()
        for text, found in zip(texts[:, n].tolist(), token_log_probs[:, n], strict=True):
            expected = by_embeddings(story.lm, embeddings, [], context, [t for t in text if t != PAD])
            torch.testing.assert_close(found[: len(expected)], expected, rtol=0, atol=1e-10)
            assert not found[len(expected) :].any()


def test_the_proposal_sums_to_one_over_the_priors_support(story: Story) -> None:
    guide = perturbed(soft(story), 0.5)
    texts, _ = story.joint()
    with torch.no_grad():
        log_q = proposal(guide, *story.args).log_prob(texts)
    assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    assert kl(log_q, story.prior().log_prob(texts)) > 0.5
    # With a law that cuts the support, too.
    narrow = story.lm("ab", max_tokens=2, min_tokens=2, stop=".", allowed=[0, 2, 4], temperature=0.7)
    cut = guide.distribution("middle", narrow, narrow.context)
    assert float(cut.log_prob(narrow.enumerate_support()).detach().exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_virtual_tokens_stand_behind_the_token_that_begins_a_text(story: Story) -> None:
    codec = story.lm.codec
    guide = soft(story, 2)
    assert context_of(guide) == [[6, 7, 3, 4, 1, 2]]
    codec.start = [5]
    assert context_of(guide) == [[5, 6, 7, 3, 4, 1, 2]]
    guide.prompt = {"middle": lambda beginning: [beginning]}
    assert context_of(guide) == [[5, 6, 7, 1, 2]]
    # A model that writes no such token of its own has one where there is nothing else.
    codec.start, codec.bos = [], 5
    guide.prompt = {"middle": lambda: [["ab", "", "ea"]]}
    assert context_of(guide) == [[6, 7, 1, 2], [5, 6, 7], [6, 7, 5, 1]]


def test_from_an_initial_text_it_begins_as_the_prompt_guide_told_that_text(story: Story) -> None:
    prompt = {"middle": lambda beginning, ending: ["be", ending, beginning]}
    expected = proposal(PromptGuide(story.program, story.lm, prompt), *story.args)
    texts, _ = story.joint()
    guide = soft(story, 2, initial_text="be")
    torch.testing.assert_close(proposal(guide, *story.args).log_prob(texts), expected.log_prob(texts))
    words = story.lm.transformer.get_input_embeddings().weight
    for count, ids in ((1, [2]), (5, [2, 5, 2, 5, 2])):
        assert torch.equal(soft(story, count, initial_text="be").tensors()["virtual_tokens"], words[ids])


def test_by_default_it_begins_at_tokens_of_the_vocabulary_which_the_seed_draws(story: Story) -> None:
    words = story.lm.transformer.get_input_embeddings().weight.float()
    state = torch.get_rng_state()
    first, second, other = (soft(story, 8, seed=seed).tensors()["virtual_tokens"] for seed in (5, 5, 6))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    rows = (first.float()[:, None] == words).all(-1)
    assert bool((rows.sum(-1) == 1).all())
    assert rows.any(0).sum() > 2


def test_starting_anew_draws_other_tokens_or_takes_the_initial_text(story: Story) -> None:
    guide, begun = soft(story, 8, seed=1), soft(story, 8, initial_text="be")
    for each, same_again in ((guide, False), (begun, True)):
        before, text = each.tensors()["virtual_tokens"].detach().clone(), torch.tensor([1, 0])
        perturbed(each)
        with torch.no_grad():
            fn = proposal(each, *story.args)
            assert torch.equal(fn.log_prob(text), fn.log_prob(text))
            each.reset_parameters()
            # What was scored before is not taken for what the new parameters give.
            torch.testing.assert_close(fn.log_prob(text), proposal(each, *story.args).log_prob(text))
        assert torch.equal(each.tensors()["virtual_tokens"], before) == same_again


def test_the_prior_and_other_guides_are_what_they_are_without_it(story: Story) -> None:
    """Bit for bit, also when all are scored and drawn in turn."""
    texts, _ = story.joint()
    lora = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2))

    def others() -> list[Tensor]:
        pyro.set_rng_seed(0)
        with torch.no_grad():
            drawn, recorded = proposal(lora, *story.args).sample_with_log_prob((9,))
            prior = story.prior()
            return [drawn, recorded, prior.log_prob(texts), *prior.sample_with_log_prob((9,))]

    before = others()
    one, two = perturbed(soft(story, 4)), perturbed(soft(story, 2, seed=3), 0.3)
    scores = [proposal(guide, *story.args).log_prob(texts) for guide in (one, two)]
    assert not torch.allclose(*scores, atol=0.05)
    for now, then in zip(others(), before, strict=True):
        assert torch.equal(now, then)
    # In one pass of several distributions each is scored under its own adapter.
    laws = [proposal(guide, *story.args) for guide in (two, lora, one)] + [story.prior()]
    score_together([(fn, fn.pending(texts)) for fn in laws])
    torch.testing.assert_close(laws[2].log_prob(texts), scores[0])
    torch.testing.assert_close(laws[0].log_prob(texts), scores[1])
    assert torch.equal(laws[3].log_prob(texts), before[2])
    # A graph outlives the switch to other adapters.
    scores[0].sum().backward()
    assert all(p.grad is not None and bool((p.grad.abs().sum(-1) > 0).all()) for p in one.parameters())
    assert all(p.grad is None for guide in (two, lora) for p in guide.parameters())
    assert all(p.grad is None for p in story.lm.transformer.parameters())


# --- training and inference -----------------------------------------------------------------------


@pytest.mark.parametrize("case", ["vargrad", "subtrajectory", "sleep"])
def test_the_gradient_of_an_objective_is_the_exact_one(story: Story, case: str) -> None:
    """The Monte Carlo error of 4000 particles is 0.03 to 0.13 of the gradient."""
    make, exact_loss, factor = CASES[case]
    if case == "sleep":
        story.ending = "c"
    guide = halfway(story)
    exact = factor * gradient(exact_loss(story, guide), guide)
    assert exact.norm() > 0.1
    estimate = gradient(make(4000).differentiable_loss(story.program, guide, *story.args), guide)
    error = float((estimate - exact).norm() / exact.norm())
    print(f"{case}: {error:.3f} of {exact.norm():.2f}")
    assert error < 0.2


def test_training_brings_it_near_the_posterior_both_ways(story: Story) -> None:
    lm = tiny_lm()
    twin = Story(lm, story.program)

    def program(beginning: str, ending: str) -> None:
        middle = pyro.sample("middle", lm(beginning, max_tokens=3, stop="."))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    twin.program = program
    guide = soft(twin, 8)
    texts, log_joint = twin.joint()
    log_p = log_joint.log_softmax(0)

    def divergences() -> tuple[float, float]:
        with torch.no_grad():
            log_q = proposal(guide, "ab", "cd").log_prob(texts)
        return kl(log_q, log_p), kl(log_p, log_q)

    before = divergences()
    objective = TrajectoryBalance(24, behaviour=HOTTER)
    fit(program, guide, [("ab", "cd")], objective, 60, learning_rate=0.1, schedule="cosine", seed=0, progress=False)
    after = divergences()
    log_prior = twin.prior().log_prob(texts)
    print(before, after, kl(log_prior, log_p), kl(log_p, log_prior))
    assert min(before) > 3
    assert max(after) < 0.4
    # It beats the prior, too.
    assert after[0] < 0.5 * kl(log_prior, log_p)
    assert after[1] < 0.5 * kl(log_p, log_prior)


def test_inference_takes_it_as_any_guide(story: Story) -> None:
    """Within 4 standard errors, as each posterior states its own. Texts hold no virtual token."""
    guide = halfway(story)
    texts, log_joint = story.joint()
    log_z = float(log_joint.logsumexp(0))
    for run in (
        importance(story.program, guide, 640, progress=False),
        smc(story.program, guide, 64, num_runs=6, seed=0),
    ):
        posterior = run(*story.args)
        assert posterior.log_evidence_error < 0.3
        assert float(posterior.log_evidence) == pytest.approx(log_z, abs=4 * float(posterior.log_evidence_error))
        middles = torch.as_tensor(posterior.samples["middle"])
        assert int(middles.max()) < 6
        assert len(posterior.decode("middle")) == len(middles)
    row = {tuple(text): n for n, text in enumerate(texts.tolist())}
    length = (texts != PAD).double().sum(-1)
    chains = mcmc(story.program, guide, num_samples=60, num_chains=16, warmup=20, seed=0, progress=False)(*story.args)
    index = [row[tuple(text)] for text in chains.samples["middle"].tolist()]
    # 960 draws of lengths 1 to 3, of which about every third is new: 0.15 is 3 standard errors.
    assert float(length[index].mean()) == pytest.approx(float((log_joint.softmax(0) * length).sum()), abs=0.15)
    fn = proposal(guide, *story.args)
    with torch.no_grad():
        log_q = fn.log_prob(texts)
    # A text written again from its first token on: the place has 1 probability, the tokens theirs.
    again = fn.expand(torch.Size([len(texts)]))
    _, rewritten = rewrite(again, texts, torch.zeros(len(texts), dtype=torch.long), 3, texts)
    torch.testing.assert_close(rewritten, log_q, rtol=0, atol=1e-9)
    best = decode(story.program, guide, "beam", num_beams=40, progress=False)(*story.args)
    assert best.samples["middle"][0].tolist() == texts[log_q.argmax()].tolist()
    bracket = bounds(story.program, guide, 30, simulations=10)(*story.args)
    assert bracket.lower.mean() < bracket.upper.mean() < bracket.lower.mean() + 2


def test_a_gap_report_fits_it_anew_and_leaves_it_as_it_was(story: Story) -> None:
    guide = perturbed(soft(story, 2, initial_text="ab"))
    before = guide.tensors()["virtual_tokens"].detach().clone()
    found = gap_report(
        story.program, guide, [story.args], num_samples=64, steps=12, restarts=1, learning_rate=0.1, progress=False
    )
    assert found.certified
    assert float(found.train.amortization[0]) > 0.3
    assert torch.equal(guide.tensors()["virtual_tokens"], before)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    def train(folder: str, steps: int, initial_text: str | None = None, **changes: Any) -> tuple[Any, Any]:
        lm = tiny_lm(dtype=torch.float64)

        def program(beginning: str, ending: str) -> None:
            middle = pyro.sample("middle", lm(beginning, max_tokens=2, stop="."))
            pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

        guide = SoftPromptGuide(program, lm, num_virtual_tokens=changes.pop("count", 2), initial_text=initial_text)
        data = [("ab", "cd"), ("cde", "a"), ("d", "eb")]
        objective = SubTrajectoryBalance(3, behaviour=Behaviour(tempered=0.4, replayed=0.4, sleep=0.3))
        settings = {"batch_size": 2, "seed": 3, "progress": False, "folder": f"{tmp_path}/{folder}", **changes}
        history = fit(program, guide, data, objective, steps, learning_rate=0.05, **settings)
        return guide.tensors(), history.state_dict()

    # The parameters of a guide that resumes are the checkpoint's, wherever it began.
    straight = train("a", 6, "be")
    train("b", 3, "be")
    torch.rand(5)
    same(straight, train("b", 6, "da", resume=True))
    with pytest.raises(ValueError, match="its guide's num_virtual_tokens is 2, this one's is 3"):
        train("b", 6, resume=True, count=3)


# --- saving, errors -------------------------------------------------------------------------------


def test_a_saved_soft_prompt_is_loaded_and_one_of_another_shape_refused(story: Story, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "soft.safetensors"
    guide = perturbed(soft(story))
    guide.save(path)
    other = soft(story, seed=1)
    other.load(path)
    texts, _ = story.joint()
    # Saved in single precision.
    laws = [proposal(g, *story.args).log_prob(texts) for g in (guide, other)]
    torch.testing.assert_close(*laws, rtol=0, atol=1e-4)
    assert guide.adapter != other.adapter

    def refused(guide: SoftPromptGuide | AutoregressiveGuide, message: str) -> None:
        before = [p.detach().clone() for p in guide.parameters()]
        with pytest.raises(ValueError, match=message):
            guide.load(path)
        assert all(torch.equal(b, p) for b, p in zip(before, guide.parameters(), strict=True))

    refused(soft(story, 4), "num_virtual_tokens is 3, this one's is 4")
    refused(AutoregressiveGuide(story.program, story.lm, rank=2), "guide is 'SoftPromptGuide'")
    refused(SoftPromptGuide(story.program, tiny_lm(vocabulary=7), num_virtual_tokens=3), "its vocab_size is 6")


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "none": ({"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens must be at least 1, got 0"),
    "fraction": ({"num_virtual_tokens": 2.5}, TypeError, "num_virtual_tokens must be a whole number, got 2.5"),
    "flag": ({"num_virtual_tokens": True}, TypeError, "num_virtual_tokens must be a whole number"),
    "long": ({"num_virtual_tokens": 63}, ValueError, "num_virtual_tokens=63 leaves no room .* of 64 tokens"),
    "empty": ({"initial_text": ""}, ValueError, "initial_text='' has no tokens"),
    "tokens": ({"initial_text": [1, 2]}, TypeError, "initial_text must be a string, got .1, 2."),
    "name": ({"adapter": "a.b"}, ValueError, "without dots"),
    "taken": ({"adapter": "taken"}, ValueError, "'taken' has virtual tokens already"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(story: Story, case: str) -> None:
    soft(story, adapter="taken")
    arguments, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        SoftPromptGuide(story.program, story.lm, **arguments)
    assert story.lm.adapters.names == ["taken"]


def test_a_prompt_that_fits_only_without_virtual_tokens_is_refused(story: Story) -> None:
    # 64 = 20 virtual tokens, 2 of the ending, 39 of the beginning, 3 of the middle.
    guide = soft(story, 20)
    longest = "a" * 39
    with torch.no_grad():
        proposal(guide, longest, "cd").sample()
    message = (
        "site 'middle': the prompt of 62 tokens and a text of up to 3 .* 64 tokens.* 20 tokens of the prompt are "
        "virtual; num_virtual_tokens may be lower"
    )
    with pytest.raises(ValueError, match=message):
        guide(longest + "a", "cd")
    guide.prompt = {"middle": lambda ending: [ending]}
    guide(longest + "a", "cd")


def test_values_and_what_later_texts_are_told_hold_no_virtual_token(lm: LM) -> None:
    def program(start: str, ending: str) -> None:
        first = pyro.sample("first", lm(start, max_tokens=2))
        pyro.sample("second", lm(start, first, max_tokens=2))
        pyro.sample("close", lm(first), obs=lm.encode(ending))

    guide = SoftPromptGuide(program, lm, num_virtual_tokens=4)
    with torch.no_grad():
        values = guide("ab", "cc")
    assert all(int(value.max()) < lm.vocabulary for value in values.values())
    trace = structure(guide, ("ab", "cc"), {})
    for site, expected in (("first", "ccab"), ("second", "ccab..")):
        context = trace.nodes[site]["fn"].context.tolist()
        assert context[:4] == [6, 7, 8, 9]
        assert lm.codec.decode(context[4:]) == expected
        assert max(context[4:]) < lm.vocabulary


def test_the_repr_tells(story: Story) -> None:
    guide = soft(story, 3, adapter="soft", prompt={"middle": lambda ending: [ending]})
    expected = "adapter='soft', 3 virtual tokens, 96 parameters, prompt for ['middle'])"
    assert repr(guide).startswith("SoftPromptGuide(program, LlamaForCausalLM, ")
    assert repr(guide).endswith(expected)
