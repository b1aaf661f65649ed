"""The law of a text in JAX: mass, sampling against scoring, padding, support, messages, the same values as torch's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, random
from scipy.stats import chisquare

from llmppl import Grammar
from llmppl.numpyro import LM
from llmppl.numpyro.distributions.autoregressive_text import AutoregressiveText, choose
from llmppl.numpyro.network.adapters import initial
from llmppl.numpyro.network.folder_weights import layer_places
from llmppl.numpyro.network.reading import Reader, sharing
from llmppl.numpyro.network.text_law import _Text
from llmppl.numpyro.testing import tiny_lm
from llmppl.text import PAD

V, WIDTH = 6, 4
CONTEXTS = ["a", "bcde", "dd"]
HEATS = np.array([0.5, 1.0, 1.9], np.float32)

# (name, arguments of lm(...)): every way to restrict a law that a table row can name.
LAWS: dict[str, dict[str, Any]] = {
    "fixed length": {"max_tokens": 4},
    "stop": {"max_tokens": 4, "stop": "."},
    "two stops": {"max_tokens": 4, "stop": [0, 2]},
    "min tokens": {"max_tokens": 4, "min_tokens": 3, "stop": "."},
    "min equals max": {"max_tokens": 4, "min_tokens": 4, "stop": "."},
    "temperature": {"max_tokens": 4, "stop": ".", "temperature": 0.6},
    "a temperature a row": {"max_tokens": 4, "stop": ".", "temperature": HEATS},
    "mask": {"max_tokens": 4, "stop": ".", "allowed": [0, 1, 4]},
    "everything": {"max_tokens": 4, "min_tokens": 2, "stop": ".", "allowed": [0, 2, 3], "temperature": HEATS},
    "stop of two tokens": {"max_tokens": 4, "stop": "ab"},
    "stops of several kinds": {"max_tokens": 4, "min_tokens": 3, "stop": ["aa", "ba", "."], "allowed": [0, 1, 2, 4]},
    "stop of two tokens, grammar": {"max_tokens": 4, "stop": "dd", "grammar": Grammar.regex("(ab|c)[de]*")},
    "grammar": {"max_tokens": 4, "grammar": Grammar.regex("(ab|c)[de]*")},
    "grammar and stop": {"max_tokens": 4, "stop": [4], "grammar": Grammar.regex("(ab|c)[de]*")},
    "grammar and mask": {"max_tokens": 4, "grammar": Grammar.regex("[a-e]+"), "allowed": [0, 1, 2]},
}


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm(V)


def every_text() -> np.ndarray:
    """All token sequences of up to WIDTH tokens, whatever the law thinks of them."""
    rows = [row for n in range(1, WIDTH + 1) for row in itertools.product(range(V), repeat=n)]
    return np.array([[*row, *[PAD] * (WIDTH - len(row))] for row in rows], np.int32)


def follows_grammar(name: str, text: str) -> bool:
    """Whether a full stop (the end token) or a letter may come next, by hand: the last character is the question."""
    before, last = text[:-1], text[-1]
    if name == "grammar and mask":
        return last != "." if not before else True
    if before in ("", "a"):
        return last in ("ac" if not before else "b")
    return last in ".de"


COMPILED = ["everything", "grammar and stop", "stops of several kinds"]


@pytest.fixture(scope="module")
def tables(lm: LM) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Every text ``(n, T)``, the network's logits before each token ``(n, contexts, T, V)``, and log-probabilities
    ``(n, contexts)`` of some laws: one compiled program."""
    texts = every_text()

    @jax.jit
    def scores(value: Array) -> tuple[Array, dict[str, Array]]:
        with sharing():
            laws = {name: lm(CONTEXTS, **LAWS[name]).log_prob(value) for name in COMPILED}
            reader = Reader(lm.architecture, lm.weights)
            *_, context, read = reader.stretches((*lm.context(CONTEXTS), value))
            first = jnp.broadcast_to(context.last[:, None], (*read.states.shape[:-2], 1, 32))
            return reader.logits(jnp.concatenate([first, read.states[..., :-1, :]], -2)), laws

    logits, laws = scores(jnp.asarray(texts[:, None]))
    return texts, np.asarray(logits), {name: np.asarray(table) for name, table in laws.items()}


def reference(lm: LM, law: str, texts: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The definition in plain numpy: log-probabilities ``(n, contexts)``."""
    arguments = LAWS[law]
    longest, fewest = arguments["max_tokens"], arguments.get("min_tokens", 0)
    stop = arguments.get("stop", [])
    stops = [".abcde"[s] if isinstance(s, int) else s for s in ([stop] if isinstance(stop, str) else stop)]
    stops += ["."] if "grammar" in arguments else []
    heat = np.broadcast_to(np.asarray(arguments.get("temperature", 1.0)), len(CONTEXTS))
    expected = np.full((len(texts), len(CONTEXTS)), -np.inf)
    for n, row in enumerate(texts):
        tokens = [int(t) for t in row if t != PAD]
        signs = "".join(".abcde"[t] for t in tokens)
        ended = any(s in signs for s in stops) or len(tokens) == longest
        if not ended or any(s in signs[:-1] for s in stops) or not fewest <= len(tokens) <= longest:
            continue
        total = np.zeros(len(CONTEXTS))
        for t, token in enumerate(tokens):
            possible = np.isin(np.arange(V), arguments.get("allowed", range(V)))
            if t + 1 < fewest:
                possible &= [not any(s in signs[:t] + c for s in stops) for c in ".abcde"]
            if "grammar" in arguments:
                possible &= [follows_grammar(law, signs[:t] + c) for c in ".abcde"]
            scaled = np.where(possible, logits[n, :, t].astype(np.float64) / heat[:, None], -np.inf)
            total += scaled[:, token] - np.logaddexp.reduce(scaled, -1)
        expected[n] = total
    return expected


@pytest.mark.parametrize("law", LAWS)
def test_log_probabilities_are_the_definition_and_sum_to_one(lm: LM, tables: Any, law: str) -> None:
    """Over all texts that there are: those of the support, and the others."""
    texts, logits, laws = tables
    own = lm.law(**LAWS[law])
    prefixes = np.where(np.arange(WIDTH) < np.arange(WIDTH)[:, None], texts[:, None, None], PAD)
    tokens = own.log_probs(
        jnp.asarray(logits), jnp.arange(WIDTH), jnp.broadcast_to(prefixes, (*logits.shape[:3], WIDTH))
    )
    steps = np.take_along_axis(np.asarray(tokens), np.maximum(texts, 0)[:, None, :, None], -1)[..., 0]
    inside = np.asarray(_Text(own)(texts))
    found = np.where(inside[:, None], np.where(texts[:, None] == PAD, 0, steps).sum(-1), -np.inf)
    expected = reference(lm, law, texts, logits)
    for table in (found, laws.get(law, found)):
        assert (np.isneginf(table) == np.isneginf(expected)).all(), "another support"
        # Single precision: a sum of up to four log-probabilities of up to 20 nats.
        np.testing.assert_allclose(np.exp(table), np.exp(expected), atol=1e-6)
        np.testing.assert_allclose(table[inside], expected[inside], atol=2e-5)
        np.testing.assert_allclose(np.exp(table).sum(0), 1, atol=1e-5)
    support = np.asarray(lm(CONTEXTS[0], **{**LAWS[law], "temperature": 1.0}).enumerate_support())
    possible = texts[~np.isneginf(expected[:, 0])]
    assert {tuple(row) for row in support.tolist()} == {tuple(row) for row in possible.tolist()}
    assert len(support) == len(possible)


def agrees(draws: np.ndarray, texts: np.ndarray, log_probs: np.ndarray) -> float:
    """p-value of a chi-square test of draws against enumerated probabilities."""
    index = {tuple(row): n for n, row in enumerate(texts.tolist())}
    counts = np.bincount([index[tuple(row)] for row in draws.tolist()], minlength=len(texts))
    expected = np.exp(np.asarray(log_probs, np.float64))
    expected *= len(draws) / expected.sum()
    assert not counts[expected == 0].any(), "a text of probability zero was drawn"
    common = expected >= 5
    observed = np.array([*counts[common], counts[~common].sum()])
    wanted = np.array([*expected[common], expected[~common].sum()])
    return float(chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue)


@pytest.mark.long
@pytest.mark.parametrize("law", COMPILED)
def test_mapped_samples_follow_the_enumerated_probabilities(lm: LM, tables: Any, law: str) -> None:
    """Keys are mapped over, the distribution is an argument of the compiled program, its weights among the leaves."""
    texts, _, laws = tables

    def program(d: AutoregressiveText, keys: Array) -> Any:
        return jax.vmap(d.sample_with_intermediates)(keys), d.expand((2, 3))

    d, keys = lm(CONTEXTS, **LAWS[law]), random.split(random.key(1), 3000)
    traced = jax.make_jaxpr(program)(d, keys)
    assert sum(np.size(c) for c in traced.consts) < 100, "weights became constants of the program"
    (values, [recorded]), wider = jax.jit(program)(d, keys)
    assert values.shape == recorded.shape == (3000, len(CONTEXTS), WIDTH)
    assert wider.batch_shape == (2, 3)
    index = {tuple(row): n for n, row in enumerate(texts.tolist())}
    for row in range(len(CONTEXTS)):
        draws = np.asarray(values[:, row])
        # Fixed seed; a law that is off by 10 % in one frequent text gives p below 1e-3 at 3000 draws.
        assert agrees(draws, texts, laws[law][:, row]) > 1e-3
        rescored = laws[law][[index[tuple(d)] for d in draws.tolist()], row]
        np.testing.assert_allclose(np.asarray(recorded[:, row].sum(-1)), rescored, atol=1e-4)


def test_padding_changes_nothing(lm: LM, tables: Any) -> None:
    """Padding left, right and between tokens of a context, rows of the embedding beyond the tokenizer, values wider
    than max_tokens; mapped over contexts and over values."""
    texts, logits, _ = tables
    holes = jnp.array([[4, 4, PAD, PAD, PAD], [PAD, PAD, PAD, 4, 4], [PAD, 4, PAD, PAD, 4]])  # "dd"
    noise = 5 * random.normal(random.key(3), (10, 32))
    wide = {**lm.weights, **{k: jnp.concatenate([lm.weights[k], noise]) for k in ("embed", "head")}}
    padded = LM(wide, lm.architecture, lm.tokenizer)
    assert padded.vocabulary == V
    values = np.pad(texts[::7], [(0, 0), (0, 1)], constant_values=PAD)

    @jax.jit
    def scores(wide: Any, holes: Array, values: Array) -> Array:
        def of(context: Array) -> Array:
            return jax.vmap(AutoregressiveText(padded, (context,), padded.law(4, "."), weights=wide).log_prob)(values)

        return jax.vmap(of)(holes)

    found = np.asarray(scores(wide, holes, jnp.asarray(values)))
    expected = reference(lm, "stop", texts[::7], logits[::7])[:, CONTEXTS.index("dd")]
    assert np.isfinite(expected).sum() > 100
    for row in found:
        assert (np.isneginf(row) == np.isneginf(expected)).all()
        np.testing.assert_allclose(np.exp(row), np.exp(expected), atol=1e-6)
        np.testing.assert_allclose(row[np.isfinite(expected)], expected[np.isfinite(expected)], atol=5e-5)


def test_expand_shares_the_context_and_refuses_what_does_not_fit(lm: LM) -> None:
    d = lm(["a", "bc"], max_tokens=3, stop=".")
    for shape in [(4, 2), (3, 1, 2)]:
        assert d.expand(shape).batch_shape == shape
        assert d.expand(shape).context[0].shape == (2, 2)
    assert lm(["a"], max_tokens=3).expand((5,)).batch_shape == (5,)
    assert d.batch_shape == (2,), "expand changed the original"
    for shape in [(), (3,), (2, 1)]:
        with pytest.raises(ValueError, match=r"batch shape \(2,\) cannot be expanded"):
            d.expand(shape)
    with pytest.raises(ValueError, match=r"batch shape \(3,\) does not broadcast.*\(4, 2\)"):
        d.expand((4, 2)).log_prob(lm.encode(["a", "b", "c"], width=3))


def test_a_distribution_survives_its_own_pytree(lm: LM) -> None:
    d = lm(CONTEXTS, **LAWS["everything"])
    leaves, tree = jax.tree.flatten(d)
    again = jax.tree.unflatten(tree, leaves)
    assert repr(again) == repr(d)
    assert jax.tree.structure(again) == tree
    assert all(a is b for a, b in zip(jax.tree.leaves(again), leaves, strict=True))
    assert again.lm is lm
    assert jax.tree.structure(lm(CONTEXTS, **LAWS["grammar"])) == jax.tree.structure(lm(CONTEXTS, **LAWS["grammar"]))
    doubled = jax.tree.map(lambda leaf: leaf, d.support)
    assert doubled(jnp.array([2, 0, PAD, PAD]))

    def placeholders(leaf: Any) -> object:
        return object()

    for fn in (d, lm("a"), lm("a", **LAWS["grammar"]), lm.choice("a", options=["b", "c"])):
        assert repr(jax.tree.map(placeholders, fn)).startswith(type(fn).__name__)
        jax.eval_shape(lambda fn: repr(fn) and repr(fn.support) and jnp.zeros(()), fn)
    carried = jax.eval_shape(lambda d: jax.lax.scan(lambda c, _: (c, None), d, None, length=2)[0], d)
    assert repr(carried).startswith("AutoregressiveText(batch_shape=(3,), max_tokens=4")


def test_a_text_of_the_support_stands_in_for_a_masked_one(lm: LM) -> None:
    for arguments in LAWS.values():
        law = lm.law(**{**arguments, "grammar": None})
        d = AutoregressiveText(lm, lm.context("a"), law)
        assert np.asarray(d.support(d.support.feasible_like(jnp.zeros((2, WIDTH), jnp.int32))))[0]
    assert lm("a").support(lm("a").support.feasible_like(jnp.zeros(3, jnp.int32)))


OUTSIDE = {
    "unfinished": ({"max_tokens": 3, "stop": "."}, "ab", "neither ends with a stop token nor has max_tokens=3"),
    "too long": ({"max_tokens": 2}, "abc", "3 tokens, more than max_tokens=2"),
    "too short": ({"max_tokens": 3, "min_tokens": 2, "stop": "."}, ".", "fewer than min_tokens=2"),
    "stops early": ({"max_tokens": 3, "stop": "."}, ".a.", "a stop token stands before its end"),
    "excluded": ({"max_tokens": 2, "allowed": [1, 2]}, "cc", "allowed= excludes"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_value_outside_the_support_is_warned_of(lm: LM, case: str) -> None:
    arguments, text, message = OUTSIDE[case]
    with pytest.warns(UserWarning, match=f"(?s)^Out-of-support values.*{text!r}.*{message}"):
        lm("a", **arguments)._validate_sample(lm.encode([text, text], width=3))


def test_a_value_outside_the_support_has_probability_zero(lm: LM) -> None:
    d = lm("a", max_tokens=3, stop=".")
    values = lm.encode([".a.", "ab.", "ab", "abcd", "a."], width=5)
    with pytest.warns(UserWarning, match="'.a.'.*before its end"):
        scores = d.log_prob(values)
    assert np.isneginf(np.asarray(scores)).tolist() == [True, False, True, True, False]
    with pytest.warns(UserWarning, match="it is empty"):
        lm("a")._validate_sample(np.array([PAD], np.int32))


# --- compiled programs ------------------------------------------------------------------------------


def test_texts_of_one_width_are_compiled_once(lm: LM, tables: Any) -> None:
    from llmppl.numpyro import jit

    texts, logits, _ = tables
    steps = np.asarray(jax.nn.log_softmax(logits, -1))
    score = jit(lambda beginning, ending: lm(beginning).log_prob(lm.encode(ending)))
    for beginning, ending in (("bcde", "cd."), ("dd", "e")):
        found = score(lm.argument(beginning), lm.argument(ending))
        tokens = lm.encode(ending, width=WIDTH)
        n, row = int((texts == tokens).all(-1).argmax()), CONTEXTS.index(beginning)
        expected = sum(steps[n, row, t, token] for t, token in enumerate(lm.encode(ending)))
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert score.compilations() == 1
    with pytest.raises(TypeError, match="Pass them as pieces of their own"):
        jit(lambda beginning: lm(f"Once {beginning}").log_prob(lm.encode("a")))(lm.argument("ab"))


def test_the_string_of_a_compiled_program_is_no_string(lm: LM) -> None:
    text = lm.argument("ab")
    for attempt in (
        lambda: f"{text}.",
        lambda: "a" + text,
        lambda: text + "a",
        lambda: str(text),
        lambda: "%s" % text,  # noqa: UP031
    ):
        with pytest.raises(TypeError, match=r"Pass them as pieces of their own: lm\(beginning, ' ', ending\)"):
            attempt()
    with pytest.raises(TypeError, match="cannot be compared, here with 'ab'"):
        _ = text == "ab"
    with pytest.raises(AttributeError, match="Pass them as pieces"):
        text.strip()
    assert text == text
    assert repr(text) == "TextArgument(shape=(16,))"
    assert lm.argument(["ab", "c"]).verbatim.shape == (2, 16)
    with pytest.raises(TypeError, match="non-empty list of strings, got a list of 0"):
        lm.argument([])


@pytest.mark.long
def test_one_token_of_many_is_drawn_by_its_probability() -> None:
    """A vocabulary of several blocks, probabilities over four orders of magnitude, and none where it is zero: pooled in
    cells of at least 50 expected, chi-square at 10⁻⁴, one fixed key."""
    weights = 10.0 ** np.linspace(-4, 0, 1000)
    weights[::3] = 0
    probs = weights / weights.sum()
    with np.errstate(divide="ignore"):
        rows = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)), (200_000, 1000))
    found = np.bincount(np.asarray(jax.jit(choose)(random.key(0), rows)), minlength=1000)
    assert not found[::3].any()
    cell = np.floor(np.cumsum(probs) * 200_000 / 50 * (1 - 1e-9)).astype(int)
    expected, seen = np.bincount(cell, probs * 200_000), np.bincount(cell, found)
    full = expected > 25
    expected = np.append(expected[full], expected[~full].sum())
    seen = np.append(seen[full], seen[~full].sum())
    assert chisquare(seen[expected > 0], expected[expected > 0]).pvalue > 1e-4


@pytest.mark.long
@pytest.mark.parametrize("law", ["everything", "grammar and mask"])
def test_the_gradient_of_a_text_is_that_of_its_law(lm: LM, law: str) -> None:
    """Scores are put together from logits and their normaliser; the reference is the law's log-softmax."""
    text = lm(CONTEXTS, **LAWS[law])
    values = text.sample(random.key(0), (5,))
    adapter = initial(lm.weights, list(layer_places(lm.architecture)), 2, random.key(1), jnp.float32)
    adapter = jax.tree.map(lambda x: x + 0.1 * random.normal(random.key(x.size), x.shape), adapter)
    weighing = jnp.arange(1.0, 16.0).reshape(5, 3)  # a row's gradient must not stand for another's

    def ours(lora: Any) -> Array:
        return (weighing * text.with_context(text.context, lora).log_prob(values)).sum()

    def reference(lora: Any) -> Array:
        reader = Reader(lm.architecture, lm.weights, lora)
        *_, before, rest = reader.stretches([*text.context, values])
        first = jnp.broadcast_to(before.last, (5, *before.last.shape))[..., None, :]
        states = jnp.concatenate([first, rest.states[..., :-1, :]], -2)
        places = jnp.arange(WIDTH)
        prefixes = jnp.where(places < places[:, None], values[..., None, :], PAD)
        log_probs = text.law.log_probs(reader.logits(states), places, prefixes)
        scores = jnp.take_along_axis(log_probs, jnp.maximum(values, 0)[..., None], -1)[..., 0]
        return (weighing * jnp.where(values == PAD, 0.0, scores).sum(-1)).sum()

    value, gradient = jax.jit(jax.value_and_grad(ours))(adapter)
    due_value, due = jax.jit(jax.value_and_grad(reference))(adapter)
    assert float(value) == pytest.approx(float(due_value), rel=1e-5)
    for found, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(due), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * float(jnp.abs(expected).max()))
    tangent = jax.tree.map(jnp.ones_like, adapter)
    along = jax.jit(lambda lora: jax.jvp(ours, (lora,), (tangent,))[1])(adapter)
    assert float(along) == pytest.approx(float(sum(g.sum() for g in jax.tree.leaves(due))), rel=1e-3)


def test_a_temperature_that_is_learned_has_its_gradient(lm: LM) -> None:
    value = lm.encode("ab.")

    def log_prob(heat: Any) -> Array:
        return lm("cd", max_tokens=4, stop=".", temperature=heat).log_prob(value)

    width = 1e-2
    slope = (log_prob(jnp.asarray(0.8 + width)) - log_prob(jnp.asarray(0.8 - width))) / (2 * width)
    assert float(jax.grad(log_prob)(0.8)) == pytest.approx(float(slope), rel=1e-3)


def test_scores_and_draws_are_the_same_inside_another_compiled_function(lm: LM) -> None:
    """With known numbers they compile themselves, which XLA's options forbid inside another compiled function."""
    text, key = lm("cd", max_tokens=4, stop="."), random.key(2)
    value = lm.encode("ab.")

    @jax.jit
    def inside(offset: Array) -> tuple[Array, Array]:
        return offset + text.log_prob(value), text.sample(key)

    score, drawn = inside(jnp.zeros(()))
    assert float(score) == pytest.approx(float(text.log_prob(value)), rel=1e-5)
    np.testing.assert_array_equal(drawn, text.sample(key))


def test_a_mapped_draw_leaves_the_program_once_and_warns_of_texts_that_are_cut_off(lm: LM) -> None:
    keys = random.split(random.key(1), 6)

    def drawing(max_tokens: int) -> Callable[[Array], Array]:
        # A grammar warns once.
        return lm(CONTEXTS[0], max_tokens=max_tokens, grammar=Grammar.regex("abcde")).sample

    def callbacks(count: int) -> int:
        lowered = jax.jit(jax.vmap(drawing(2))).lower(keys[:count])
        return int(lowered.as_text().count("callback"))

    assert callbacks(6) == callbacks(2)

    def gradient(sample: Callable[[Array], Array]) -> Any:
        return jax.jit(jax.grad(lambda shift: shift**2 * lm(CONTEXTS[0], max_tokens=2).log_prob(sample(keys[0]))))(1.0)

    calls: list[Callable[[Callable[[Array], Array]], Any]] = [
        lambda sample: jax.vmap(sample)(keys),
        lambda sample: jax.jit(jax.vmap(sample))(keys),
        lambda sample: jax.vmap(jax.vmap(sample))(keys.reshape(2, 3)),
        gradient,
    ]

    def done(call: Callable[[Callable[[Array], Array]], Any]) -> None:
        jax.block_until_ready(call(drawing(2)))
        jax.effects_barrier()

    for call in calls:
        with pytest.warns(UserWarning, match="max_tokens=2 cuts texts off before .* is complete, such as 'ab'"):
            done(call)
