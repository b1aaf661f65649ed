"""NumPyro unmodified: plates, handlers, prediction, its objectives and samplers on texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array, random
from numpyro import handlers
from numpyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density

from llmppl.numpyro import LM
from llmppl.numpyro.testing import tiny_lm

BEGINNING, ENDING = "ab", "cd"


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm(6)


def story(lm: LM) -> Callable[[], Any]:
    def model() -> Array:
        middle = numpyro.sample("middle", lm(BEGINNING, max_tokens=2, stop="."))
        numpyro.sample("ending", lm(BEGINNING, middle), obs=lm.encode(ENDING))
        return middle

    return model


# --- objectives -------------------------------------------------------------------------------------


def adapted_guide(lm: LM) -> Callable[[], Any]:
    """A LoRA-adapted guide by hand, without llmppl's guides."""

    def guide() -> None:
        layers, hidden = lm.architecture.num_layers, lm.architecture.hidden
        down = numpyro.param("A", 0.3 * random.normal(random.key(7), (layers, hidden, 1)))
        up = numpyro.param("B", 0.3 * random.normal(random.key(8), (layers, 1, hidden)))
        prior = lm(ENDING, BEGINNING, max_tokens=2, stop=".")
        numpyro.sample("middle", prior.with_context(prior.context, {"o": {"A": down, "B": up}}))

    return guide


@pytest.mark.long
def test_trace_graph_elbo_has_the_exact_gradient_in_expectation(lm: LM) -> None:
    model, guide = story(lm), adapted_guide(lm)
    texts = lm(BEGINNING, max_tokens=2, stop=".").enumerate_support()
    params = {
        name: site["value"]
        for name, site in handlers.trace(handlers.seed(guide, 0)).get_trace().items()
        if site["type"] == "param"
    }

    def exact(params: dict[str, Array]) -> Array:
        def joint(program: Callable[[], Any], text: Array) -> Array:
            return log_density(program, (), {}, {**params, "middle": text})[0]

        log_q = jax.vmap(lambda text: joint(guide, text))(texts)
        log_p = jax.vmap(lambda text: joint(model, text))(texts)
        return -(jnp.exp(log_q) * (log_p - log_q)).sum()

    @jax.jit
    def gradients(params: dict[str, Array], keys: Array) -> Any:
        def loss(params: dict[str, Array], key: Array) -> Array:
            return TraceGraph_ELBO().loss(key, params, model, guide)

        return jax.value_and_grad(exact)(params), jax.vmap(jax.value_and_grad(loss), (None, 0))(params, keys)

    (value, wanted), (losses, found) = gradients(params, random.split(random.key(0), 4000))
    assert abs(losses.mean() - value) < 4 * losses.std() / 4000**0.5
    for name, gradient in wanted.items():
        error = found[name].std(0) / 4000**0.5
        # 64 numbers each; the largest of 128 standard normal deviates exceeds 4.5 once in a thousand times.
        assert (jnp.abs(found[name].mean(0) - gradient) < 4.5 * error).all()
        # The score term matters: without it the gradient would be zero.
        assert jnp.abs(gradient).max() > 10 * error.max()


REFUSED = [Trace_ELBO(), Trace_ELBO(num_particles=3), TraceMeanField_ELBO(), RenyiELBO(num_particles=2)]


@pytest.mark.parametrize("objective", REFUSED, ids=lambda o: f"{type(o).__name__} {o.num_particles}")
def test_objectives_that_differentiate_through_samples_are_refused(lm: LM, objective: Any) -> None:
    model = story(lm)
    svi = SVI(model, adapted_guide(lm), numpyro.optim.Adam(1e-2), objective)
    message = f"{type(objective).__name__} differentiates through samples, and a latent text.*TraceGraph_ELBO"
    with pytest.raises(TypeError, match=message):
        svi.init(random.key(0))
    with pytest.raises(TypeError, match=message):
        svi.run(random.key(0), 2, progress_bar=False)
    params = {"A": jnp.zeros((2, 32, 1)), "B": jnp.zeros((2, 1, 32))}
    for call in (objective.loss, jax.jit(objective.loss, static_argnums=(2, 3))):
        with pytest.raises(TypeError, match=message):
            call(random.key(0), params, model, adapted_guide(lm))

    def chooses() -> None:
        numpyro.sample("middle", lm.choice("a", options=["b", "cd"]))

    with pytest.raises(TypeError, match=r"latent text \(Choice\)"):
        objective.loss(random.key(0), {}, chooses, chooses)


def test_objectives_that_serve_and_observed_texts_are_not_refused(lm: LM) -> None:
    def scored(objective: Any, model: Callable[[], Any], guide: Callable[[], Any]) -> None:
        svi = SVI(model, guide, numpyro.optim.Adam(1e-2), objective)
        state = jax.eval_shape(svi.init, random.key(0))
        _, loss = jax.eval_shape(svi.update, state)
        assert loss.shape == ()

    scored(TraceGraph_ELBO(num_particles=2), story(lm), adapted_guide(lm))
    assert TraceEnum_ELBO.can_infer_discrete

    def mixed() -> None:
        mood = numpyro.sample("mood", dist.LogNormal(0.0, 1.0))
        numpyro.sample("ending", lm(BEGINNING, temperature=mood), obs=lm.encode(ENDING))

    for objective in (Trace_ELBO(), RenyiELBO(num_particles=2), TraceMeanField_ELBO()):
        scored(objective, mixed, AutoNormal(mixed))


# --- plates, handlers, prediction -------------------------------------------------------------------


def nested(lm: LM, size: int | None = None) -> Callable[..., Any]:
    """A latent in an inner plate, observations in an outer one that may be subsampled."""

    def model(endings: Any = None) -> None:
        beginnings = lm.encode(["a", "bb", "ccc"])
        with numpyro.plate("rows", 3, subsample_size=size, dim=-1) as rows:
            own = jnp.asarray(beginnings)[rows]
            with numpyro.plate("drafts", 2, dim=-2):
                middle = numpyro.sample("middle", lm(own, max_tokens=2, stop="."))
            told = None if endings is None else jnp.asarray(endings)[rows]
            numpyro.sample("ending", lm(own, middle[0], max_tokens=2), obs=told)

    return model


def test_densities_in_plates_under_handlers_are_those_of_the_sites(lm: LM) -> None:
    endings = lm.encode(["cd", "ab", "e."])
    middles = jnp.asarray(lm.encode(["a.", "b.", ".", "cd", "dd", "e."])).reshape(2, 3, 2)
    beginnings = jnp.asarray(lm.encode(["a", "bb", "ccc"]))
    model, values = nested(lm), {"middle": middles}
    sites = lm(beginnings, max_tokens=2, stop=".").expand((2, 3)).log_prob(middles).sum(0)
    sites = sites + lm(beginnings, middles[0], max_tokens=2).log_prob(endings)
    assert np.isfinite(sites).all()

    def density(program: Callable[..., Any], *args: Any) -> Array:
        return log_density(program, args, {}, values)[0]

    np.testing.assert_allclose(density(model, endings), sites.sum(), rtol=1e-5)
    np.testing.assert_allclose(density(handlers.scale(model, scale=0.5), endings), sites.sum() / 2, rtol=1e-5)
    masked = handlers.mask(model, mask=jnp.array([True, False, True]))
    np.testing.assert_allclose(density(masked, endings), sites[0] + sites[2], rtol=1e-5)
    conditioned = handlers.condition(model, {"ending": jnp.asarray(endings)})
    np.testing.assert_allclose(density(conditioned), sites.sum(), rtol=1e-5)
    given = handlers.seed(handlers.substitute(model, values), random.key(0))
    first = handlers.trace(given).get_trace(endings)
    again = handlers.trace(handlers.seed(handlers.replay(model, first), random.key(1))).get_trace(endings)
    np.testing.assert_array_equal(again["middle"]["value"], middles)


def test_a_subsampled_plate_scales_its_texts(lm: LM) -> None:
    sites: dict[str, Any] = {}

    def run(key: Array) -> Array:
        sites.update(handlers.trace(handlers.seed(nested(lm, 2), key)).get_trace(lm.encode(["cd", "ab", "e."])))
        return sites["middle"]["value"]

    assert jax.eval_shape(run, random.key(0)).shape == (2, 2, 2)
    assert sites["ending"]["fn"].batch_shape == (2,)
    assert sites["ending"]["scale"] == sites["middle"]["scale"] == 1.5


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive_draws_texts(lm: LM, parallel: bool) -> None:
    """Shapes; the distributions' own tests say what is drawn. Under no objective nothing is refused."""
    prior = jax.eval_shape(Predictive(nested(lm), num_samples=5, parallel=parallel), random.key(0))
    assert prior["middle"].shape == (5, 2, 3, 2)
    assert prior["ending"].shape == (5, 3, 2)
    samples = {"middle": jnp.zeros((7, 2, 3, 2), jnp.int32)}
    posterior = jax.eval_shape(Predictive(nested(lm), samples, parallel=parallel), random.key(0))
    assert posterior["ending"].shape == (7, 3, 2)


def test_a_plate_names_what_does_not_fit(lm: LM) -> None:
    def model() -> None:
        with numpyro.plate("rows", 2):
            numpyro.sample("middle", lm(["a", "b", "c"], max_tokens=2))

    with pytest.raises(ValueError, match="2"):
        handlers.seed(model, 0)()
    independent = lm(["a", "b"], max_tokens=2).to_event(1)
    assert jax.eval_shape(independent.log_prob, jnp.zeros((2, 2), jnp.int32)).shape == ()


# --- continuous latents -----------------------------------------------------------------------------


@pytest.mark.long
def test_nuts_finds_the_posterior_of_continuous_latents_of_a_text(lm: LM) -> None:
    """The temperature of a law, and the weight of one of two prompts, against a sum over a grid."""
    ending = lm.encode("cded")

    def model() -> None:
        heat = numpyro.sample("heat", dist.LogNormal(0.0, 0.5))
        weight = numpyro.sample("weight", dist.Normal(0.0, 2.0))
        law = lm(["e", "d"], temperature=heat)
        with numpyro.plate("prompts", 2):
            numpyro.sample("ending", law, obs=ending)
        first, second = law.log_prob(ending)
        mixed = jnp.logaddexp(jax.nn.log_sigmoid(weight) + first, jax.nn.log_sigmoid(-weight) + second)
        numpyro.factor("prompt", 6 * mixed)

    mcmc = MCMC(NUTS(model), num_warmup=150, num_samples=500, progress_bar=False)
    mcmc.run(random.key(0))
    samples = {name: np.asarray(values) for name, values in mcmc.get_samples().items()}
    logs, weights = np.meshgrid(np.linspace(-2.5, 3, 45), np.linspace(-8, 8, 45), indexing="ij")
    grid = {"heat": np.exp(logs).reshape(-1), "weight": weights.reshape(-1)}
    density = jax.jit(jax.vmap(lambda values: log_density(model, (), {}, values)[0]))(grid)
    log_p = np.asarray(density, np.float64) + logs.reshape(-1)  # the grid is one of log(heat)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    for name, prior in (("heat", np.exp(0.125)), ("weight", 0.0)):
        mean = (p * grid[name]).sum()
        std = ((p * grid[name] ** 2).sum() - mean**2) ** 0.5
        # 500 correlated draws are worth at least 100: four standard errors.
        assert abs(samples[name].mean() - mean) < 0.4 * std
        assert abs(mean - prior) > 0.5 * std, f"the mean of {name} is that of the prior, which proves nothing"
