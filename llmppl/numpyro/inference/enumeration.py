"""The exact posterior of a small program, by enumeration in compiled blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.primitives import Messenger
from tqdm.auto import tqdm

from llmppl.inference.posterior import Posterior
from llmppl.numpyro.distributions.autoregressive import AutoregressiveText
from llmppl.numpyro.inference.arguments import Compiled, language_model
from llmppl.numpyro.inference.gathering import Gathering, blame, check_unscaled, faulty
from llmppl.numpyro.lifting import jit
from llmppl.numpyro.particles import Layout, Particle, given, score_particle
from llmppl.numpyro.reading import sharing
from llmppl.numpyro.text import is_concrete
from llmppl.numpyro.tracing import (
    Program,
    Site,
    Trace,
    common_axes,
    is_latent,
    plate_nesting,
    plate_sizes,
    structure,
)

LARGEST = 1_000_000
"""Most combinations of a program whose structure does not depend on sampled values."""

MOST_RUNS = 20_000
"""Most runs of a program whose structure does."""

BLOCK = 1024
"""Combinations that are scored together."""

FAILURES = (TypeError, ValueError, IndexError, NotImplementedError)
"""What a program raises that is run with values it was not written for; values that are being traced among them."""

Supports = dict[str, np.ndarray]


class _Dynamic(Exception):
    """The program cannot be enumerated in one piece, and why."""


def exact_posterior(model: Program, *args: Any, **kwargs: Any) -> Posterior:
    r"""The exact posterior: the joint at every combination of the latent sites' values.

    For programs whose latent sites enumerate: choices, small text supports (with stop, lengths, ``allowed``),
    discrete NumPyro sites; any number of them. Rows of plates that contain every site are observations of their
    own. A latent in any other plate has a value for each entry, and all :math:`n^{\text{size}}` of them are
    enumerated.

    Which sites there are, and what values they may have, may depend on earlier values. Where the program cannot be
    compiled for all combinations at once, for it looks at sampled values, it is run once for each. A site that only
    some combinations have is padding (a text) or NaN (a number) in the others.

    :returns: a posterior with one sample for each combination; :attr:`Posterior.log_evidence` is exact.
    :raises ValueError: a site that does not enumerate, more than a million combinations, more than 20 000 of
        a program that is run for each, plates that depend on sampled values, or log-probabilities that are NaN.
    """
    sites = structure(model, args, kwargs)
    where = _layout(sites)
    latent = {name: site for name, site in sites.items() if is_latent(site)}
    if not latent:
        raise ValueError("the model has no latent site to enumerate. Leave obs= out at one.")
    check_unscaled(sites)
    try:
        gathering = _at_once(model, args, kwargs, sites, latent, where)
    except _Dynamic as reason:
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
    sizes = [_size(name, site, where) for name, site in latent.items()]
    size = math.prod(sizes)
    if size > LARGEST:
        listed = ", ".join(f"{name}: {count:,}" for name, count in zip(latent, sizes, strict=True))
        raise ValueError(
            f"the latent sites have {size:,} combinations ({listed}); at most {LARGEST:,} can be enumerated. "
            "Lower max_tokens, restrict allowed=, or use importance()."
        )
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
        if list(found) != list(latent):
            raise _Dynamic(f"its latent sites are {list(latent)} for some values, {list(found)} for others")
        for name, site in found.items():
            if not _same_support(name, site, latent[name]):
                raise _Dynamic(f"the support of site {name!r} depends on earlier values")
        return 0

    ends = {name: jnp.asarray(support[[0, -1]]) for name, support in supports.items()}
    try:
        jax.vmap(look, out_axes=None)(ends)
    except FAILURES as error:
        reason = str(error).strip().splitlines()[0]
        raise _Dynamic(f"run for all combinations at once it fails: {reason}") from error


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

    class Reached(Exception):
        def __init__(self, site: Site) -> None:
            super().__init__()
            self.site = site

    def process_message(self, msg: Site) -> None:
        if is_latent(msg) and msg["value"] is None:
            raise _Prefix.Reached(dict(msg))


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
            fns = {name: site["fn"] for name, site in kept.items()}
            values = {name: site["value"] for name, site in kept.items()}
            kind = tuple((name, site["is_observed"]) for name, site in kept.items())
            particles = variants.setdefault(kind, jit(score))(fns, values)
            particles = jax.tree.map(lambda leaf: np.asarray(leaf)[None], particles)
            _check(particles, model, args, kwargs, number)
            own = Gathering(where, kept)
            own.add(particles, 1)
            if gathering is None:
                gathering = own
            else:
                gathering.parts += own.parts
                gathering.decoders.update(own.decoders)
                for name, text in own.observed.items():
                    gathering.observed.setdefault(name, text)
            bar.update()
    assert gathering is not None  # a program with a latent has a value of it
    return gathering


def _complete_runs(
    model: Program, args: tuple[Any, ...], kwargs: dict[str, Any], where: Layout, reason: str
) -> Iterator[Trace]:
    """A trace for each combination, depth first: with its first sites fixed the program says what comes next."""
    waiting: list[dict[str, Any]] = [{}]
    runs = 0
    while waiting:
        values = waiting.pop()
        runs += 1
        if runs + len(waiting) > MOST_RUNS:
            raise ValueError(
                f"the program must be run for each combination of values, because {reason}; that takes more than "
                f"{MOST_RUNS:,} runs. Lower max_tokens, write the program so that it does the same for every value, "
                "or use importance()."
            )
        try:
            # The prefix is the outer handler, and sees what substitution has left open.
            with handlers.block(), handlers.trace() as trace, _Prefix(), handlers.substitute(data=values):
                model(*args, **kwargs)
        except _Prefix.Reached as reached:
            name = reached.site["name"]
            support = _support(name, reached.site, where)
            waiting += [{**values, name: jnp.asarray(value)} for value in support[::-1]]
            continue
        if common_axes(trace) != where.axes or plate_nesting(trace) > where.nesting:
            raise ValueError(
                "the program's plates depend on sampled values, so that its rows are no fixed set of observations. "
                "Use importance()."
            )
        yield dict(trace)


# --- supports ------------------------------------------------------------------------------------


def _entries(site: Site, where: Layout) -> dict[int, int]:
    """The plates that hold a site but not every site: their dimensions and sizes."""
    frames = site["cond_indep_stack"]
    return {frame.dim: frame.size for frame in frames if frame.dim not in where.axes and frame.size > 1}


def _size(name: str, site: Site, where: Layout) -> int:
    fn = site["fn"]
    if isinstance(fn, AutoregressiveText) and fn.law.support_size() > LARGEST:
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
    if len(values) ** count > LARGEST:
        raise ValueError(
            f"latent site {name!r} stands in a plate of {count} entries that does not contain every site: its "
            f"{len(values):,} values make {len(values):,}^{count} combinations, and at most {LARGEST:,} can be "
            "enumerated. Use importance()."
        )
    index = np.asarray(list(itertools.product(range(len(values)), repeat=count)), dtype=np.int64)
    return values[index].reshape(-1, *plates, *values.shape[1:])


def _own_support(name: str, site: Site) -> Any:
    """The values of one entry, ``(n,) + event_shape``."""
    fn = site["fn"]
    refusal = f"latent site {name!r} ({type(fn).__name__}) cannot be enumerated. Use importance(), or condition on it."
    if not isinstance(fn, AutoregressiveText) and not fn.has_enumerate_support:
        raise ValueError(refusal)
    try:
        values = fn.enumerate_support(expand=False)
    except ValueError as error:
        raise ValueError(f"latent site {name!r}: {error}") from None
    except NotImplementedError as error:
        raise ValueError(f"{refusal} ({error})") from None
    return values.reshape(values.shape[:1] + fn.event_shape)
