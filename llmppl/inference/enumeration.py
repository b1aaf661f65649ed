"""The exact posterior of a small program, by enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from tqdm.auto import tqdm

from llmppl.distributions.conditioned_text import score_together
from llmppl.distributions.process_text import ProcessText
from llmppl.inference.gathering import Gathering, check_unmasked, check_unscaled, of_observations
from llmppl.network.text_law import TextLaw
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
from llmppl.programs.observations import Given
from llmppl.programs.particles import Particles, check_finite, common_axes, compute_log_prob, sum_sites
from llmppl.programs.plates import in_particles
from llmppl.programs.structure import Program, Site, is_latent, is_text, plate_nesting, structure
from llmppl.text.arguments import check_programs
from llmppl.text.declared import declared

BLOCK = 4096
RUNS = 128
"""Runs that are scored together."""

CHECKED = 16
"""Combinations at which the vectorised program is compared with the program run by itself."""

FAILURES = (RuntimeError, TypeError, ValueError, IndexError)
"""What a program raises that is run with values it was not written for."""

Values = dict[str, Tensor]


@declared
def exact_posterior(model: Program) -> Callable[..., Posterior]:
    r"""The exact posterior: a function of the program's arguments, the joint at every combination of its latents.

    For programs whose latent sites enumerate: choices, small text supports (with stop, lengths, grammar),
    discrete Pyro sites; any number of them. Rows of plates that contain every site are observations of their
    own. A latent in any other plate has a value for each entry, and all :math:`n^{\text{size}}` of them are
    enumerated.

    Which sites there are, and what values they may have, may depend on earlier values. Where the program, run
    for all combinations at once, does not do what it does run alone, it is run once for each
    combination. A site that only some combinations have is padding (a text) or NaN (a number) in
    the others. Whether it does is seen at sites and supports, and by comparing the joint at 16 combinations
    that are spread over the values of each site.

    The posterior has one sample for each combination, and its log evidence is exact.

    :raises ValueError: a site that does not enumerate, more than a million combinations, more than 20 000 of
        a program that is run for each, or plates that depend on sampled values.
    """
    check_programs(model=model)

    def run(*args: Any, **kwargs: Any) -> Posterior:
        return of_observations(_enumerated(model, args, kwargs), model, args, kwargs, data_plate=False)

    return run


def _enumerated(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Posterior:
    trace = structure(model, args, kwargs)
    nesting, axes = plate_nesting(trace), common_axes(trace)
    latent = {name: site for name, site in trace.nodes.items() if is_latent(site)}
    check_latents(latent)
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and getattr(site["fn"], "exactness", "marginal") != "marginal":
            raise ValueError(
                f"site {name!r} has no single log-probability a value: that of a random unmasking order is conditional "
                "on the order. Use order='confidence', 'margin', 'entropy' or 'left-to-right', or importance()."
            )
    with torch.no_grad():
        try:
            gathering = _at_once(model, args, kwargs, latent, nesting, axes)
        except StructureVaries as reason:
            gathering = _one_by_one(model, args, kwargs, nesting, axes, str(reason))
    return gathering.posterior("enumeration", "marginal")


# --- a program whose structure does not depend on values: all combinations as particles ----------


def _at_once(
    model: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    latent: dict[str, Site],
    nesting: int,
    axes: tuple[int, ...],
) -> Gathering:
    # Sizes first: a support of a plate's entries is a product, and must not be built if it is too large.
    size = number_of_combinations({name: _size(name, site, axes) for name, site in latent.items()})
    supports = {name: _support(name, site, axes, nesting) for name, site in latent.items()}
    spread = _spread([len(support) for support in supports.values()])
    alone = []
    for index in spread:
        values = {name: support[i] for (name, support), i in zip(supports.items(), index, strict=True)}
        try:
            alone.append(_run(model, args, kwargs, values, nesting, axes))
        except SiteReached as reached:
            raise StructureVaries(f"it has a site {reached.site['name']!r} for some values only") from None
        except FAILURES as error:
            # Perhaps the value is of another branch's support. If not, the run one by one fails likewise.
            raise StructureVaries(f"it fails at some values: {error}") from error
        _check_structure(alone[-1], latent)
    log_p = torch.stack([p.log_p[0] for p in _scored(alone, axes, nesting)])
    together = _particles(model, args, kwargs, supports, torch.tensor(spread), latent, nesting, axes)
    _compare(log_p, together.log_p)

    gathering = Gathering()
    combinations = itertools.product(*(range(len(support)) for support in supports.values()))
    with tqdm(total=size, desc="enumeration", delay=5, leave=False) as bar:
        while block := list(itertools.islice(combinations, BLOCK)):
            gathering.add(_particles(model, args, kwargs, supports, torch.tensor(block), latent, nesting, axes))
            bar.update(len(block))
    return gathering


def _spread(sizes: list[int]) -> list[tuple[int, ...]]:
    """Some combinations that visit every value of small supports, and the sites' values not in step."""
    count = min(math.prod(sizes), CHECKED)
    if count == math.prod(sizes):
        return list(itertools.product(*map(range, sizes)))
    strides = [1 + 2 * place for place in range(len(sizes))]
    return [
        tuple(
            (n * stride + place) % size if size <= count else (n * stride % count) * (size - 1) // (count - 1)
            for place, (size, stride) in enumerate(zip(sizes, strides, strict=True))
        )
        for n in range(count)
    ]


def _particles(
    model: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    supports: Values,
    index: Tensor,
    latent: dict[str, Site],
    nesting: int,
    axes: tuple[int, ...],
) -> Particles:
    """The combinations of ``index``, ``(n, sites)``, as particles."""
    values = {
        name: support[column.to(support.device)]
        for (name, support), column in zip(supports.items(), index.T, strict=True)
    }
    try:
        with poutine.block(), Given(values):
            trace = poutine.trace(in_particles(model, len(index), nesting)).get_trace(*args, **kwargs)
    except FAILURES as error:
        # E.g. an `if` on a sampled value. Run one by one the program may still do; if not, it says so there.
        raise StructureVaries(f"run for all combinations at once it fails: {error}") from error
    _check_structure(trace, latent)
    compute_log_prob(trace)
    return _summed(trace, axes, nesting, len(index))


def _check_structure(trace: poutine.Trace, latent: dict[str, Site]) -> None:
    found = {name: site for name, site in trace.nodes.items() if is_latent(site)}
    check_sites(list(found), list(latent))
    for name, site in found.items():
        if not _same_support(site["fn"], latent[name]["fn"]):
            raise support_varies(name)


def _same_support(fn: Any, other: Any) -> bool:
    if isinstance(fn, ProcessText) and isinstance(other, ProcessText):
        return _same_law(fn.law, other.law)
    try:
        values, others = (f.enumerate_support(expand=False).reshape((-1, *f.event_shape)) for f in (fn, other))
    except (NotImplementedError, ValueError):
        return False  # a support that differs between rows
    return values.shape == others.shape and torch.equal(values, others)


def _same_law(law: TextLaw, other: TextLaw) -> bool:
    if (law.max_tokens, law.min_tokens) != (other.max_tokens, other.min_tokens):
        return False
    if (law.allowed is None) != (other.allowed is None) or (law.grammar is None) != (other.grammar is None):
        return False
    if law.grammar and other.grammar and law.grammar.grammar.source != other.grammar.grammar.source:
        return False
    same = torch.equal(law.stop, other.stop) and law.automaton is other.automaton
    return same and (law.allowed is None or other.allowed is None or torch.equal(law.allowed, other.allowed))


def _compare(alone: Tensor, together: Tensor) -> None:
    """Refuse a joint of the vectorised program that is not that of the program run by itself."""
    # Shared prefixes change a float32 score in its last digits; a wrong branch changes it at once.
    tolerance = (1e-6 if alone.dtype == torch.float64 else 5e-3) * (1 + alone.abs())
    differs = (alone != together) & ~((alone - together).abs() <= tolerance)
    if bool(differs.any()):
        row = tuple(differs.nonzero()[0].tolist())
        raise StructureVaries(
            f"its joint at one combination is {alone[row].item():.6g} nats run alone and {together[row].item():.6g} "
            "run with others"
        )


# --- a program whose structure depends on values: one run for each combination -------------------


class _Prefix(Messenger):
    """Fixes the first latent sites and ends the run at the first that is not fixed."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if is_latent(msg) and not msg["done"]:
            raise SiteReached(dict(msg))


def _one_by_one(
    model: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    nesting: int,
    axes: tuple[int, ...],
    reason: str,
) -> Gathering:
    gathering = Gathering()
    runs = _complete_runs(model, args, kwargs, nesting, axes, reason)
    with tqdm(desc="enumeration, one by one", delay=5, leave=False) as bar:
        while traces := list(itertools.islice(runs, RUNS)):
            for particles in _scored(traces, axes, nesting):
                gathering.add(particles)
            bar.update(len(traces))
    return gathering


def _complete_runs(
    model: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    nesting: int,
    axes: tuple[int, ...],
    reason: str,
) -> Iterator[poutine.Trace]:
    """A trace for each combination."""
    return depth_first(
        lambda values: _run(model, args, kwargs, values, nesting, axes),
        lambda name, site: _support(name, site, axes, nesting),
        reason,
    )


def _run(
    model: Program, args: tuple[Any, ...], kwargs: dict[str, Any], values: Values, nesting: int, axes: tuple[int, ...]
) -> poutine.Trace:
    """The program run by itself at given values, not scored."""
    # Given is the inner handler: what it has fixed _Prefix lets pass.
    with poutine.block(), _Prefix(values), Given(values):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    if common_axes(trace) != axes or plate_nesting(trace) > nesting:
        raise plates_vary()
    return trace


def _scored(traces: Sequence[poutine.Trace], axes: tuple[int, ...], nesting: int) -> list[Particles]:
    """One particle of each trace, the texts of all of them scored in one pass."""
    waiting = [
        (site["fn"], site["fn"].pending(site["value"]))
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "sample" and is_text(site)
    ]
    score_together(waiting)
    for trace in traces:
        trace.compute_log_prob()
    return [_summed(trace, axes, nesting, 1) for trace in traces]


def _summed(trace: poutine.Trace, axes: tuple[int, ...], nesting: int, count: int) -> Particles:
    check_finite(trace, allow_zero=True)
    log_p = sum_sites(trace, axes, nesting, count)
    particles = Particles(log_p, torch.zeros_like(log_p), trace, poutine.Trace(), axes, nesting)
    check_unscaled(particles)
    check_unmasked(particles, "exact_posterior")
    return particles


# --- supports ------------------------------------------------------------------------------------


def _entries(site: Site, axes: tuple[int, ...]) -> dict[int, int]:
    """The plates that hold a site but not every site: their dimensions and sizes."""
    return {
        frame.dim: frame.size
        for frame in site["cond_indep_stack"]
        if frame.vectorized and frame.dim is not None and frame.dim not in axes and frame.size > 1
    }


def _size(name: str, site: Site, axes: tuple[int, ...]) -> int:
    fn = site["fn"]
    # An upper bound will do for a grammar's texts, which are few or too many.
    if isinstance(fn, ProcessText) and fn.law.grammar is None:
        one = fn.law.support_size()
        count = int(one) if one <= LARGEST else len(_own_support(name, site))
    else:
        count = len(_own_support(name, site))
    return int(count ** math.prod(_entries(site, axes).values()))


def _support(name: str, site: Site, axes: tuple[int, ...], nesting: int) -> Tensor:
    """Every value of a site, ``(n,) + (1 or plate size,) * nesting + event_shape``."""
    values = _own_support(name, site)
    event = values.shape[1:]
    entries = _entries(site, axes)
    plates = [entries.get(dim, 1) for dim in range(-nesting, 0)]
    count = math.prod(plates)
    index = torch.from_numpy(entries_of_a_plate(name, len(values), count))
    return values[index.to(values.device)].reshape(-1, *plates, *event)


def _own_support(name: str, site: Site) -> Tensor:
    return own_support(name, site["fn"], site["fn"].has_enumerate_support)
