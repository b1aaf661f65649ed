"""One particle of a guide, drawn and scored with the program; ``vmap`` makes it many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax, random
from numpyro import handlers
from numpyro.primitives import Messenger

from llmppl.numpyro.network.reading import sharing
from llmppl.numpyro.programs.tracing import (
    Program,
    Site,
    Trace,
    Values,
    common_axes,
    is_deterministic,
    is_latent,
    is_text,
    plate_nesting,
    plate_sizes,
    structure,
    subsampled,
)


class Layout(NamedTuple):
    """What the structure of a program and its guide says of their log-densities.

    :param nesting: batch dimensions that the plates take.
    :param axes: those (negative) whose rows are observations of their own.
    :param rows: how many rows those have.
    """

    nesting: int
    axes: tuple[int, ...]
    rows: tuple[int, ...]

    def sum_rows(self, log_prob: Array) -> Array:
        """A site's log-density, summed over all dimensions but :attr:`axes`, those outside of all plates included, of
        shape :attr:`rows`."""
        full = log_prob.reshape((1,) * (self.nesting - log_prob.ndim) + log_prob.shape)
        summed = tuple(dim for dim in range(-full.ndim, 0) if dim not in self.axes)
        return jnp.broadcast_to(full.sum(summed) if summed else full, self.rows)


def layout(model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """Where the rows of a program are.

    :raises ValueError: the guide misses a latent site, or has one that the model has not; a scaled site.
    """
    sites = structure(model, args, kwargs)
    proposed = structure(guide, args, kwargs)
    check_sites(sites, proposed)
    axes = common_axes(sites, proposed)
    sizes = plate_sizes(sites, proposed)
    return Layout(plate_nesting(sites), axes, tuple(sizes[dim] for dim in axes))


def hold_program(
    params: Mapping[str, Any], model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The parameters, without gradient those of the program. The guide's law may depend on them too: the temperature
    of a text is the program's."""
    theirs = {name for name, site in structure(model, args, kwargs).items() if site["type"] == "param"}
    return {name: lax.stop_gradient(value) if name in theirs else value for name, value in params.items()}


def choose_rows(key: Array, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values:
    """Which rows the plates that take some of theirs have in this step, by plate: the same for program and guide, and
    for all particles, which are compared as those of one observation."""
    found: Values = {}
    for number, run in enumerate((model, guide)):
        found.update(subsampled(structure(run, args, kwargs, random.fold_in(key, number))))
    return found


def check_sites(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuse a guide whose latent sites are not the model's.

    :raises ValueError: naming the sites.
    """
    latent = {name for name, site in model_trace.items() if is_latent(site)}
    guided = {name for name, site in guide_trace.items() if is_latent(site) and not site["infer"].get("is_auxiliary")}
    if latent - guided:
        raise ValueError(
            f"the guide does not sample the model's latent sites {sorted(latent - guided)}; it samples "
            f"{sorted(guided)}. Add them to the guide (a text guide takes a guide for other sites as others=)."
        )
    if guided - latent:
        raise ValueError(
            f"the guide samples {sorted(guided - latent)}, which the model does not have as latent "
            f"sites; it has {sorted(latent)}. Rename or remove them."
        )


class Particle(NamedTuple):
    """A particle after its scoring. All fields get a first dimension ``K`` under ``vmap``.

    :param log_p: log p(x, z), of shape ``rows``, nats.
    :param log_q: log q(z | x), same shape: as recorded while drawing, or with gradients.
    :param values: the latent values by site.
    :param token_log_p: of each latent text, log-probability of each token under the program, nats.
    :param token_log_q: the same under the guide.
    :param log_likelihood: of each observed site its log-density, of shape ``rows``.
    :param proposed: of each latent site log q, of shape ``rows``.
    :param terms: of each site of the program its log-density, of shape ``rows``.
    :param computed: the values of the program's deterministic sites.
    """

    log_p: Array
    log_q: Array
    values: Values
    token_log_p: dict[str, Array]
    token_log_q: dict[str, Array]
    log_likelihood: dict[str, Array]
    proposed: dict[str, Array]
    terms: dict[str, Array]
    computed: Values = {}


class Drawing(Messenger):
    """How a particle's latents come about, where not as the guide draws them.

    :param heat: an extra temperature for texts.
    :param given: values by site, ...
    :param taken: ... which count where this is true.
    """

    def __init__(self, heat: Array | float = 1.0, given: Values | None = None, taken: Array | bool = False) -> None:
        super().__init__()
        self.heat, self.given, self.taken = heat, given or {}, taken

    def process_message(self, msg: Site) -> None:
        if msg["type"] != "sample" or msg["is_observed"] or msg["value"] is not None:
            return
        key = msg["kwargs"]["rng_key"]
        drawn = msg["fn"].draw(key, heat=self.heat)[0] if is_text(msg) else msg["fn"].sample(key)
        if msg["name"] in self.given:
            drawn = jnp.where(self.taken, self.given[msg["name"]], drawn)
        msg["value"] = drawn


def draw(
    guide: Program,
    params: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    key: Array,
    drawing: Drawing | None = None,
) -> Trace:
    """A run of the guide."""
    seeded = handlers.substitute(handlers.seed(guide, key), data=params)
    with handlers.block(), handlers.trace() as trace, drawing or Messenger():
        seeded(*args, **kwargs)
    return dict(trace)


def given(
    program: Program, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], values: Values
) -> Trace:
    """A run of a program with values at all its latent sites."""
    with handlers.block(), handlers.trace() as trace:
        handlers.substitute(program, data={**params, **values})(*args, **kwargs)
    return dict(trace)


def run_particle(
    where: Layout,
    model: Program,
    guide: Program,
    params: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    key: Array,
    gradients: bool = False,
    drawing: Drawing | None = None,
    pathwise: bool = False,
) -> Particle:
    """Draw a particle and score it, each distinct stretch of text read once.

    :param gradients: score the guide by a pass of its own, through which gradients flow; the drawn values get none.
        Otherwise its log-probabilities are those recorded while drawing.
    :param drawing: where latents come from, if not from the guide as it is.
    :param pathwise: let gradients flow through the values of sites that are reparametrised.
    """
    with sharing():
        guide_trace = draw(guide, params, args, kwargs, key, drawing)
        values = {
            name: site["value"] if pathwise and site["fn"].has_rsample else lax.stop_gradient(site["value"])
            for name, site in guide_trace.items()
            if is_latent(site)
        }
        if gradients or drawing is not None:
            guide_trace = given(guide, params, args, kwargs, values)
        return score_particle(where, given(model, params, args, kwargs, values), guide_trace)


def score_particle(where: Layout, model_trace: Trace, guide_trace: Trace) -> Particle:
    """The log-densities of a particle's two runs."""
    log_p, token_log_p, model_terms = _scored(where, model_trace)
    log_q, token_log_q, guide_terms = _scored(where, guide_trace)
    likelihood = {name: term for name, term in model_terms.items() if model_trace[name]["is_observed"]}
    proposed = {name: term for name, term in guide_terms.items() if is_latent(guide_trace[name])}
    values = {name: site["value"] for name, site in model_trace.items() if is_latent(site)}
    computed = {name: jnp.asarray(site["value"]) for name, site in model_trace.items() if is_deterministic(site)}
    return Particle(log_p, log_q, values, token_log_p, token_log_q, likelihood, proposed, model_terms, computed)


def score_sites(where: Layout, trace: Trace) -> Array:
    """The log-density of a run, of shape ``rows``."""
    return _scored(where, trace)[0]


def _scored(where: Layout, trace: Trace) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    total: Any = jnp.zeros(where.rows)
    tokens, terms = {}, {}
    for name, site in trace.items():
        if site["type"] != "sample":
            continue
        fn, value = site["fn"], site["value"]
        if is_text(site) and hasattr(fn, "token_log_prob"):
            scores = site["intermediates"][0] if site["intermediates"] else fn.token_log_prob(value)
            log_prob = scores.sum(-1)
            if is_latent(site):
                tokens[name] = scores
        else:
            log_prob = fn.log_prob(value)
        if site["scale"] is not None:
            log_prob = log_prob * site["scale"]
        terms[name] = where.sum_rows(log_prob)
        total = total + terms[name]
    return total, tokens, terms
