"""The masked-diffusion network: what it costs, what it refuses, what it runs on, and as a prior."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from masked_toy import L, V, network, text_of

from llmppl import LM
from llmppl.distributions.masked_text import MaskedText
from llmppl.guides import AutoregressiveGuide, PromptGuide, RefinementGuide
from llmppl.masked_lm import MaskedLM
from llmppl.objectives import Denoising
from llmppl.testing import tiny_lm

# --- cost ---------------------------------------------------------------------------------------------


def test_sampling_costs_a_pass_a_step_and_scoring_one_batch() -> None:
    model = network("adapted")
    passes: list[tuple[int, ...]] = []
    lm = model.lm
    assert model._shared[2].splits  # probes the network once
    lm.transformer.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    for steps in (1, 2, 3):
        fn = text_of(model, steps=steps)
        passes.clear()
        value = fn.sample((16,))
        assert len(passes) == 1 + steps  # both contexts, once; and the steps
        assert passes[0] == (1, 3)
        passes.clear()
        with torch.no_grad():
            fn.log_prob(value)
        assert not passes  # recorded while drawing
        fn.log_prob(value).sum().backward()
        assert len(passes) == 2  # both contexts, and all steps of all texts in one batch
        assert passes[1][0] == 16 * steps
    passes.clear()
    text_of(model, stop=".", steps=2).sample((16,))
    assert len(passes) <= 1 + 1 + 2  # one more for the length


# --- bad input ----------------------------------------------------------------------------------------


def test_malformed_arguments_are_refused_with_the_mend() -> None:
    model = network()
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "order='best' is no unmasking order. Use one of", {"order": "best"}),
        (ValueError, "top_k= truncates the law", {"top_k": 5}),
        (ValueError, "top_p= truncates the law", {"top_p": 0.9}),
        (TypeError, "unknown argument beam=", {"beam": 3}),
        (ValueError, "steps must be a whole number of at least 1, got 0", {"steps": 0}),
        (ValueError, "two ways", {"steps": 2, "tokens_per_step": 1}),
        (ValueError, "tokens_per_step= is empty", {"tokens_per_step": ()}),
        (ValueError, "num_orders=2 is for order='random'", {"num_orders": 2}),
        (ValueError, "temperature must be positive", {"temperature": 0.0}),
        (ValueError, "matches no text", {"stop": "§"}),
    ]
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            text_of(model, **arguments)
    with pytest.raises(ValueError, match="max_tokens=4 is outside the trained range: the network knows gaps of 1 to 3"):
        model("ab", max_tokens=4)
    with pytest.raises(ValueError, match="more than one gap"):
        model("a", ..., "b", ..., max_tokens=2)
    with pytest.raises(ValueError, match="max_tokens must be a whole number of at least 1"):
        MaskedLM.from_scratch(model.lm, max_tokens=0)
    with pytest.raises(ValueError, match="heads=3"):
        MaskedLM.from_scratch(model.lm, width=16, heads=3)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        MaskedLM.adapted(model.lm, rank=0)
    fn = text_of(model, stop=".")
    with pytest.raises(ValueError, match="stop token stands before its end"):
        fn.log_prob(torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="cannot be learned"):
        fn.denoising_loss(torch.tensor([1, 0, 1]))
    assert float(MaskedText(model, fn.context, fn.right, fn.law, fn.plan, False).log_prob(torch.tensor([1, 0, 1]))) == (
        -torch.inf
    )


FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {},
    "mamba": None,
    "bloom": None,
}


def tiny_of(family: str) -> LM:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32} if family == "gpt2" else {}
    if not sizes:
        sizes = {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "n_layer": 1,
            "n_head": 2,
        }  # fmt: skip
    config = AutoConfig.for_model(family, vocab_size=V, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    for key, value in {**sizes, **(FAMILIES[family] or {})}.items():
        setattr(config, key, value)
    if family.startswith("qwen"):
        config.layer_types = ["full_attention"]
    torch.manual_seed(0)
    return LM(AutoModelForCausalLM.from_config(config), tiny_lm(V).tokenizer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_are_made_bidirectional_or_refused_by_name(family: str) -> None:
    lm = tiny_of(family)
    if FAMILIES[family] is None:
        with pytest.raises(ValueError, match=f"attention of {family.title()}ForCausalLM cannot be made bidirectional"):
            MaskedLM.adapted(lm, max_tokens=L, rank=2)
        # A network of its own has none of the base model's limits.
        fn = MaskedLM.from_scratch(lm, max_tokens=L, width=8, layers=1, heads=2)("ab", ..., "c", max_tokens=2)
    else:
        fn = MaskedLM.adapted(lm, max_tokens=L, rank=2)("ab", ..., "c", max_tokens=2)
    texts = fn.enumerate_support()
    with torch.no_grad():
        assert float(fn.log_prob(texts).exp().sum()) == pytest.approx(1.0, abs=1e-4)
    if FAMILIES[family] is not None:
        other = fn.model("ab", ..., "d", max_tokens=2)
        with torch.no_grad():
            assert float((other.log_prob(texts) - fn.log_prob(texts)).abs().max()) > 1e-6, "the right side is not seen"


def test_reduced_precision_keeps_what_it_recorded() -> None:
    lm = tiny_lm(vocabulary=V, dtype=torch.bfloat16)
    for model in (MaskedLM.from_scratch(lm, L, width=8, layers=1, heads=2), MaskedLM.adapted(lm, L, rank=2)):
        fn = model("ab", ..., "c", max_tokens=L, stop=".")
        value, recorded = fn.sample_with_log_prob((50,))
        assert recorded.dtype == torch.float32
        with torch.no_grad():
            assert torch.equal(fn.log_prob(value), recorded)
            assert float(fn.log_prob(fn.enumerate_support()).exp().sum()) == pytest.approx(1.0, abs=0.1)


def test_an_autoregressive_guide_of_a_masked_prior_is_refused_and_a_refinement_guide_sees_its_right_side() -> None:
    model = network()

    def program(ending: str) -> None:
        middle = pyro.sample("middle", text_of(model, "ab", ..., "cc"))
        pyro.sample("ending", model.lm(middle), obs=model.lm.encode(ending))

    with pytest.raises(ValueError, match="written from left to right with .* Propose it by a RefinementGuide"):
        AutoregressiveGuide(program, model.lm, rank=2)("d")
    fn = pyro.poutine.trace(RefinementGuide(program, model.lm, network=model)).get_trace("d").nodes["middle"]["fn"]
    decode = lambda side: model.lm.codec.decode([t for t in side.tolist() if t >= 0])  # noqa: E731
    assert (decode(fn.context), decode(fn.right)) == ("ab", "ccd")
    # The prior's own network, told of the observation on the left, is a proposal as any other.
    assert PromptGuide(program, model.lm)("d")["middle"].shape == (L,)


# --- the small network as a prior ---------------------------------------------------------------------


def test_a_network_trained_from_scratch_on_the_programs_own_text_is_a_prior_like_the_language_model() -> None:
    from llmppl import fit

    lm = tiny_lm(vocabulary=4)

    def program(beginning: str) -> None:
        pyro.sample("middle", lm(beginning, max_tokens=2, stop="."))

    masked = MaskedLM.from_scratch(lm, max_tokens=2, width=16, layers=1, heads=2, seed=0)
    prior, texts = lm("ab", max_tokens=2, stop="."), lm("ab", max_tokens=2, stop=".").enumerate_support()

    def divergence() -> float:
        with torch.no_grad():
            log_p = prior.log_prob(texts)
            return float((log_p.exp() * (log_p - masked("ab", max_tokens=2, stop=".").log_prob(texts))).sum())

    before = divergence()
    guide = RefinementGuide(program, lm, network=masked)
    fit(
        program, guide, [("ab",)], Denoising(32, 4), steps=80, learning_rate=2e-2, schedule="cosine", seed=0,
        progress=False,
    )  # fmt: skip
    after = divergence()
    print(f"KL(lm‖masked): {before:.3f} before, {after:.3f} after")
    assert before > 0.3
    assert after < 0.05
