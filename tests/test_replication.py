"""Prior and posterior predictive draws, in both twins, and what ArviZ makes of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import arviz
import jax
import matplotlib
import numpy as np
import numpyro
import pyro
import pytest
import torch
from conftest import Story

import llmppl
import llmppl.numpyro as twin
from llmppl import Posterior
from llmppl.numpyro.testing import tiny_lm as tiny_jax_lm
from llmppl.testing import tiny_lm

matplotlib.use("Agg")

pytestmark = pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")


def in_torch() -> SimpleNamespace:
    return SimpleNamespace(
        lm=tiny_lm(dtype=torch.float64), primitives=pyro, normal=pyro.distributions.Normal,
        exact=lambda program, *args: llmppl.exact_posterior(program)(*args),
        importance=lambda program, guide, count, *args, **own: llmppl.importance(
            program, guide, count, progress=False, **own)(*args),
        replicate=lambda *own, args, **more: llmppl.replicate(*own, progress=False, **more)(*args),
        array=lambda values: torch.tensor(values),
    )  # fmt: skip


def in_jax() -> SimpleNamespace:
    return SimpleNamespace(
        lm=tiny_jax_lm(), primitives=numpyro, normal=numpyro.distributions.Normal,
        exact=lambda program, *args: twin.exact_posterior(program)(*args),
        importance=lambda program, guide, count, *args, **own: twin.importance(
            program, guide, count, progress=False, **own)(jax.random.key(0), *args),
        replicate=lambda *own, args, **more: twin.replicate(*own, **more)(jax.random.key(1), *args),
        array=lambda values: np.array(values, dtype=np.float32),
    )  # fmt: skip


TWINS = {"torch": in_torch, "jax": in_jax}


@pytest.fixture(params=TWINS)
def t(request: pytest.FixtureRequest) -> SimpleNamespace:
    return TWINS[request.param]()


def story(t: SimpleNamespace) -> Callable[..., None]:
    def program(beginning: Any, ending: Any) -> None:
        middle = t.primitives.sample("middle", t.lm(beginning, max_tokens=2))
        t.primitives.sample("ending", t.lm(beginning, middle, max_tokens=1), obs=ending)

    return program


@pytest.mark.long
def test_frequencies_are_the_predictive_laws(t: SimpleNamespace) -> None:
    program, ending = story(t), t.lm.encode("c")
    exact = t.exact(program, "ab", ending)
    support = [str(c) for c in ".abcde"]
    law = np.array([[np.exp(float(t.lm("ab", text, max_tokens=1).log_prob(t.lm.encode(c)))) for c in support]
                    for text in exact.decode("middle")])  # fmt: skip
    prior_of = np.exp(
        np.array([float(t.lm("ab", max_tokens=2).log_prob(t.lm.encode(x))) for x in exact.decode("middle")])
    )
    expected = {"posterior": exact.weights @ law, "prior": prior_of @ law}
    assert np.abs(expected["posterior"] - expected["prior"]).sum() > 0.1
    for name, given in (("posterior", exact), ("prior", None)):
        drawn = t.replicate(program, given, 4000, args=("ab", ending))
        assert drawn.of_posterior == (name == "posterior")
        found = np.array([np.mean([text == c for text in drawn.decode("ending")]) for c in support])
        # Total variation of 4000 draws over six texts is about 0.015.
        assert np.abs(found - expected[name]).sum() / 2 < 0.04
        # Each replicate follows from its own latent.
        pairs = list(zip(drawn.decode("middle"), drawn.decode("ending"), strict=True))
        most = max(set(drawn.decode("middle")), key=drawn.decode("middle").count)
        row = law[exact.decode("middle").index(most)]
        own = [ending for middle, ending in pairs if middle == most]
        assert len(own) > 100
        assert np.abs(np.array([np.mean([e == c for e in own]) for c in support]) - row).sum() / 2 < 0.2


@pytest.mark.long
def test_every_latent_goes_to_its_own_row_and_plate(t: SimpleNamespace) -> None:
    """A reading is ten times its sentence's length, a hundred times its row's, nearly without noise."""

    def program(ys: Any, with_latent: bool = True) -> None:
        def length(text: Any) -> Any:
            return t.lm.map(lambda s: float(len(s.rstrip("."))), text, returns=float)

        with t.primitives.plate("rows", 2, dim=-1):
            title = t.primitives.sample("title", t.lm("b", max_tokens=3, stop="."))
            t.primitives.deterministic("shout", t.lm.map(lambda s: s + s, title, returns=str, max_tokens=6))
            with t.primitives.plate("sentences", 3, dim=-2):
                body = t.primitives.sample("body", t.lm("a", max_tokens=3, stop="."))
                mean = 100 * length(title) + 10 * length(body)
                t.primitives.sample("y", t.normal(mean, 0.01), obs=ys)

    def guide(ys: Any) -> None:
        with t.primitives.plate("rows", 2, dim=-1):
            t.primitives.sample("title", t.lm("b", max_tokens=3, stop="."))
            with t.primitives.plate("sentences", 3, dim=-2):
                t.primitives.sample("body", t.lm("a", max_tokens=3, stop="."))

    ys = t.array([[210.0, 100.0], [200.0, 110.0], [220.0, 110.0]])  # sentences, rows
    posterior = t.importance(program, guide, 400, ys)
    assert posterior.plates == ("rows",)
    assert posterior.dims["body"] == ("sentences",)
    assert posterior.observed["y"].shape == (2, 3)
    np.testing.assert_allclose(posterior.observed["y"], np.asarray(ys).T)
    np.testing.assert_allclose(posterior.row(1).observed["y"], [100.0, 110.0, 110.0])
    prior = t.replicate(program, None, 300, args=(ys,))
    for drawn in (prior, t.replicate(program, posterior, 200, args=(ys,))):
        lengths = {n: (np.char.str_len(np.char.rstrip(np.array(drawn.decode(n)), "."))) for n in ("title", "body")}
        mean = 100 * lengths["title"][:, :, None] + 10 * lengths["body"]
        np.testing.assert_allclose(drawn.observations["y"], mean, atol=0.1)
        if drawn.of_posterior:  # its own draws, each where it was
            for name, value in posterior.resample(200).samples.items():
                np.testing.assert_array_equal(drawn.latents[name], value)
        assert drawn is not prior or len(np.unique(mean)) > 3
    data = posterior.to_arviz(
        coords={"rows": ["left", "right"]},
        prior=prior,
        posterior_predictive=t.replicate(program, posterior, args=(ys,)),
    )
    assert data.posterior["body_ids"].dims == ("chain", "draw", "rows", "sentences", "body_token")
    assert data.posterior["rows"].values.tolist() == ["left", "right"]
    assert data.posterior_text["shout"].dims == ("chain", "draw", "rows")
    assert data.posterior_text["shout"].values[0, 0, 0] == 2 * data.posterior_text["title"].values[0, 0, 0]
    assert data.observed_data["y"].dims == ("rows", "sentences")
    assert data.posterior_predictive["y"].dims == ("chain", "draw", "rows", "sentences")
    assert data.prior_predictive["y"].sizes["draw"] == 300
    assert data.prior["title_length"].dims == ("chain", "draw", "rows")
    assert arviz.plot_ppc(data, var_names=["y"], num_pp_samples=5) is not None
    matplotlib.pyplot.close("all")


@pytest.mark.long
# Texts of few tokens have few values, whose likelihoods are no Pareto tail.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning", "ignore:The inplace keyword")
def test_rows_of_data_compare_by_leave_one_out(t: SimpleNamespace) -> None:
    """Two programs of the same rows: ArviZ prefers the one of the greater evidence."""

    def made(scale: float) -> Callable[..., Any]:
        def program(beginning: Any, y: Any) -> None:
            text = t.primitives.sample("middle", t.lm(beginning, max_tokens=3, stop="."))
            length = t.lm.map(lambda s: float(len(s)), text, returns=float)
            t.primitives.sample("y", t.normal(length, scale), obs=y)

        return program

    def guide(beginning: Any, y: Any) -> None:
        t.primitives.sample("middle", t.lm(beginning, max_tokens=3, stop="."))

    args = (["ab", "c", "de", "a"], t.array([1.2, 1.7, 2.2, 2.0]))
    posteriors = {
        f"{scale:g}": t.importance(made(scale), guide, 600, *args, vectorize_data=True) for scale in (2.0, 20.0)
    }
    assert posteriors["2"].log_evidence.sum() > posteriors["20"].log_evidence.sum() + 1
    table = arviz.compare({name: own.to_arviz() for name, own in posteriors.items()}, ic="loo")
    assert list(table.index) == ["2", "20"]
    data = posteriors["20"].to_arviz(
        posterior_predictive=t.replicate(made(20.0), posteriors["20"], 50, vectorize_data=True, args=args)
    )
    assert data.log_likelihood["y"].dims == ("chain", "draw", "row_0")
    assert data.posterior_predictive["y"].dims == ("chain", "draw", "row_0")
    assert data.observed_data["y"].dims == ("row_0",)


def test_what_does_not_fit_is_said(t: SimpleNamespace) -> None:
    program, ending = story(t), t.lm.encode("c")
    exact = t.exact(program, "ab", ending)

    def other(beginning: Any, ending: Any) -> None:
        t.primitives.sample("title", t.lm(beginning, max_tokens=1))

    def factored(beginning: Any, ending: Any) -> None:
        program(beginning, ending)
        t.primitives.factor("liked", t.array(0.5))

    args = ("ab", ending)
    with pytest.raises(ValueError, match=r"the posterior has no \['title'\].*Pass the program that it is of"):
        t.replicate(other, exact, args=args)
    with pytest.raises(ValueError, match="factor 'liked'"):
        t.replicate(factored, exact, args=args)
    with pytest.raises(TypeError, match="posterior must be a Posterior, got {}"):
        t.replicate(program, {}, args=args)
    with pytest.raises(ValueError, match="num_samples"):
        t.replicate(program, exact, 0, args=args)
    prior = t.replicate(program, None, 3, args=args)
    with pytest.raises(
        ValueError, match=r"posterior_predictive=Replicates\(3 draws .* is drawn from the prior. Pass rep"
    ):
        exact.to_arviz(posterior_predictive=prior)
    with pytest.raises(TypeError, match="prior must be draws by replicate"):
        exact.to_arviz(prior=exact)
    with pytest.raises(ValueError, match="coords names 'rows', which is no dimension"):
        exact.to_arviz(coords={"rows": ["a"]})
    with pytest.raises(ValueError, match=r"coords\['middle_token'\] has 1 labels, and the dimension 2 entries"):
        exact.to_arviz(coords={"middle_token": ["a"]})
    with pytest.raises(KeyError, match="no text site 'y'"):
        prior.decode("y")


def test_another_number_of_rows_is_refused(story: Story) -> None:
    posterior: Posterior = llmppl.exact_posterior(story.program)(*story.args)
    with pytest.raises(ValueError, match=r"the posterior has rows \(\), and the program with these arguments \(2,\)"):
        llmppl.replicate(story.program, posterior, vectorize_data=True)(["ab", "c"], ["cd", "e"])
