"""The exact posterior of a small program, by enumeration in compiled blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.primitives import Messenger
from tqdm.auto import tqdm

from llmppl.numpyro.distributions.autoregressive_text import AutoregressiveText
from llmppl.numpyro.inference.arguments import Compiled, language_model
from llmppl.numpyro.inference.gathering import Gathering, blame, check_unmasked, check_unscaled, faulty
from llmppl.numpyro.network.lifting import jit
from llmppl.numpyro.network.reading import sharing
from llmppl.numpyro.network.text_arrays import is_concrete
from llmppl.numpyro.programs.particles import Layout, Particle, given, score_particle
from llmppl.numpyro.programs.tracing import (
    Program,
    Site,
    Trace,
    common_axes,
    is_deterministic,
    is_latent,
    plate_nesting,
    plate_sizes,
    structure,
)
from llmppl.posterior.combinations import (
    LARGEST,
    SiteReached,
    StructureVaries,
    check_latents,
    check_sites,
    depth_first,
    entries_of_a_plate,
    number_of_combinations,
    own_support,
    plates_vary,
    support_varies,
)
from llmppl.posterior.posterior import Posterior
from llmppl.text.arguments import check_programs
from llmppl.text.declared import declared

BLOCK = 1024
"""Combinations that are scored together."""

FAILURES = (TypeError, ValueError, IndexError, NotImplementedError)
"""What a program raises that is run with values it was not written for; values that are being traced among them."""

Supports = dict[str, np.ndarray]


@declared
def exact_posterior(model: Program) -> Callable[..., Posterior]:
    r"""The exact posterior: a function of the program's arguments, the joint at every combination of its latents.

    For programs whose latent sites enumerate: choices, small text supports (with stop, lengths, ``allowed``),
    discrete NumPyro sites; any number of them. Rows of plates that contain every site are observations of their
    own. A latent in any other plate has a value for each entry, and all :math:`n^{\text{size}}` of them are
    enumerated.

    Which sites there are, and what values they may have, may depend on earlier values. Where the program cannot be
    compiled for all combinations at once, for it looks at sampled values, it is run once for each. A site that only
    some combinations have is padding (a text) or NaN (a number) in the others.

    The posterior has one sample for each combination, and its log evidence is exact.

    :raises ValueError: a site that does not enumerate, more than a million combinations, more than 20 000 of
        a program that is run for each, plates that depend on sampled values, or log-probabilities that are NaN.
    """
    check_programs(model=model)

    def run(*args: Any, **kwargs: Any) -> Posterior:
        return _enumerated(model, args, kwargs)

    return run


def _enumerated(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Posterior:
    sites = structure(model, args, kwargs)
    where = _layout(sites)
    latent = {name: site for name, site in sites.items() if is_latent(site)}
    check_latents(latent)
    check_unscaled(sites)
    check_unmasked(sites, "exact_posterior")
    try:
        gathering = _at_once(model, args, kwargs, sites, latent, where)
    except StructureVaries as reason:
        gathering = _one_by_one(model, args, kwargs, where, str(reason))
    return gathering.posterior("enumeration", "marginal")


def _layout(sites: Trace) -> Layout:
    axes, sizes = common_axes(sites), plate_sizes(sites)
    return Layout(plate_nesting(sites), axes, tuple(sizes[dim] for dim in axes))


# --- a program whose structure does not depend on values: all combinations as particles ----------


def _at_once(
    model: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sites: Trace,
    latent: dict[str, Site],
    where: Layout,
) -> Gathering:
    # Sizes first: a support of a plate's entries is a product, and must not be built if it is too large.
    size = number_of_combinations({name: _size(name, site, where) for name, site in latent.items()})
    supports = {name: _support(name, site, where) for name, site in latent.items()}
    _check_supports(model, args, kwargs, latent, supports)

    def block(values: Any, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Particle:
        def score(own: dict[str, Array]) -> Particle:
            with sharing():
                return _scored(where, given(model, params, args, kwargs, own))

        return jax.vmap(score)(values)

    compiled = Compiled(block)
    gathering = Gathering(where, sites)
    lm = language_model(model, sites)
    shape = tuple(len(support) for support in supports.values())
    width = min(BLOCK, size)
    with tqdm(total=size, desc="enumeration", delay=5, leave=False) as bar:
        for start in range(0, size, width):
            count = min(width, size - start)
            # Blocks of one size compile once; what is too much is scored again and left out.
            index = np.unravel_index(np.minimum(np.arange(start, start + width), size - 1), shape)
            values = {
                name: jnp.asarray(support[place])
                for (name, support), place in zip(supports.items(), index, strict=True)
            }
            particles = compiled(values, {}, args, kwargs, lm)
            _check(particles, model, args, kwargs, start)
            gathering.add(jax.tree.map(np.asarray, particles), count)
            bar.update(count)
    return gathering


def _check_supports(
    model: Program, args: tuple[Any, ...], kwargs: dict[str, Any], latent: dict[str, Site], supports: Supports
) -> None:
    """Whether sites and supports are the same whatever the values. Under ``vmap`` a program that looks at its sampled
    values fails, and what does not depend on them stays a known number."""

    def look(values: dict[str, Array]) -> int:
        trace = given(model, {}, args, kwargs, values)
        found = {name: site for name, site in trace.items() if is_latent(site) or name in latent}
        check_sites(list(found), list(latent))
        for name, site in found.items():
            if not _same_support(name, site, latent[name]):
                raise support_varies(name)
        return 0

    ends = {name: jnp.asarray(support[[0, -1]]) for name, support in supports.items()}
    try:
        jax.vmap(look, out_axes=None)(ends)
    except FAILURES as error:
        reason = str(error).strip().splitlines()[0]
        raise StructureVaries(f"run for all combinations at once it fails: {reason}") from error


def _same_support(name: str, site: Site, other: Site) -> bool:
    values = _own_support(name, site)
    if not is_concrete(values):
        return False
    return np.array_equal(np.asarray(values), np.asarray(_own_support(name, other)))


def _scored(where: Layout, trace: Trace) -> Particle:
    return score_particle(where, trace, {})


def _check(particles: Particle, model: Program, args: tuple[Any, ...], kwargs: dict[str, Any], start: int) -> None:
    if (bad := faulty(particles)) is not None:
        values = {name: value[bad] for name, value in particles.values.items()}
        raise blame((model,), {}, args, kwargs, values, start + bad)


# --- a program whose structure depends on values: one run for each combination -------------------


class _Prefix(Messenger):
    """Ends the run at the first latent site that has no value."""

    def process_message(self, msg: Site) -> None:
        if is_latent(msg) and msg["value"] is None:
            raise SiteReached(dict(msg))


def _one_by_one(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any], where: Layout, reason: str) -> Gathering:
    gathering: Gathering | None = None

    # Distributions are pytrees, so that runs of one structure share what is compiled.
    def score(fns: dict[str, Any], values: dict[str, Any]) -> Particle:
        trace = {name: {**kept[name], "fn": fns[name], "value": values[name], "intermediates": []} for name in fns}
        return _scored(where, trace)

    variants: dict[Any, Any] = {}
    with tqdm(desc="enumeration, one by one", delay=5, leave=False) as bar:
        for number, trace in enumerate(_complete_runs(model, args, kwargs, where, reason)):
            kept = {name: site for name, site in trace.items() if site["type"] == "sample"}
            check_unscaled(kept)
            check_unmasked(kept, "exact_posterior")
            fns = {name: site["fn"] for name, site in kept.items()}
            values = {name: site["value"] for name, site in kept.items()}
            kind = tuple((name, site["is_observed"]) for name, site in kept.items())
            particles = variants.setdefault(kind, jit(score))(fns, values)
            computed = {name: site["value"] for name, site in trace.items() if is_deterministic(site)}
            particles = jax.tree.map(lambda leaf: np.asarray(leaf)[None], particles._replace(computed=computed))
            _check(particles, model, args, kwargs, number)
            own = Gathering(where, trace)
            own.add(particles, 1)
            if gathering is None:
                gathering = own
            else:
                gathering.parts += own.parts
                gathering.decoders.update(own.decoders)
                gathering.deterministic = tuple(dict.fromkeys((*gathering.deterministic, *own.deterministic)))
                for name, text in own.observed.items():
                    gathering.observed.setdefault(name, text)
            bar.update()
    assert gathering is not None  # a program with a latent has a value of it
    return gathering


def _complete_runs(
    model: Program, args: tuple[Any, ...], kwargs: dict[str, Any], where: Layout, reason: str
) -> Iterator[Trace]:
    """A trace for each combination."""

    def run(values: dict[str, Any]) -> Trace:
        # The prefix is the outer handler, and sees what substitution has left open.
        with handlers.block(), handlers.trace() as trace, _Prefix(), handlers.substitute(data=values):
            model(*args, **kwargs)
        if common_axes(trace) != where.axes or plate_nesting(trace) > where.nesting:
            raise plates_vary()
        return dict(trace)

    return depth_first(run, lambda name, site: jnp.asarray(_support(name, site, where)), reason)


# --- supports ------------------------------------------------------------------------------------


def _entries(site: Site, where: Layout) -> dict[int, int]:
    """The plates that hold a site but not every site: their dimensions and sizes. Rows of its law outside of all
    plates are no others."""
    shape = site["fn"].batch_shape
    sizes = {dim - len(shape): size for dim, size in enumerate(shape)}
    sizes |= {frame.dim: frame.size for frame in site["cond_indep_stack"]}
    return {dim: size for dim, size in sizes.items() if dim not in where.axes and size > 1}


def _size(name: str, site: Site, where: Layout) -> int:
    fn = site["fn"]
    # A grammar's texts are few or too many, which enumerating them shows.
    if isinstance(fn, AutoregressiveText) and fn.law.grammar is None and fn.law.support_size() > LARGEST:
        count = fn.law.support_size()
        if math.isinf(count):
            _own_support(name, site)  # says why
    else:
        count = len(_own_support(name, site))
    return int(count) ** math.prod(_entries(site, where).values())


def _support(name: str, site: Site, where: Layout) -> np.ndarray:
    """Every value of a site, ``(n,) + (1 or plate size,) * batch dimensions of the site + event_shape``."""
    values = np.asarray(_own_support(name, site))
    entries = _entries(site, where)
    nesting = max([len(site["fn"].batch_shape), *(-dim for dim in entries)])
    plates = [entries.get(dim, 1) for dim in range(-nesting, 0)]
    count = math.prod(plates)
    index = entries_of_a_plate(name, len(values), count)
    return values[index].reshape(-1, *plates, *values.shape[1:])


def _own_support(name: str, site: Site) -> Any:
    fn = site["fn"]
    return own_support(name, fn, isinstance(fn, AutoregressiveText) or fn.has_enumerate_support)
