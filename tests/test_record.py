"""Records in a format: the program, its locally masked twin as a proposal, and what the mask alone gets wrong."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from conftest import character_lm
from pyro import poutine

from llmppl import LM, Grammar, exact_posterior, importance
from llmppl.guides import PromptGuide
from llmppl.inference.gathering import NoWeightError
from llmppl.models import record
from llmppl.models.record import field, fields_told, given, schema_grammar

SIGNS = '{"ab": 12,}\n.lue'
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2, 12]}, "b": {"enum": ["a", "b"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
VALID = [f'{{"a": {a}, "b": "{b}"}}\n' for a in (1, 2, 12) for b in "ab"]


@pytest.fixture(scope="module")
def lm() -> LM:
    return character_lm(SIGNS, ".")


def unmasked(lm: LM, texts: list[str]) -> np.ndarray:
    law = lm("ab:", max_tokens=20, stop="\n")
    return np.array([float(law.log_prob(lm.encode(text))) for text in texts])


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ({"a": "12"}, ['{"a": 12, "b": "a"}\n', '{"a": 12, "b": "b"}\n']),
        ({"b": "b"}, [f'{{"a": {a}, "b": "b"}}\n' for a in (1, 2, 12)]),
        ({"a": "2", "b": "a"}, ['{"a": 2, "b": "a"}\n']),
    ],
)
def test_a_field_that_is_given_is_all_that_the_mask_permits(lm: LM, values: dict[str, str], texts: list[str]) -> None:
    """Every draw has the value, and the weights are exact."""
    masked = record(lm, given(SCHEMA, values), list(values), max_tokens=20, masked=True)
    law = poutine.trace(masked).get_trace("ab:", *values.values()).nodes["record"]["fn"]
    assert sorted(lm.decode(law.enumerate_support())) == sorted(texts)
    program = record(lm, SCHEMA, list(values), max_tokens=20)
    pyro.set_rng_seed(0)
    posterior = importance(program, PromptGuide(masked, lm), 200, progress=False)("ab:", *values.values())
    assert np.isfinite(posterior.log_weights).all()
    exact = np.logaddexp.reduce(unmasked(lm, texts))
    assert posterior.log_evidence == pytest.approx(exact, abs=4 * posterior.log_evidence_error + 1e-5)


def test_the_mask_does_not_know_what_is_observed(lm: LM) -> None:
    """An observed value is no part of the prior, masked or not: its evidence is the share of the records that have
    it."""
    masked = record(lm, SCHEMA, ["b"], max_tokens=20, masked=True)
    law = poutine.trace(masked).get_trace("ab:", "b").nodes["record"]["fn"]
    share = float(sum(law.log_prob(lm.encode([text])).exp() for text in VALID if '"b": "b"' in text))
    assert exact_posterior(masked)("ab:", "b").log_evidence == pytest.approx(np.log(share), abs=1e-5)
    assert share < 0.99
    with pytest.raises(ValueError, match="'c' is none of the schema's properties"):
        given(SCHEMA, {"c": "1"})


def test_a_record_with_another_value_has_no_density(lm: LM) -> None:
    program = record(lm, SCHEMA, ["a", "b"], max_tokens=20)
    for text in VALID:
        written = json.loads(text)
        sites = poutine.trace(poutine.condition(program, data={"record": lm.encode(text)})).get_trace("ab:", "12", "b")
        sites.compute_log_prob()
        for name, value in (("a", 12), ("b", "b")):
            expected = 0.0 if written[name] == value else -np.inf
            assert float(sites.nodes[name]["log_prob_sum"]) == expected, (text, name)


def test_values_of_any_type_are_given() -> None:
    open_schema = {"type": "object", "properties": {"a": {}}, "required": ["a"]}
    for value, written in (("1", 1), ("true", True), ("x y", "x y"), ("null", None)):
        text = json.dumps({"a": written}) + "\n"
        lm = character_lm(text + '"{}:,.b', ".")
        own = given({**open_schema, "additionalProperties": False}, {"a": value})
        masked = record(lm, own, ["a"], max_tokens=20, masked=True)
        law = poutine.trace(masked).get_trace("a", value).nodes["record"]["fn"]
        assert torch.isfinite(law.log_prob(lm.encode(text))), value


def one_property(**own: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": own}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def numbers() -> LM:
    return character_lm('{"a": 0159.-enulé}\n~', "~")


@pytest.mark.parametrize("value", ["1.5", "-0", "-1.5", "100"])
def test_a_number_is_known_as_it_is_written(numbers: LM, value: str) -> None:
    """The proposal is the one record that has it; the same number in another spelling is another value."""
    schema, lm = one_property(type="number"), numbers
    masked = record(lm, given(schema, {"a": value}), ["a"], max_tokens=20, masked=True)
    law = poutine.trace(masked).get_trace("a", value).nodes["record"]["fn"]
    text = f'{{"a": {value}}}\n'
    assert lm.decode(law.enumerate_support()) == [text]
    program = record(lm, schema, ["a"], max_tokens=20)
    posterior = importance(program, PromptGuide(masked, lm), 4, progress=False)("a", value)
    exact = float(lm("a", max_tokens=20, stop="\n").log_prob(lm.encode(text)))
    np.testing.assert_allclose(posterior.log_weights, exact, atol=1e-5)
    for other in {f"{float(value)}0", f"{float(value) * 10}e-1", f"{value}.0"} - {value}:
        data = {"record": lm.encode(f'{{"a": {other}}}\n')}
        sites = poutine.trace(poutine.condition(program, data=data)).get_trace("a", value)
        sites.compute_log_prob()
        assert float(sites.nodes["a"]["log_prob_sum"]) == -np.inf, other


@pytest.mark.parametrize(
    ("own", "value"),
    [
        ({"type": "number"}, "100.0"),
        ({"type": "number"}, "1.50"),
        ({"type": "number"}, "1e2"),
        ({"type": ["null", "number"]}, "-0.0"),
        ({"type": "array"}, "[100.0]"),
        ({}, "100.0"),
    ],
)
def test_a_spelling_that_no_schema_of_one_value_writes_is_refused(own: dict[str, Any], value: str) -> None:
    with pytest.raises(ValueError, match=rf"'a': '{re.escape(value)}' is not written so.*Give another spelling"):
        given(one_property(**own), {"a": value})


@pytest.mark.parametrize(
    ("own", "value", "options"),
    [
        ({"type": "integer"}, "12", [12]),
        ({"type": ["string", "null"]}, "100.0", ["100.0"]),
        ({"type": ["string", "number"]}, "1.5", [1.5, "1.5"]),
        ({"type": "string"}, '""', ["", '""']),
        ({"enum": [1.5, 100.0, "100"]}, "100", [100.0, "100"]),
    ],
)
def test_what_is_given_are_all_values_that_are_written_so(own: dict[str, Any], value: str, options: list[Any]) -> None:
    assert given(one_property(**own), {"a": value})["properties"]["a"] == {"enum": options}


def test_the_posterior_is_the_unmasked_prior_on_what_the_schema_permits(lm: LM) -> None:
    masked = record(lm, SCHEMA, max_tokens=20, masked=True)
    law = poutine.trace(masked).get_trace("ab:").nodes["record"]["fn"]
    assert sorted(lm.decode(law.enumerate_support())) == sorted(VALID)
    pyro.set_rng_seed(0)
    posterior = importance(record(lm, SCHEMA, max_tokens=20), PromptGuide(masked, lm), 2000, progress=False)("ab:")
    exact = unmasked(lm, VALID)
    log_z = np.logaddexp.reduce(exact)
    assert abs(posterior.log_evidence - log_z) < 4 * posterior.log_evidence_error
    assert posterior.log_evidence_error < 0.03
    assert np.isfinite(posterior.log_weights).all(), "a mask proposes nothing but records"
    weight = dict(posterior.top("record", 6))
    share = np.exp(exact - log_z)
    np.testing.assert_allclose([weight.get(text, 0.0) for text in VALID], share, atol=0.04)
    # Local masking is another law, which no number of draws mends.
    local = law.log_prob(lm.encode(VALID)).exp().numpy()
    assert 0.5 * np.abs(local - share).sum() > 0.02
    drawn = posterior.decode("record")
    counts = np.array([drawn.count(text) for text in VALID]) / len(drawn)
    np.testing.assert_allclose(counts, local, atol=0.05)


def test_known_fields_condition_the_others(lm: LM) -> None:
    """Exactly, with the prose before: by the sum over all of them."""
    program = record(lm, SCHEMA, ["b"], prose_tokens=1, max_tokens=20)
    guide = PromptGuide(
        record(lm, SCHEMA, ["b"], prose_tokens=1, max_tokens=20, masked=True),
        lm,
        prompt={"prose": lambda prompt: [prompt], "record": lambda prompt, prose: [prompt, prose]},
    )
    pyro.set_rng_seed(0)
    posterior = importance(program, guide, 1500, progress=False)("ab:", "a")
    prose = lm("ab:", max_tokens=1, stop="\n")
    texts, records = prose.enumerate_support(), [text for text in VALID if text.endswith('"a"}\n')]
    law = lm("ab:", texts[:, None], max_tokens=20, stop="\n")
    joint = prose.log_prob(texts)[:, None] + law.log_prob(lm.encode(records))
    exact = float(joint.logsumexp((0, 1)))
    assert abs(posterior.log_evidence - exact) < 4 * posterior.log_evidence_error
    assert posterior.log_evidence_error < 0.15
    kept = posterior.weights > 0
    assert {field(text, "b") for text, own in zip(posterior.decode("record"), kept, strict=True) if own} == {"a"}
    marginal = (joint - exact).exp().sum(0).detach().numpy()
    found = dict(posterior.top("record", 3))
    np.testing.assert_allclose([found.get(text, 0.0) for text in records], marginal, atol=0.08)


def test_simulated_records_tell_their_fields(lm: LM) -> None:
    """A guide is told the value that was simulated, in plates, too."""
    masked = record(lm, SCHEMA, ["a", "b"], max_tokens=20, masked=True)
    guide = PromptGuide(masked, lm, prompt=fields_told(["a", "b"]))
    run = poutine.trace(guide).get_trace("ab:", "12", "a", observations={"a": lm.encode("2"), "b": lm.encode("b")})
    assert lm.decode(run.nodes["record"]["fn"].context) == "a: 2\nb: b\nab:"
    with pyro.plate("rows", 2):
        run = poutine.trace(record(lm, SCHEMA, ["b"], max_tokens=20, masked=True)).get_trace(["ab:", "a"], ["a", "b"])
    run.compute_log_prob()
    texts = lm.decode(run.nodes["record"]["value"])
    expected = [0.0 if field(text, "b") == value else -np.inf for text, value in zip(texts, "ab", strict=True)]
    assert run.nodes["b"]["log_prob"].tolist() == expected


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ('{"a": 12, "b": "x y"}\n', "b", "x y"),
        ('{"a": 12}\n', "a", "12"),
        ('{"a": [1, {"c": null}]}', "a", '[1, {"c": null}]'),
        ('{"a": ""}', "a", '""'),
        ('{"a": "\\ud800"}', "a", '"\\ud800"'),
        ('{"a": 12}', "b", "null"),
        ('{"a": 1', "a", "null"),
        ("[1]", "a", "null"),
        ('{"a": 1.50}', "a", "1.50"),
        ('{"a": 15e-1}', "a", "15e-1"),
        ('{"a": -0}', "a", "-0"),
        ('{"a": [1.50, {"é": 1E2}]}', "a", '[1.50, {"é": 1E2}]'),
        ("[" * 5000, "a", "null"),
        ("", "a", "null"),
    ],
)
def test_fields_of_whatever_text(text: str, name: str, value: str) -> None:
    assert field(text, name) == value


def test_a_record_that_is_cut_off_is_said_so(lm: LM) -> None:
    short = record(lm, SCHEMA, max_tokens=12, masked=True)
    with pytest.warns(UserWarning, match="max_tokens=12 cuts texts off before .* is complete, such as"):
        poutine.trace(short).get_trace("ab:")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        poutine.trace(short).get_trace("ab:")  # once
    with pytest.raises(NoWeightError):
        importance(record(lm, SCHEMA, max_tokens=12), PromptGuide(short, lm), 8)("ab:")


@pytest.mark.parametrize(
    ("law", "named"),
    [
        ({"min_tokens": 5}, r"grammar= and min_tokens= \(no stop before\) left"),
        ({"allowed": "a."}, "grammar= and allowed= left"),
    ],
)
def test_a_text_that_nothing_may_follow_is_no_fault_of_the_network_alone(lm: LM, law: Any, named: str) -> None:
    law = {name: lm.encode(value) if isinstance(value, str) else value for name, value in law.items()}
    fn = lm("a", grammar=Grammar.regex("ab"), max_tokens=6, **law)
    with pytest.raises(ValueError, match=rf"NaN at row 0, token .*float16 overflows\. Or {named} no token"):
        fn.sample()
    with pytest.raises(ValueError, match=rf"NaN.*float16 overflows\. Or {named} no token"):
        fn.next_log_probs(torch.zeros(1, lm.vocabulary), lm.encode("ab" if "min_tokens" in law else "a")[None])


def test_a_text_that_is_whole_and_full_is_not_cut_off(lm: LM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm("a", grammar=Grammar.regex("[ab]{2}"), max_tokens=2).sample((5,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SCHEMA, "a"), "fields must be a list of strings"),
        ((SCHEMA, ["c"]), "'c' is none of the schema's properties"),
        (({"properties": {"valid": {}}}, ["valid"]), "a site of the program's own"),
        ((False,), "satisfied by nothing"),
        (({"type": "nonsense"},), "cannot be compiled"),
    ],
)
def test_records_that_make_no_sense(lm: LM, arguments: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        record(lm, *arguments)
    with pytest.raises(ValueError, match="0 values of fields"):
        record(lm, SCHEMA, ["a"])("ab:")


def test_schemas_of_one_value_are_enumerated_on_the_real_model(smollm2: LM) -> None:
    """Spelled in whatever tokens: local masking is exact where the schema has one text, but for its spellings."""
    grammar = schema_grammar({"const": {"ok": True}})
    law = smollm2("Answer as JSON.\n", grammar=grammar, max_tokens=12, stop="\n")
    pyro.set_rng_seed(0)
    texts = law.sample((8,))
    assert {json.loads(text)["ok"] for text in smollm2.decode(texts)} == {True}
    prior = smollm2("Answer as JSON.\n", max_tokens=12, stop="\n")
    assert bool((prior.log_prob(texts) < law.log_prob(texts)).all())
    assert torch.isfinite(prior.log_prob(texts)).all()


def test_exact_posterior_of_a_small_format(lm: LM) -> None:
    schema = {"enum": [1, 2]}
    exact = exact_posterior(record(lm, schema, max_tokens=2))("ab:")
    assert exact.log_evidence == pytest.approx(np.logaddexp.reduce(unmasked(lm, ["1\n", "2\n"])), abs=1e-6)
