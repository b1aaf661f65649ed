"""What a posterior keeps of the particles of several compiled blocks: numbers, not arrays of a device."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.primitives import Messenger

from llmppl.numpyro.distributions.autoregressive_text import AutoregressiveText
from llmppl.numpyro.distributions.derived_text import DerivedText
from llmppl.numpyro.network.row_map import decoder_of
from llmppl.numpyro.programs.particles import Layout, Particle
from llmppl.numpyro.programs.tracing import (
    Program,
    Site,
    Trace,
    Values,
    is_deterministic,
    is_latent,
    is_observation,
    is_text,
    plate_nesting,
    plate_sizes,
)
from llmppl.posterior.columns import Columns, inner_plates
from llmppl.text.text_support import dead_end


class Gathering(Columns):
    """Particles of any number of compiled blocks.

    :param where: the program's rows.
    :param sites: the structure of the program ...
    :param proposed: ... and of its guide, where there is one.
    """

    def __init__(self, where: Layout, sites: Trace, proposed: Trace | None = None) -> None:
        super().__init__()
        self.where = where
        self.events = {name: site["fn"].event_dim for name, site in sites.items() if is_latent(site)}
        self.factors = {name for name, site in sites.items() if site["type"] == "sample" and _is_factor(site["fn"])}
        for name, site in sites.items():
            if site["type"] == "sample" and is_text(site):
                self.decoders[name] = site["fn"].lm.decode
        self.observed = observed_values(sites, where)
        self.plates, self.dims = plate_names(sites, where)
        self.computed = computed_events(sites)
        self.deterministic = tuple(self.computed)
        self.decoders.update(computed_decoders(sites))
        self.masked = tuple(name for name in self.events if proposed and masks(proposed.get(name), sites[name]))

    def add(self, particles: Particle, count: int) -> dict[str, Any]:
        """Take the numbers of the first ``count`` particles of a block.

        :returns: the part that was added.
        """
        part = {
            "count": count,
            "samples": {
                name: self._laid_out(values[name][:count], event, name)
                for values, events in ((particles.values, self.events), (particles.computed, self.computed))
                for name, event in events.items()
            },
            "log_p": _numpy(particles.log_p[:count]),
            "log_q": _numpy(particles.log_q[:count]),
            "token_log_p": {n: self._laid_out(v[:count], 1) for n, v in particles.token_log_p.items()},
            "token_log_q": {
                n: self._laid_out(v[:count], 1) for n, v in particles.token_log_q.items() if n in self.events
            },
            "log_likelihood": {
                n: _numpy(v[:count]) for n, v in particles.log_likelihood.items() if n not in self.factors
            },
        }
        self.parts.append(part)
        return part

    def _laid_out(self, values: Array, event: int, name: str = "") -> np.ndarray:
        value = laid_out(values, self.where, event)
        return value.astype(np.int64) if name in self.decoders else value


def observed_values(sites: Trace, where: Layout) -> dict[str, np.ndarray]:
    """What a program observes, by site, as rows, inner plates and event; texts of no inner plate as they are."""
    found, inner = {}, plate_names(sites, where)[1]
    for name, site in sites.items():
        if is_observation(site):
            value = np.asarray(site["value"])
            if not is_text(site) or value.ndim > 1 + len(where.rows) or inner[name]:
                value = laid_out(jnp.asarray(value)[None], where, site["fn"].event_dim)[0]
            found[name] = value.astype(np.int64) if is_text(site) else value
    return found


def plate_names(sites: Trace, where: Layout) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Names of the plates that a program's rows are, and by site of those behind the rows."""
    known = {name: {f.dim: f.name for f in site.get("cond_indep_stack", ())} for name, site in sites.items()}
    anywhere = {dim: plate for names in known.values() for dim, plate in names.items()}
    computed, dims = computed_events(sites), {}
    for name, site in sites.items():
        if site["type"] == "sample" or name in computed:
            event = computed[name] if name in computed else site["fn"].event_dim
            names = anywhere | known[name]
            dims[name] = inner_plates(np.shape(site["value"]), event, where.axes, where.nesting, names)
    return tuple(anywhere[dim] for dim in where.axes), dims


def computed_events(sites: Trace) -> dict[str, int]:
    """Event dimensions of each deterministic site: what does not belong to the plates, and the tokens of a text in any
    case.

    :param sites: a program's structure.
    """
    sizes, found = plate_sizes(sites), {}
    for name, site in sites.items():
        if not is_deterministic(site):
            continue
        shape = np.shape(site["value"])
        event = 0 if decoder_of(site["value"]) is None else 1
        while not _fits(shape[: len(shape) - event], sizes, plate_nesting(sites)):
            event += 1
        found[name] = event
    return found


def _fits(batch: tuple[int, ...], sizes: dict[int, int], nesting: int) -> bool:
    return len(batch) <= nesting and all(n in (1, sizes.get(d - len(batch))) for d, n in enumerate(batch))


def computed_decoders(sites: Trace) -> dict[str, Any]:
    """Of the deterministic sites that are texts made by ``lm.map``."""
    decoders = {name: decoder_of(site["value"]) for name, site in sites.items() if is_deterministic(site)}
    return {name: decoder for name, decoder in decoders.items() if decoder is not None}


def laid_out(values: Array, where: Layout, event: int) -> np.ndarray:
    """Particles' values of a site, ``(K,)``, plates, event, as ``(K,) + rows + inner plates + event``; inner plates of
    size one fall away."""
    nesting, axes, rows = where
    value = np.asarray(values)
    missing = 1 + nesting - (value.ndim - event)
    value = value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])
    inner = [dim for dim in range(1, 1 + nesting) if dim - 1 - nesting not in axes]
    outer = [dim for dim in range(1, 1 + nesting) if dim not in inner]
    value = value.transpose(0, *outer, *inner, *range(1 + nesting, value.ndim))
    value = np.broadcast_to(value, (len(value), *rows, *value.shape[1 + len(outer) :]))
    single = tuple(1 + len(outer) + n for n in range(len(inner)) if value.shape[1 + len(outer) + n] == 1)
    return value.squeeze(single).copy()


def check_unscaled(*traces: Trace) -> None:
    """Refuse scaled sites: their weights are not those of the program.

    :raises ValueError: naming the site.
    """
    for trace in traces:
        for name, site in trace.items():
            if site["type"] == "sample" and site["scale"] is not None and not np.all(np.asarray(site["scale"]) == 1):
                raise ValueError(
                    f"site {name!r} is scaled (by handlers.scale or a subsampled plate), so its weights are not those "
                    "of the program. Run inference without scaling or subsampling."
                )


def check_unmasked(trace: Trace, method: str) -> None:
    """Refuse masked latents: what the method draws or counts for them, the joint does not hold.

    :raises ValueError: naming the site.
    """
    for name, site in trace.items():
        if is_latent(site) and isinstance(site["fn"], dist.MaskedDistribution) and not np.all(site["fn"]._mask):
            raise ValueError(
                f"latent site {name!r} is masked, and {method} takes its values as part of the joint. Observe masked "
                "entries, leave the rows out, or use importance(...), whose weights hold neither their p nor their q."
            )


def faulty(particles: Particle, allow_zero: bool = False) -> int | None:
    """The first particle whose log-probabilities are no such thing, of those that ``vmap`` made.

    :param allow_zero: probability zero under the guide is none.
    """
    log_p, log_q = np.asarray(particles.log_p), np.asarray(particles.log_q)
    bad = np.isnan(log_p) | (log_p == np.inf) | np.isnan(log_q) | (log_q == np.inf)
    if not allow_zero:
        bad = bad | (log_q == -np.inf)
    found = np.flatnonzero(bad.reshape(len(bad), -1).any(1))
    return int(found[0]) if len(found) else None


def blame(
    programs: tuple[Program, ...],
    params: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: Values,
    number: int,
) -> ValueError:
    """The error that names the site and row of a faulty particle, from running the programs once more at its values.

    :param values: by site, of one particle.
    :param number: which particle it is.
    """
    for program in programs:
        seeded = handlers.seed(handlers.substitute(program, data={**params, **values}), random.key(0))
        with handlers.block(), handlers.trace() as trace, _Unchecked():
            seeded(*args, **kwargs)
        for name, site in trace.items():
            if site["type"] != "sample":
                continue
            log_prob = np.asarray(site["fn"].log_prob(site["value"]))
            bad = np.isnan(log_prob) | (log_prob == np.inf)
            if program is not programs[0]:
                bad = bad | (log_prob == -np.inf)
            if bad.any():
                row = tuple(int(place) for place in np.argwhere(bad)[0])
                return ValueError(
                    f"site {name!r} has log-probability {float(log_prob[row])} at row {(number, *row)}. "
                    "Check the model's weights and dtype (float16 overflows), and the factors of the program."
                    + dead_end(getattr(site["fn"], "law", None))
                )
    return ValueError(
        f"the log-probability of sample {number} is NaN in compiled code, and not otherwise. Check for numbers near "
        "the limits of the dtype."
    )


class _Unchecked(Messenger):
    """Distributions that say −inf or NaN of a value outside their support, in place of a warning."""

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "sample":
            msg["fn"]._validate_args = False


def _is_factor(fn: Any) -> bool:
    return isinstance(fn, dist.Unit)


def masks(proposed: Site | None, site: Site) -> bool:
    """Whether the guide's law of a text forbids tokens that the program's permits."""
    q, p = None if proposed is None else proposed["fn"], site["fn"]
    if not isinstance(q, AutoregressiveText) or not isinstance(p, AutoregressiveText):
        return False
    if q.law.grammar is not None:
        return p.law.grammar is None
    if q.law.allowed is None:
        return False
    forbidden = ~np.asarray(q.law.allowed)
    return bool((forbidden if p.law.allowed is None else np.asarray(p.law.allowed) & forbidden).any())


def _numpy(values: Array) -> np.ndarray:
    return np.asarray(values).astype(np.float64)


def tokens_bytes(sites: Trace) -> int:
    """Memory that the texts of one particle take while it is drawn and scored, as their shapes say: keys and values of
    every token, and two arrays of log-probabilities for each token that is scored."""
    total = 0
    for site in sites.values():
        if site["type"] != "sample" or not is_text(site) or isinstance(site["fn"], DerivedText):
            continue
        fn, lm = site["fn"], site["fn"].lm
        size = jnp.dtype(lm.dtype).itemsize
        kept = 2 * lm.architecture.num_layers * lm.architecture.kv_heads * lm.architecture.head_dim * size
        value = site["value"]
        context = sum(text.shape[-1] for text in fn.context)
        scored = fn.options.size if hasattr(fn, "options") else value.shape[-1]
        rows = math.prod(np.broadcast_shapes(fn.batch_shape, value.shape[:-1]))
        total += rows * ((context + scored) * kept + scored * 2 * max(size, 4) * lm.vocabulary)
    return total
