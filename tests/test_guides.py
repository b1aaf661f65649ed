"""Guides: what each latent is told, adapters on one transformer, saving."""

from __future__ import annotations

import os

import pyro
import pytest
import torch
from conftest import Story
from safetensors import safe_open
from test_objectives import perturbed

from llmppl import LM, importance
from llmppl.guides import AutoregressiveGuide, GFlowNetGuide, PromptGuide
from llmppl.programs.particles import run_particles
from llmppl.programs.structure import structure
from llmppl.testing import tiny_lm


def told(lm: LM, guide: object, site: str, *args: object) -> str:
    context = structure(guide, args, {}).nodes[site]["fn"].context
    return lm.codec.decode([t for t in context.flatten().tolist() if t >= 0])


def test_by_default_a_latent_is_told_the_observations_then_the_priors_context(story: Story) -> None:
    assert told(story.lm, PromptGuide(story.program, story.lm), "middle", "ab", "cd") == "cdab"


def test_a_prompt_replaces_the_context_and_takes_its_parameters_by_name(lm: LM) -> None:
    def model(start: str, ending: str) -> None:
        first = pyro.sample("first", lm(start, max_tokens=2))
        pyro.sample("second", lm(start, first, max_tokens=2))
        pyro.sample("close", lm(first), obs=lm.encode(ending))

    prompts = {
        "first": lambda start, close: [close, "e", start],
        "second": lambda first, ending, extra="d": [ending, first, extra],
    }
    guide = PromptGuide(model, lm, prompt=prompts)
    assert told(lm, guide, "first", "ab", "cc") == "cceab"
    # Free texts of a dry run are the first token that ends nothing, twice.
    assert told(lm, guide, "second", "ab", "cc") == "cc..d"


def test_later_latents_see_the_sampled_earlier_ones(lm: LM) -> None:
    def model(ending: str) -> None:
        first = pyro.sample("first", lm("a", max_tokens=2))
        second = pyro.sample("second", lm("a", first, max_tokens=2))
        pyro.sample("close", lm(second), obs=lm.encode(ending))

    guide = PromptGuide(model, lm)
    trace = pyro.poutine.trace(guide).get_trace("cd")
    first, second = (trace.nodes[n]["value"] for n in ("first", "second"))
    trace.compute_log_prob()
    expected = lm("cd", "a", first, max_tokens=2).log_prob(second)
    torch.testing.assert_close(trace.nodes["second"]["log_prob"], expected)


def test_an_untrained_adapter_changes_nothing_and_a_trained_one_only_the_guide(story: Story) -> None:
    prior_before = story.prior().log_prob(story.prior().enumerate_support())
    guide = AutoregressiveGuide(story.program, story.lm, rank=2)
    texts, _ = story.joint()
    prompt = structure(PromptGuide(story.program, story.lm), story.args, {}).nodes["middle"]["fn"]
    adapted = structure(guide, story.args, {}).nodes["middle"]["fn"]
    torch.testing.assert_close(prompt.log_prob(texts), adapted.log_prob(texts))
    perturbed(guide)
    assert not torch.allclose(prompt.log_prob(texts), adapted.log_prob(texts), atol=0.05)
    torch.testing.assert_close(story.prior().log_prob(texts), prior_before)
    with torch.no_grad():
        particles = run_particles(story.program, guide, story.args, {}, 30)
    value = particles.model_trace.nodes["middle"]["value"]
    torch.testing.assert_close(particles.model_trace.nodes["middle"]["log_prob"], story.prior().log_prob(value))
    torch.testing.assert_close(particles.guide_trace.nodes["middle"]["log_prob"], adapted.log_prob(value))


def test_several_adapters_live_on_one_transformer(story: Story) -> None:
    texts, _ = story.joint()
    guides = [perturbed(AutoregressiveGuide(story.program, story.lm, rank=r, adapter=f"g{r}"), 0.1 * r) for r in (2, 3)]
    scores = [structure(g, story.args, {}).nodes["middle"]["fn"].log_prob(texts) for g in guides]
    assert not torch.allclose(scores[0], scores[1], atol=0.05)
    loss = -scores[0].sum() - scores[1].sum()
    loss.backward()
    for guide in guides:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in guide.named_parameters())
    assert story.lm.adapters.names == ["g2", "g3"]
    with pytest.raises(ValueError, match="'g2' exists on this model already"):
        AutoregressiveGuide(story.program, story.lm, adapter="g2")


def test_gradients_survive_switching_to_another_adapter_before_backward(story: Story) -> None:
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2))
    fn = structure(guide, story.args, {}).nodes["middle"]["fn"]
    texts, _ = story.joint()
    loss = fn.log_prob(texts[:5]).sum()
    other = AutoregressiveGuide(story.program, story.lm, rank=2)
    structure(other, story.args, {}).nodes["middle"]["fn"].log_prob(texts[:5])
    loss.backward()
    assert sum(p.grad.abs().sum() for p in guide.parameters()) > 0
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("kind", [AutoregressiveGuide, GFlowNetGuide])
def test_save_and_load_give_the_same_guide(kind: type[AutoregressiveGuide], story: Story, tmp_path: object) -> None:
    path = f"{tmp_path}/folder/guide.safetensors"
    guide = perturbed(kind(story.program, story.lm, rank=2))
    guide.save(path)
    other = kind(story.program, story.lm, rank=2)
    other.load(path)
    for a, b in zip(guide.tensors().values(), other.tensors().values(), strict=True):
        torch.testing.assert_close(a.float(), b.float())


def test_a_checkpoint_of_another_model_or_shape_is_refused_and_nothing_changes(story: Story, tmp_path: object) -> None:
    path = f"{tmp_path}/guide.safetensors"
    perturbed(AutoregressiveGuide(story.program, story.lm, rank=2)).save(path)

    def refused(guide: AutoregressiveGuide, message: str, file: str = path) -> None:
        before = [p.detach().clone() for p in guide.parameters()]
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            guide.load(file)
        assert all(torch.equal(b, p) for b, p in zip(before, guide.parameters(), strict=True))

    refused(AutoregressiveGuide(story.program, story.lm, rank=3), "rank is 2, this one's is 3")
    refused(GFlowNetGuide(story.program, story.lm, rank=2), "guide is 'AutoregressiveGuide'")
    other = tiny_lm(vocabulary=7)
    refused(AutoregressiveGuide(story.program, other, rank=2), "another language model: its vocab_size is 6")
    fewer = AutoregressiveGuide(story.program, story.lm, rank=2, target_modules=["q_proj"])
    refused(fewer, "on one side only")
    refused(AutoregressiveGuide(story.program, story.lm, rank=2), "no adapter file", f"{tmp_path}/nothing")
    with open(path, "r+b") as file:
        file.truncate(900)
    refused(AutoregressiveGuide(story.program, story.lm, rank=2), "damaged")
    with open(path, "wb") as file:
        file.write(b"nonsense")
    refused(AutoregressiveGuide(story.program, story.lm, rank=2), "damaged")


def test_an_interrupted_save_leaves_the_old_file(
    story: Story, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{tmp_path}/guide.safetensors"
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2))
    guide.save(path)
    size = os.path.getsize(path)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmppl.network.guide_tensors.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        guide.save(path)
    assert os.path.getsize(path) == size
    assert os.listdir(str(tmp_path)) == ["guide.safetensors"]


def test_half_precision_files_are_half_as_large(story: Story, tmp_path: object) -> None:
    guide = AutoregressiveGuide(story.program, story.lm, rank=2)
    guide.save(f"{tmp_path}/half", dtype=torch.float16)
    with safe_open(f"{tmp_path}/half", framework="pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.float16}  # noqa: SIM118
    AutoregressiveGuide(story.program, story.lm, rank=2).load(f"{tmp_path}/half")


def test_seeds_reproduce_the_adapter_and_leave_torchs_generator_alone(story: Story) -> None:
    state = torch.get_rng_state()
    first, second = (AutoregressiveGuide(story.program, story.lm, rank=2, seed=5) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_guide_of_a_known_name_on_another_model_trains_its_own_weights(story: Story) -> None:
    """Pyro's parameter store would hand it the weights of the first."""
    first = AutoregressiveGuide(story.program, story.lm, rank=2, adapter="guide")
    first(*story.args)
    second = AutoregressiveGuide(story.program, tiny_lm(seed=1), rank=2, adapter="guide")
    second(*story.args)
    adapter = second.lm.adapters.parameters("guide")
    assert all(p is adapter[key.replace("/", ".")] for key, p in second.weights.items())
    assert all(pyro.param(f"guide$$${key}") is p for key, p in second.weights.items())


def test_log_partition_is_a_function_of_the_prompt(story: Story) -> None:
    guide = GFlowNetGuide(story.program, story.lm, rank=2)
    with torch.no_grad():
        guide.head.weight.normal_()
    one, other = guide.log_partition("ab", "cd"), guide.log_partition("ab", "ee")
    assert one.shape == ()
    assert abs(one - other) > 1e-3
    from llmppl.programs.plates import in_data_plate

    both = in_data_plate(guide)
    rows = structure(both, (["ab", "abc"], ["cd", "ee"]), {}).nodes["middle"]["fn"]
    assert rows.batch_shape == (2,)
    together = guide.log_partition(["ab", "ab"], ["cd", "ee"])
    torch.testing.assert_close(together, torch.stack([one, other]))


def test_reprs_tell(story: Story) -> None:
    assert repr(PromptGuide(story.program, story.lm)).startswith("PromptGuide(program, LM(")
    assert "rank=2" in repr(AutoregressiveGuide(story.program, story.lm, rank=2))


def test_a_reduced_precision_sampler_records_its_own_density(story: Story) -> None:
    """Its texts are weighted by the law they were drawn from: E[w] = Z holds with it, and with the
    model's own density in its place it would not."""
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0, sampling_dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=parameter.dtype))
    fn = structure(guide, story.args, {}).nodes["middle"]["fn"]
    texts, log_joint = story.joint()
    exact = fn.with_context(fn.context, fn.adapter).log_prob(texts).detach()
    with story.lm.drawing(guide.adapter, torch.bfloat16) as copy:
        reduced = LM(copy, story.lm.tokenizer)
    assert reduced.dtype == torch.bfloat16
    law = reduced(fn.context, max_tokens=3, stop=".").log_prob(texts).double()
    assert float(law.exp().sum()) == pytest.approx(1.0, abs=0.02)  # bfloat16 normalises coarsely
    assert 1e-4 < float((law - exact).abs().max()) < 1.0
    values, recorded = fn.sample_with_log_prob((400,))
    row = (values[:, None] == texts).all(-1).long().argmax(-1)
    torch.testing.assert_close(recorded.double(), law[row], atol=0.05, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(fn.log_prob(values), recorded)
    # The copy follows the adapter as it trains.
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.mul_(0.0)
    values, recorded = fn.sample_with_log_prob((200,))
    prior = fn.with_context(fn.context, None).log_prob(values)
    torch.testing.assert_close(recorded.double(), prior, atol=0.4, rtol=0)
    # The program is scored by the model itself.
    posterior = importance(story.program, guide, 2000)(*story.args)
    log_z = float(log_joint.logsumexp(0))
    assert float(posterior.log_evidence) == pytest.approx(log_z, abs=4 * float(posterior.log_evidence_error))
    middles = torch.as_tensor(posterior.samples["middle"])
    row = (middles[:, None] == texts).all(-1).long().argmax(-1)
    torch.testing.assert_close(torch.as_tensor(posterior.log_joint), log_joint[row])
