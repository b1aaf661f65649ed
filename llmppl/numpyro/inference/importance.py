"""Importance sampling with a guide, compiled: exact weights, and what they say of the evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro import handlers
from tqdm.auto import tqdm

from llmppl.numpyro.inference.arguments import Compiled, check_key, language_model
from llmppl.numpyro.inference.gathering import Gathering, blame, check_unscaled, faulty, tokens_bytes
from llmppl.numpyro.programs.particles import Particle, layout, run_particle
from llmppl.numpyro.programs.tracing import Program, Trace, in_data_plate, structure
from llmppl.posterior.exactness import check_weights
from llmppl.posterior.posterior import Posterior
from llmppl.posterior.running_error import BLOCK, FEWEST, RunningError, check_target
from llmppl.text.arguments import check_count, check_programs
from llmppl.text.declared import declared

BLOCK_BYTES = 2**30
"""Memory of the texts of the particles that are drawn and scored together: their keys and values, and the
log-probabilities over the vocabulary."""


@declared
def importance(
    model: Program,
    guide: Program,
    num_samples: int = 64,
    vectorize_data: bool = False,
    progress: bool = True,
    target_error: float | None = None,
    params: dict[str, Any] | None = None,
) -> Callable[..., Posterior]:
    r"""Importance sampling: a function ``(rng_key, *args, **kwargs)`` that returns a :class:`Posterior`.

    .. math:: w_k = p(x, z_k) / q(z_k|x), \quad z_k\sim q, \qquad \mathbb E[w_k] = Z

    with the log q recorded while sampling. Rows of plates that contain every site are observations of
    their own, each with its own evidence. As with NumPyro's ``Predictive`` the key comes first, and the same key gives
    the same samples.

    A block of particles is compiled once, for all blocks and for later calls of the returned function with arguments of
    the same shapes. Strings are padded to a multiple of 16 tokens for that; numbers that are no arrays are constants.
    Blocks have at most 64 particles, fewer under the bound :data:`BLOCK_BYTES`.

    With ``target_error`` the number of samples is chosen by the samples themselves, and then :math:`\hat Z`
    is not exactly unbiased; see :func:`llmppl.importance` for by how much.

    :param num_samples: ``K`` for each observation; with ``target_error`` the most that are drawn.
    :param vectorize_data: the returned function takes a list in place of each argument, one entry an
        observation, and runs the program once inside a plate.
    :param progress: show a progress bar if it takes more than a few seconds.
    :param target_error: stop as soon as the standard error of the log evidence is at most this, nats, for
        every observation. By default all ``num_samples`` are drawn.
    :param params: of the guide and the program by name, e.g. ``svi_result.params``; by default their own.
    :raises TypeError: a first argument that is no key of the new style (``jax.random.key``).
    :raises ValueError: log-probabilities that are NaN (with site and row), a scaled site, a guide that
        misses sites or has no exact density, no sample of positive weight, or a ``target_error`` that is not
        a positive number or cannot be decided on with so few samples.
    """
    check_programs(model=model, guide=guide)
    check_count(num_samples=num_samples)
    if target_error is not None:
        check_target(target_error, num_samples)
    exactness = check_weights(guide)
    told = guide
    if vectorize_data:
        model, guide = in_data_plate(model), in_data_plate(guide)

    def block(keys: Array, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Particle:
        where = layout(with_params(params, model), with_params(params, guide), args, kwargs)
        return jax.vmap(lambda key: run_particle(where, model, guide, params, args, kwargs, key))(keys)

    compiled = Compiled(block)

    def run(rng_key: Array, *args: Any, **kwargs: Any) -> Posterior:
        check_key(rng_key)
        if vectorize_data:
            check_lists(args)
        own_params = current_params(told, params)
        program, proposer = with_params(own_params, model), with_params(own_params, guide)
        sites, proposed = (structure(own, args, kwargs) for own in (program, proposer))
        check_unscaled(sites, proposed)
        gathering = Gathering(layout(program, proposer, args, kwargs), sites, proposed)
        lm = language_model(told, sites, proposed)
        size = block_size(num_samples, sites, target_error is not None)
        error = RunningError()
        # The sample's number makes its key, so that the blocks do not matter.
        keys = jax.vmap(lambda number: random.fold_in(rng_key, number))
        once = compiled.at(own_params, args, kwargs, lm)
        drawn = 0
        with tqdm(total=num_samples, desc="importance", disable=not progress, delay=5, leave=False) as bar:
            while drawn < num_samples:
                count = min(size, num_samples - drawn)
                found = once(keys(drawn + jnp.arange(size)))
                particles: Particle = jax.tree.map(np.asarray, found)
                if (bad := faulty(particles)) is not None:
                    values = {name: jnp.asarray(value[bad]) for name, value in particles.values.items()}
                    raise blame((model, guide), own_params, args, kwargs, values, drawn + bad)
                part = gathering.add(particles, count)
                error.add(part["log_p"] - part["log_q"])
                drawn += count
                bar.update(count)
                decides = drawn % BLOCK == 0 and drawn >= FEWEST
                if target_error is not None and decides and error.largest() <= target_error:
                    break
        posterior = gathering.posterior("importance", exactness)
        if np.isneginf(posterior.log_evidence).any():
            raise ValueError(
                f"none of the {posterior.num_samples} samples has positive weight: a factor or an allowed= of the "
                "program excludes them all. Take more samples, or a guide that satisfies the condition."
            )
        return posterior

    run.compilations = compiled.count  # type: ignore[attr-defined]
    return run


def block_size(num_samples: int, sites: Trace, decides: bool = False) -> int:
    """Particles that are drawn and scored together: :data:`BLOCK`, fewer where texts or plates are large.

    :param decides: whether stopping is decided on, at multiples of :data:`BLOCK`.
    """
    largest = min(max(BLOCK_BYTES // max(tokens_bytes(sites), 1), 1), BLOCK)
    if decides:
        return 1 << (largest.bit_length() - 1)
    # Blocks of one size compile once; as even as can be, so that few particles are thrown away.
    blocks = -(-num_samples // largest)
    return -(-num_samples // blocks)


def current_params(guide: Program | None, params: dict[str, Any] | None) -> dict[str, Any]:
    """The guide's parameters as they are at a call, under those that are given: an argument of compiled code, which
    would keep what they were when it was compiled."""
    own: dict[str, Any] = getattr(guide, "parameters", dict)()
    return {**own, **getattr(guide, "params", {}), **(params or {})}


def with_params(params: dict[str, Any], program: Program) -> Program:
    """The program with these values of its parameters."""
    return handlers.substitute(program, data=params)


def check_lists(args: tuple[Any, ...]) -> None:
    """Refuse lists of different lengths.

    :raises ValueError: naming the argument.
    """
    counts = [len(value) if isinstance(value, (list, tuple)) else None for value in args]
    known = [count for count in counts if count is not None]
    for place, count in enumerate(counts):
        if count is not None and count != known[0]:
            raise ValueError(
                f"vectorize_data=True needs lists of one length, and argument {place} has {count} entries where "
                f"another has {known[0]}. Give each argument one entry an observation."
            )
