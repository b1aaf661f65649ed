"""lm.map(): values, rows, errors, and what becomes of a deterministic site in programs, posteriors and simulations."""

from __future__ import annotations

import gc
import math
import re
from collections import Counter
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.ops.provenance import get_provenance, track_provenance
from torch import Tensor

from llmppl import LM, exact_posterior, importance, mcmc, smc
from llmppl.diagnostics.ranks import _same
from llmppl.diagnostics.verdict import _branches
from llmppl.display.posterior_html import posterior_html
from llmppl.inference.simulated_pairs import simulated_pair
from llmppl.inference.stages import latents_of
from llmppl.network.row_map import decoder_of
from llmppl.programs.plates import in_data_plate
from llmppl.programs.simulation import simulate
from llmppl.testing import tiny_lm
from llmppl.text import PAD
from llmppl.training.regularisation import observed_sites


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm(vocabulary=4, seed=0, dtype=torch.float64)


@pytest.fixture(scope="module")
def counted(lm: LM) -> Any:
    """A text of which the number of "a" is observed, and what the function makes of it kept."""

    def program(noise: float) -> None:
        text = pyro.sample("text", lm("b", max_tokens=2, stop="."))
        number = pyro.deterministic("number", lm.map(lambda t: t.count("a"), text), event_dim=0)
        pyro.deterministic("twice", lm.map(lambda t: t + t if "b" in t else t, text), event_dim=1)
        pyro.sample("seen", dist.Normal(number.double(), noise), obs=torch.tensor(1.7, dtype=torch.float64))

    return program


def evidence(lm: LM) -> float:
    """The same by hand: 13 texts, their probabilities and densities."""
    prior = lm("b", max_tokens=2, stop=".")
    texts = prior.enumerate_support()
    numbers = torch.tensor([lm.decode(text).count("a") for text in texts], dtype=torch.float64)
    likelihood = dist.Normal(numbers, 0.5).log_prob(torch.tensor(1.7, dtype=torch.float64))
    return float((prior.log_prob(texts) + likelihood).logsumexp(0))


# --- values --------------------------------------------------------------------------------------


def test_rows_of_particles_and_plates_are_each_computed_once(lm: LM) -> None:
    calls: Counter[Any] = Counter()

    def function(text: str, number: float, flag: bool, name: str, constant: int) -> float:
        calls[text, number, flag, name, constant] += 1
        assert [type(v) for v in (text, number, flag, name, constant)] == [str, float, bool, str, int]
        return len(text) * 10 + number + flag + (name == "y") / 2 + constant

    texts = lm.encode(["a", "ab", "a"])[:, None]  # (3, 1, 2)
    numbers = torch.tensor([0.25, 0.0])  # (2,)
    flags = torch.tensor([[True], [False], [True]])
    result = lm.map(function, texts, numbers, flags, ["x", "y"], 100)
    expected = [[111.25, 111.5], [120.25, 120.5], [111.25, 111.5]]
    assert result.dtype == torch.float32
    assert result.tolist() == expected
    assert set(calls.values()) == {1}
    assert len(calls) == 4  # the first and the third row are the same


def test_numbers_keep_their_bits_and_texts_with_other_tokens_are_one_string(lm: LM) -> None:
    seen: list[float] = []
    lm.map(lambda x: bool(seen.append(x)), torch.tensor([0.0, -0.0, math.nan, math.nan, math.inf]))
    assert [str(x) for x in seen] == ["0.0", "-0.0", "nan", "inf"]
    small = torch.tensor([3, -1, 3], dtype=torch.int32)
    assert lm.map(lambda n: isinstance(n, int), small).tolist() == [True] * 3
    assert lm.map(lambda x: x, torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [0.5]
    wide = torch.cat([lm.encode(["a", "ab"]), torch.full((2, 3), PAD)], -1)
    assert lm.map(len, wide, returns=int).tolist() == [1, 2]
    assert lm.map(len, torch.empty(2, 0, dtype=torch.long)).tolist() == [0.0, 0.0]


def test_strings_booleans_integers_and_widths(lm: LM) -> None:
    texts = lm.map(lambda t: t + "b", lm.encode([["a", "ab"], ["aba", "c"]][0]))
    assert texts.dtype == torch.long
    assert lm.decode(texts) == ["ab", "abb"]
    assert texts[0].tolist() == [1, 2, PAD]
    assert lm.map(lambda t: t, lm.encode("ab"), max_tokens=4).tolist() == [1, 2, PAD, PAD]
    assert lm.map("{}{}".format, "a", ["b", "c"]).tolist() == [[1, 2], [1, 3]]
    assert lm.map(lambda t: "a" in t, ["ab", "c"]).tolist() == [True, False]
    whole = lm.map(len, ["ab", "c"], returns=int)
    assert (whole.dtype, whole.tolist()) == (torch.int32, [2, 1])
    assert lm.map(lambda t: np.float64(len(t)) if t == "c" else 2, ["ab", "c"]).tolist() == [2.0, 1.0]
    assert lm.map(len, "abc").shape == ()
    assert lm.decode(lm(texts, max_tokens=2).context) == ["ab", "abb"]  # a piece like any other


def test_results_are_constants_and_keep_provenance(lm: LM) -> None:
    """Without provenance TraceGraph_ELBO would take what follows for independent of the text."""
    x = torch.tensor([1.5], requires_grad=True)
    assert not lm.map(lambda v: 2 * v, x).requires_grad
    text = track_provenance(lm.encode("ab"), frozenset({"text"}))
    number = track_provenance(torch.tensor(2.0), frozenset({"number"}))
    assert get_provenance(lm.map(lambda t, n: n, text, number)) == {"text", "number"}


def test_only_texts_made_here_are_known_as_texts_and_for_no_longer_than_they_live(lm: LM) -> None:
    from llmppl.network import row_map

    gc.collect()
    before = len(row_map._decoders._notes)
    text = lm.map(lambda t: t, "ab")
    decoder = decoder_of(text)
    assert decoder is not None
    assert decoder(text) == "ab"
    assert decoder_of(text.clone()) is None
    assert decoder_of(lm.map(len, "ab", returns=int)) is None
    del text
    gc.collect()
    assert len(row_map._decoders._notes) == before


# --- errors --------------------------------------------------------------------------------------


class Odd(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(int(code))


def fails(error: Exception) -> Any:
    def function(text: str, number: float) -> float:
        if text == "c":
            raise error
        return number

    return function


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ZeroDivisionError("oh"), ZeroDivisionError), (KeyError("oh"), KeyError), (Odd(7), RuntimeError)],
)
def test_what_the_function_raises_names_row_and_inputs(lm: LM, error: Exception, kind: type[Exception]) -> None:
    texts = lm.encode(["ab", "c", "c"])[:, None]
    where = r"'function' raised \w+ in row \(1, 0\) of a batch \(3, 2\), for the inputs \('c', 0.5\): '?(oh|7)"
    with pytest.raises(kind) as caught:
        lm.map(fails(error), texts, torch.tensor([0.5, 0.25]))
    assert type(caught.value) is kind
    assert caught.value.__cause__ is error
    assert re.search(where, caught.value.args[0])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda lm: lm.map("f", "a"), TypeError, "function must be callable, got 'f'"),
        (lambda lm: lm.map(len), ValueError, "no values"),
        (lambda lm: lm.map(len, "a", returns=list), TypeError, r"returns=a type must be one of"),
        (lambda lm: lm.map(len, "a", max_tokens=0), ValueError, "max_tokens=0 must be a number of tokens"),
        (lambda lm: lm.map(len, "a", max_tokens=2, returns=int), ValueError, "max_tokens=2 is for texts.*returns=int"),
        (lambda lm: lm.map(len, None), TypeError, "value 0 of lm.map must be a string.*got None"),
        (lambda lm: lm.map(len, "a", [1.0]), TypeError, "value 1 .* got a list"),
        (lambda lm: lm.map(abs, torch.tensor(3)), ValueError, r"value 0 .* int64 .* value.int\(\)"),
        (lambda lm: lm.map(abs, torch.tensor([9, 9])), ValueError, "value 0 of lm.map holds the token id 9"),
        (lambda lm: lm.map(abs, torch.tensor(1j)), TypeError, "value 0 of lm.map holds complex"),
        (lambda lm: lm.map(max, ["a", "b"], ["a"] * 3), ValueError, r"values 0 and 1 .* are \(2,\) and \(3,\)"),
        (lambda lm: lm.map(list, "ab"), TypeError, r"'list' returned a list for the inputs \('ab'\). It must"),
        (lambda lm: lm.map(lambda t: None, ["ab"]), TypeError, r"returned None in row \(0,\) of a batch \(1,\)"),
        (lambda lm: lm.map(lambda t: torch.ones(1), "ab"), TypeError, r"a Tensor of shape \(1,\).*\.item\(\)"),
        (
            lambda lm: lm.map(lambda t: t if t == "b" else 1.0, ["a", "b"]),
            TypeError,
            r"returned 'b' in row \(1,\) .*\('b'\), and 1.0 in row \(0,\) .*\('a'\). Return one type",
        ),
        (lambda lm: lm.map(lambda t: t == "a" or 2, ["a", "b"]), TypeError, "returned 2 .* and True in row"),
        (lambda lm: lm.map(str, 1.0, returns=float), TypeError, "'1.0' for the inputs .*a float was.*returns=str"),
        (lambda lm: lm.map(float, 1.0, returns=int), TypeError, "where a int was to come. Pass returns=float"),
        (lambda lm: lm.map(lambda t: "", ["a"]), ValueError, r"returned '' in row \(0,\) .* has no tokens"),
        (lambda lm: lm.map(lambda t: t * 3, ["a"], max_tokens=2), ValueError, r"row \(0,\).*\('a'\): 3 tokens, more"),
        (lambda lm: lm.map(lambda t: 2**31, "a", returns=int), ValueError, "outside int32. Pass returns=float"),
        (lambda lm: lm.map(len, torch.empty(0, 2).long()), ValueError, "batch without rows.*Pass returns="),
    ],
)
def test_errors_say_what_was_wrong(lm: LM, call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(lm)


def test_a_batch_without_rows_has_no_results(lm: LM) -> None:
    assert lm.map(len, torch.empty(0, 2).long(), returns=float).shape == (0,)


# --- programs ------------------------------------------------------------------------------------


def test_the_exact_posterior_is_that_by_hand_and_shows_what_was_computed(lm: LM, counted: Any) -> None:
    posterior = exact_posterior(counted)(0.5)
    assert float(posterior.log_evidence) == pytest.approx(evidence(lm), abs=1e-9)
    texts = posterior.decode("text")
    assert posterior.samples["number"].tolist() == [text.count("a") for text in texts]
    assert posterior.decode("twice") == [text + text if "b" in text else text for text in texts]
    assert posterior.deterministic == ("number", "twice")
    assert posterior.texts == ["text", "twice"]
    assert set(posterior.log_likelihood) == {"seen"}
    with pytest.raises(KeyError, match="'number' is no text"):
        posterior.decode("number")
    kept = posterior.resample(5)
    assert [t + t if "b" in t else t for t in kept.decode("text")] == kept.decode("twice")


def test_importance_smc_and_mcmc_carry_it_and_arviz_and_pages_show_strings(lm: LM, counted: Any) -> None:
    prior = latents_of(counted)
    posteriors = [
        importance(counted, prior, 300, progress=False)(0.5),
        smc(counted, num_samples=40, num_runs=2, progress=False)(0.5),
        mcmc(counted, kernel="suffix", num_samples=5, num_chains=2, warmup=2, progress=False)(0.5),
    ]
    for posterior in posteriors:
        texts = posterior.decode("text")
        assert posterior.samples["number"].tolist() == [text.count("a") for text in texts]
        assert posterior.decode("twice") == [text + text if "b" in text else text for text in texts]
    assert float(posteriors[0].log_evidence) == pytest.approx(evidence(lm), abs=0.5)
    data = posteriors[0].to_arviz(num_samples=20)
    assert set(data.posterior_text.data_vars) == {"text", "twice"}
    assert data.posterior.number.shape == (1, 20)
    assert [str(t) for t in data.posterior_text.twice.values[0]] == [
        t + t if "b" in t else t for t in map(str, data.posterior_text.text.values[0])
    ]
    assert "twice" in posterior_html(posteriors[0])


@pytest.mark.parametrize("explicit", [True, False])
def test_in_plates_it_is_laid_out_as_the_latents_are(lm: LM, explicit: bool) -> None:
    """Also where event_dim= is left out, which Pyro reads as the whole batch being one event."""

    def program(ends: Any) -> None:
        one, none = ({"event_dim": 1}, {"event_dim": 0}) if explicit else ({}, {})
        with pyro.plate("inner", 3, dim=-2):
            text = pyro.sample("text", lm("b", max_tokens=2, stop="."))
        number = pyro.deterministic("number", lm.map(len, text), **none)
        pyro.deterministic("upper", lm.map(lambda t: t + "c", text), **one)
        total = number.sum(-2, keepdim=True).double()
        pyro.sample("seen", dist.Normal(total, 1.0), obs=torch.tensor(ends, dtype=torch.float64))

    rows = in_data_plate(program)
    posterior = importance(rows, latents_of(rows), 20, progress=False)([4.0, 6.0])
    assert posterior.batch_shape == (2,)
    texts = posterior.decode("text")
    assert posterior.samples["number"].shape == (20, 2, 3)
    assert posterior.samples["number"].tolist() == [[[len(t) for t in row] for row in rows] for rows in texts]
    assert posterior.decode("upper") == [[[t + "c" for t in row] for row in rows] for rows in texts]


def test_batch_dimensions_that_are_not_the_plates_are_refused(lm: LM) -> None:
    def program() -> None:
        pyro.sample("text", lm("b", max_tokens=2, stop="."))
        pyro.deterministic("three", torch.zeros(3, 5), event_dim=0)

    with pytest.raises(ValueError, match=r"'three' has shape \(3, 5\), which does not fit .* event_dim="):
        importance(program, latents_of(program), 5, progress=False)()


def test_a_program_of_varying_structure_fills_up(lm: LM) -> None:
    def program() -> None:
        coin = pyro.sample("coin", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
        text = pyro.sample("text", lm("b", max_tokens=1))
        if coin:
            pyro.deterministic("twice", lm.map(lambda t: t + t, text), event_dim=1)
        else:
            pyro.deterministic("number", lm.map(len, text), event_dim=0)

    posterior = exact_posterior(program)()
    assert float(posterior.log_evidence) == pytest.approx(0, abs=1e-9)
    coins = posterior.samples["coin"].astype(bool)
    doubled = np.array(posterior.decode("twice"))
    assert (doubled[coins] == [t + t for t in np.array(posterior.decode("text"))[coins]]).all()
    assert (doubled[~coins] == "").all()
    assert np.isnan(posterior.samples["number"][coins]).all()


def test_predictive_runs_it(lm: LM, counted: Any) -> None:
    for parallel in (False, True):
        drawn = Predictive(counted, num_samples=6, parallel=parallel, return_sites=("text", "number"))(0.5)
        numbers = [lm.decode(t).count("a") for t in drawn["text"].reshape(6, -1)]
        assert drawn["number"].reshape(6).tolist() == numbers


def test_simulations_leave_deterministic_sites_to_the_program(lm: LM, counted: Any) -> None:
    latents, observations = simulate(counted, (0.5,), {})
    assert set(latents) == {"text"}
    assert set(observations) == {"seen"}
    trace = pyro.poutine.trace(counted).get_trace(0.5)
    assert set(observed_sites(trace)) == {"seen"}

    def told(noise: float, observations: dict[str, Tensor] | None = None) -> None:
        assert observations is None or set(observations) == {"seen"}
        pyro.sample("text", lm("b", max_tokens=2, stop="."))

    pair = simulated_pair(counted, told, (0.5,), {}, 7, np.random.default_rng(0))
    assert pair.drawn is not None
    numbers = pair.drawn.posterior.samples["number"]
    assert numbers.tolist() == [text.count("a") for text in pair.drawn.posterior.decode("text")]
    # A sampler's posterior holds the deterministic site as well, which cannot be given to the program.
    sampler = simulated_pair(
        counted,
        told,
        (0.5,),
        {},
        7,
        np.random.default_rng(0),
        sampler=lambda m, g: importance(m, g, 20, progress=False),
    )
    assert sampler.drawn is not None


def test_a_diagnosis_takes_latents_alone_for_the_draws(lm: LM) -> None:
    """What is computed may be as wide as the longest text of a pass, and NaN without anything missing."""

    def program() -> None:
        text = pyro.sample("text", lm("b", max_tokens=2, stop="."))
        pyro.deterministic("twice", lm.map(lambda t: t + t, text), event_dim=1)
        pyro.deterministic("nothing", lm.map(lambda t: math.nan, text), event_dim=0)
        pyro.sample("seen", lm(text), obs=lm.encode("a"))

    def guide(observations: dict[str, Tensor] | None = None) -> None:
        pyro.sample("text", lm("b", max_tokens=2, stop="."))

    assert not _branches(exact_posterior(program)())
    for seed in range(5):
        pyro.set_rng_seed(seed)
        pair = simulated_pair(program, guide, (), {}, 7, np.random.default_rng(0))
        assert pair.drawn is not None
        same = [text == pair.truth.posterior.decode("text")[0] for text in pair.drawn.posterior.decode("text")]
        assert _same(pair.drawn, pair.truth).tolist() == same
