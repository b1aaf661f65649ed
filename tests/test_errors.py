"""Bad input: each error names the argument and the mend, and nothing is half-done."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpyro
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story
from jax import random

from llmppl import LM, Behaviour, Grammar, importance
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.objectives import LeaveOneOutELBO, TrajectoryBalance, WakeSleep
from llmppl.text import PAD

CALLS = {
    "empty context": (lambda lm: lm(""), ValueError, "context is empty, and this model has no token"),
    "no context": (lambda lm: lm(max_tokens=2), ValueError, "context is empty"),
    "empty row": (lambda lm: lm(["a", ""]), ValueError, r"empty in row \(1,\)"),
    "stop matches nothing": (
        lambda lm: lm("a", max_tokens=2, stop="§"),
        ValueError,
        "stop='§' matches no text",
    ),
    "empty stop": (lambda lm: lm("a", max_tokens=2, stop=""), ValueError, "stop= holds an empty string"),
    "no stop ids": (lambda lm: lm("a", max_tokens=2, stop=[]), ValueError, "stop= is empty"),
    "stop id": (lambda lm: lm("a", max_tokens=2, stop=6), ValueError, "stop= holds the token id 6, outside"),
    "max_tokens 0": (lambda lm: lm("a", max_tokens=0), ValueError, "max_tokens must be at least 1"),
    "max_tokens float": (lambda lm: lm("a", max_tokens=2.5), TypeError, "max_tokens must be a whole number"),
    "min over max": (lambda lm: lm("a", max_tokens=2, min_tokens=3), ValueError, "less than min_tokens=3"),
    "temperature": (
        lambda lm: lm("a", max_tokens=2, temperature=0.0),
        ValueError,
        "temperature must be positive",
    ),
    "stop without end": (lambda lm: lm("a", stop="."), ValueError, "need max_tokens"),
    "allowed ids": (
        lambda lm: lm("a", max_tokens=2, allowed=[7]),
        ValueError,
        "allowed= holds the token id 7",
    ),
    "allowed mask": (
        lambda lm: lm("a", max_tokens=2, allowed=torch.ones(5, dtype=torch.bool)),
        ValueError,
        r"mask of shape \(5,\)",
    ),
    "allowed without stop": (
        lambda lm: lm("a", max_tokens=2, stop=".", allowed=[1, 2]),
        ValueError,
        "excludes every stop token",
    ),
    "allowed only stops": (
        lambda lm: lm("a", max_tokens=3, min_tokens=2, stop=".", allowed=[0]),
        ValueError,
        "min_tokens=2 cannot be reached",
    ),
    "ids as list": (lambda lm: lm([1, 2]), TypeError, "piece 0 must be a string"),
    "piece out of vocabulary": (
        lambda lm: lm(torch.tensor([1, 6])),
        ValueError,
        "piece 0 holds the token id 6",
    ),
    "piece with hole": (
        lambda lm: lm("a", torch.tensor([1, PAD, 2])),
        ValueError,
        "piece 1 has padding before",
    ),
    "piece dtype": (lambda lm: lm(torch.tensor([1.0])), TypeError, "integer token ids"),
    "batch shapes": (
        lambda lm: lm(["a", "b", "c"], "d", lm.encode(["a", "b"])),
        ValueError,
        r"pieces 0 and 2 do not broadcast.*list of 3 strings.*text tensor of shape \(2, 1\)",
    ),
    "too long": (
        lambda lm: lm("a" * 60, max_tokens=10),
        ValueError,
        "60 tokens and a text of up to 10 tokens.*64",
    ),
    "too long an observation": (
        lambda lm: lm("a" * 60).log_prob(lm.encode("abcab")),
        ValueError,
        "60 tokens and a text of up to 5 tokens.*64",
    ),
    "grammar": (
        lambda lm: lm("a", max_tokens=3, grammar=Grammar.regex("(a")),
        ValueError,
        "cannot be compiled",
    ),
    "grammar vocabulary": (
        lambda lm: lm("a", max_tokens=3, grammar=Grammar.regex("zzz")).sample(),
        ValueError,
        "permits no token after ''",
    ),
    "encode nothing": (lambda lm: lm.encode(""), ValueError, "has no tokens"),
    "encode empty row": (lambda lm: lm.encode(["a", ""]), ValueError, r"text\[1\]='' has no tokens"),
    "encode tensor": (
        lambda lm: lm.encode(torch.tensor([1])),
        TypeError,
        "must be a string or a list of strings",
    ),
    "decode string": (lambda lm: lm.decode("abc"), TypeError, "Pass lm.encode"),
    "decode ids": (lambda lm: lm.decode(torch.tensor([9])), ValueError, "token id 9"),
    "value string": (lambda lm: lm("a").log_prob("b"), TypeError, "value is a string.*lm.encode"),
    "value floats": (lambda lm: lm("a").log_prob(torch.tensor([0.5])), TypeError, "integer token ids"),
    "value id": (lambda lm: lm("a").log_prob(torch.tensor([6])), ValueError, "value holds the token id 6"),
    "value below PAD": (lambda lm: lm("a").log_prob(torch.tensor([-2])), ValueError, "token id -2"),
    "value hole": (lambda lm: lm("a").log_prob(torch.tensor([PAD, 2])), ValueError, "padding before a token"),
    "value empty": (lambda lm: lm("a").log_prob(torch.tensor([PAD])), ValueError, "it is empty"),
    "value batch": (
        lambda lm: lm(["a", "b"]).log_prob(lm.encode(["a", "b", "c"])),
        ValueError,
        r"batch shape \(3,\) does not broadcast.*\(2,\)",
    ),
    "value unfinished": (
        lambda lm: lm("a", max_tokens=3, stop=".").log_prob(lm.encode("ab")),
        ValueError,
        "neither ends with a stop token nor has max_tokens=3",
    ),
    "value too long": (
        lambda lm: lm("a", max_tokens=2).log_prob(lm.encode("abc")),
        ValueError,
        "3 tokens, more than max_tokens=2",
    ),
    "value too short": (
        lambda lm: lm("a", max_tokens=3, min_tokens=2, stop=".").log_prob(lm.encode(".")),
        ValueError,
        "fewer than min_tokens=2",
    ),
    "value stops early": (
        lambda lm: lm("a", max_tokens=3, stop=".").log_prob(lm.encode(".a.")),
        ValueError,
        "a stop token stands before its end",
    ),
    "value excluded": (
        lambda lm: lm("a", max_tokens=2, allowed=[1, 2]).log_prob(lm.encode("cc")),
        ValueError,
        "allowed= excludes",
    ),
    "one option": (lambda lm: lm.choice("a", options=["b"]), ValueError, "at least two options"),
    "options string": (lambda lm: lm.choice("a", options="bc"), TypeError, "options must be a list"),
    "prefix options": (
        lambda lm: lm.choice("a", options=["b", "bc"]),
        ValueError,
        "'b' is a prefix of option 'bc'.*probability that the text begins with it",
    ),
    "equal options": (lambda lm: lm.choice("a", options=["b", "b"]), ValueError, "is a prefix of"),
    "not an option": (
        lambda lm: lm.choice("a", options=["b", "c"]).log_prob(lm.encode("d")),
        ValueError,
        "'d'.*none of the options",
    ),
    "enumerate stream": (lambda lm: lm("a").enumerate_support(), ValueError, "at most 1,000,000"),
    "unknown adapter": (lambda lm: lm.using("x").__enter__(), KeyError, "no adapter 'x'"),
}


@pytest.mark.parametrize("case", CALLS)
def test_the_error_names_the_argument_and_the_mend(lm: LM, case: str) -> None:
    call, error, message = CALLS[case]
    with pytest.raises(error, match=f"(?s){message}"):
        call(lm)


def test_off_support_values_have_probability_zero_where_validation_is_off(lm: LM) -> None:
    d = lm("a", max_tokens=3, stop=".")
    d._validate_args = False
    assert d.log_prob(lm.encode([".a.", "ab.", "ab"])).isneginf().tolist() == [True, False, True]
    c = lm.choice("a", options=["b", "c"])
    c._validate_args = False
    assert c.log_prob(lm.encode("d")).isneginf()


def test_a_model_without_latent_text_is_refused(lm: LM) -> None:
    def model(ending: str) -> None:
        pyro.sample("ending", lm("a"), obs=lm.encode(ending))

    with pytest.raises(ValueError, match="no latent text site"):
        PromptGuide(model, lm)("cd")


def test_a_latent_that_the_guide_does_not_know_is_named(lm: LM) -> None:
    def model(ending: str) -> None:
        pyro.sample("mood", dist.Normal(0.0, 1.0))
        middle = pyro.sample("middle", lm("a", max_tokens=2))
        pyro.sample("ending", lm("a", middle), obs=lm.encode(ending))

    with pytest.raises(ValueError, match=r"'mood' \(Normal\) is not text.*others="):
        PromptGuide(model, lm)("cd")

    def partial(ending: str) -> None:
        pyro.sample("mood", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"does not sample the model's latent sites \['middle'\]"):
        importance(model, partial, 3)("cd")

    def extra(ending: str) -> None:
        PromptGuide(model, lm, others=partial)(ending)
        pyro.sample("surprise", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"samples \['surprise'\], which the model does not have"):
        importance(model, extra, 3)("cd")


def test_a_latent_stream_is_named(lm: LM) -> None:
    def model(ending: str) -> None:
        middle = pyro.sample("middle", lm("a"))
        pyro.sample("ending", lm("a", middle), obs=lm.encode(ending))

    with pytest.raises(ValueError, match="site 'middle': a latent text needs max_tokens"):
        PromptGuide(model, lm)("cd")


PROMPTS = {
    "unknown site": ({"muddle": lambda ending: [ending]}, ValueError, r"prompt= names \['muddle'\]"),
    "unknown parameter": ({"middle": lambda nothing: [nothing]}, ValueError, "asks for 'nothing'"),
    "no list": ({"middle": lambda ending: ending}, TypeError, "must return a non-empty list of pieces"),
    "no function": ({"middle": ["a"]}, TypeError, "must be a function"),
    "batch": ({"middle": lambda: [["a", "b"]]}, ValueError, "middle"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_bad_prompts_are_named(story: Story, case: str) -> None:
    prompt, error, message = PROMPTS[case]
    with pytest.raises(error, match=message):
        importance(story.program, PromptGuide(story.program, story.lm, prompt=prompt), 3)(*story.args)


def test_a_batch_written_into_a_prompt_string_is_refused(story: Story) -> None:
    guide = PromptGuide(story.program, story.lm, prompt={"middle": lambda ending: [f"e{ending}"]})
    importance(story.program, guide, 3)(*story.args)
    with pytest.raises(TypeError, match="writes 'ending', which is list here, into a string"):
        importance(story.program, guide, 3, vectorize_data=True)(["ab", "a"], ["cd", "c"])


def test_strings_as_observations_are_refused(lm: LM) -> None:
    def model(ending: str) -> None:
        middle = pyro.sample("middle", lm("a", max_tokens=2))
        pyro.sample("ending", lm("a", middle), obs=ending)

    with pytest.raises((TypeError, AttributeError), match="string"):
        importance(model, PromptGuide(model, lm, {"middle": lambda: ["a"]}), 3)("cd")


@pytest.mark.parametrize("objective", [TrajectoryBalance(4), LeaveOneOutELBO(4)])
def test_log_probabilities_that_are_not_finite_name_site_and_row(story: Story, objective: object) -> None:
    def model(beginning: str, ending: str) -> None:
        middle = story.program(beginning, ending)
        pyro.factor("verifier", torch.where(middle[..., 0] >= 0, -torch.inf, 0.0))

    guide = AutoregressiveGuide(model, story.lm, rank=2)
    with pytest.raises(ValueError, match=r"site 'verifier' has log-probability -inf at row \(0,\).*floor="):
        objective.loss_and_grads(model, guide, *story.args)
    assert all(p.grad is None for p in guide.parameters())


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own warning comes first
def test_a_broken_model_is_named(story: Story) -> None:
    guide = PromptGuide(story.program, story.lm)
    value = story.lm.encode("de.")
    with torch.no_grad():
        story.lm.transformer.get_output_embeddings().weight[3, 0] = float("nan")
    with pytest.raises(ValueError, match="site 'middle': the network's log-probabilities are NaN at row 0, token 0"):
        importance(story.program, guide, 3)(*story.args)

    def fixed(beginning: str, ending: str) -> None:
        pyro.sample("middle", dist.Delta(value, event_dim=1))

    with pytest.raises(ValueError, match=r"site 'middle' has log-probability nan at row \(0,\)"):
        importance(story.program, fixed, 3)(*story.args)


def test_objectives_name_bad_settings() -> None:
    with pytest.raises(ValueError, match="needs at least 2"):
        TrajectoryBalance(1)
    with pytest.raises(ValueError, match="needs at least 2"):
        LeaveOneOutELBO(1)
    with pytest.raises(ValueError, match="log_partition='zero'"):
        TrajectoryBalance(4, log_partition="zero")
    with pytest.raises(ValueError, match="temperatures"):
        TrajectoryBalance(4, behaviour=Behaviour(tempered=0.5, temperatures=(0.0, 1.0)))
    with pytest.raises(ValueError, match="insomnia=2"):
        WakeSleep(4, insomnia=2)
    with pytest.raises(TypeError, match="num_particle"):
        TrajectoryBalance(num_particle=4)


def test_a_learned_log_partition_needs_a_guide_that_has_one(story: Story) -> None:
    guide = AutoregressiveGuide(story.program, story.lm, rank=2)
    with pytest.raises(TypeError, match="Use GFlowNetGuide"):
        TrajectoryBalance(4, log_partition="learned").loss(story.program, guide, *story.args)


def test_the_sleep_phase_refuses_factors(story: Story) -> None:
    def model(beginning: str, ending: str) -> None:
        story.program(beginning, ending)
        pyro.factor("verifier", torch.tensor(0.0))

    guide = AutoregressiveGuide(model, story.lm, rank=2)
    with pytest.raises(ValueError, match="factor 'verifier': the sleep phase"):
        WakeSleep(4).loss(model, guide, *story.args)


def test_guides_take_a_language_model(lm: LM) -> None:
    with pytest.raises(TypeError, match="must be an llmppl.LM"):
        PromptGuide(lambda: None, "smollm2")


def test_models_that_cannot_be_vouched_for_are_named(lm: LM, tmp_path: Path) -> None:
    def made(**changes: Any) -> LM:
        model = copy.deepcopy(lm.transformer)
        for name, value in changes.items():
            setattr(model, name, value)
        return LM(model, lm.tokenizer)

    # What torch.compile(model) and model.compile() leave.
    with pytest.raises(ValueError, match="compiled by torch.compile"):
        made(_orig_mod=lm.transformer)
    with pytest.raises(ValueError, match="compiled by torch.compile"):
        made(_compiled_call_impl=lambda *args: None)
    with pytest.raises(ValueError, match="spread over 0, cpu by device_map="):
        made(hf_device_map={"model.embed_tokens": 0, "lm_head": "cpu"})
    with pytest.raises(ValueError, match="spread over disk"):
        made(hf_device_map={"": "disk"})
    assert made(hf_device_map={"": "cpu"}).vocabulary == lm.vocabulary
    config = copy.deepcopy(lm.transformer.config)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match=r"quantised \(gptq\)"):
        made(config=config)
    lm.transformer.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"quantised \(compressed-tensors\)"):
        LM.from_pretrained(tmp_path)
    from llmppl.numpyro.network.architecture import Architecture

    with pytest.raises(ValueError, match="the checkpoint is quantised"):
        Architecture.of(settings)


@pytest.mark.parametrize("vectorized", [False, True])
def test_what_users_functions_raise_says_where(vectorized: bool) -> None:
    import llmppl.numpyro as twin
    from llmppl import fit, importance
    from llmppl.guides import AutoregressiveGuide, PromptGuide
    from llmppl.numpyro.guides import PromptGuide as TwinGuide
    from llmppl.numpyro.testing import tiny_lm as twin_tiny_lm
    from llmppl.objectives import TrajectoryBalance
    from llmppl.testing import tiny_lm

    lm, other = tiny_lm(), twin_tiny_lm()

    def wrong(*values: Any) -> Any:
        raise LookupError("nothing there")

    def factored(beginning: Any, ending: Any) -> None:
        middle = pyro.sample("middle", lm(beginning, max_tokens=2))
        pyro.factor("goal", wrong(middle))

    def late(beginning: Any, ending: Any) -> None:
        middle = pyro.sample("middle", lm(beginning, max_tokens=2))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))
        if middle.dim() > 1 + vectorized:  # where particles are, and not where the program is looked at
            wrong()

    def plain(beginning: Any, ending: Any) -> None:
        middle = pyro.sample("middle", lm(beginning, max_tokens=2))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))

    def twin_factored(beginning: Any, ending: Any) -> None:
        middle = numpyro.sample("middle", other(beginning, max_tokens=2))
        numpyro.factor("goal", wrong(middle))

    args: Any = (["a", "b"], ["b", "c"]) if vectorized else ("a", "b")
    told = {"middle": lambda ending: wrong(ending)}
    options: Any = {"vectorize_data": vectorized, "progress": False}
    cases: list[tuple[Any, str]] = [
        (lambda: importance(factored, PromptGuide(factored, lm), 2, **options)(*args), "behind site 'middle'"),
        (lambda: importance(late, PromptGuide(plain, lm), 2, **options)(*args), "behind site 'ending'"),
        (
            lambda: importance(plain, PromptGuide(plain, lm, prompt=told), 2, **options)(*args),
            r"Raised by prompt\['middle'\], called with ending=(\['b', 'c'\]|'b')",
        ),
        (
            lambda: fit(late, AutoregressiveGuide(plain, lm, rank=1), [("a", "b")], TrajectoryBalance(2), 1, **options),
            r"Raised at step 1 of fit, on \((\['a'\], \['b'\]|'a', 'b')\)",
        ),
        (lambda: twin.exact_posterior(twin_factored)("a", "b"), "behind site 'middle'"),
        (
            lambda: twin.importance(twin_factored, TwinGuide(twin_factored, other), 2, **options)(random.key(0), *args),
            "behind site 'middle'",
        ),
    ]
    for call, note in cases:
        with pytest.raises(LookupError, match="nothing there") as caught:
            call()
        assert re.search(note, "\n".join(caught.value.__notes__)), caught.value.__notes__
