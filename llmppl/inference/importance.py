"""Importance sampling with a guide: exact weights, and what they say of the evidence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pyro.poutine.util import site_is_subsample
from tqdm.auto import tqdm

from llmppl.inference.gathering import Gathering, check_unscaled
from llmppl.posterior.exactness import check_weights
from llmppl.posterior.posterior import Posterior
from llmppl.posterior.running_error import BLOCK, RunningError, check_target, plan
from llmppl.programs.particles import Particles, check_finite, run_particles
from llmppl.programs.plates import in_data_plate
from llmppl.programs.random_states import randomness_kept
from llmppl.programs.structure import Program, is_text, structure

BLOCK_BYTES = 256 * 2**20
"""Memory of the tokens of the particles that are drawn and scored together. (The network's own is bounded apart:
``sampling.CACHE_BYTES``, ``scoring.MAX_NODES``.)"""

TOKEN_BYTES = 512
"""Of one token of a particle while it is drawn and scored, as measured."""


def importance(
    model: Program,
    guide: Program,
    num_samples: int = 64,
    vectorize_data: bool = False,
    progress: bool = True,
    target_error: float | None = None,
) -> Callable[..., Posterior]:
    r"""Importance sampling: a function of the program's arguments that returns a :class:`Posterior`.

    .. math:: w_k = p(x, z_k) / q(z_k|x), \quad z_k\sim q, \qquad \mathbb E[w_k] = Z

    with the log q recorded while sampling. Rows of plates that contain every site are observations of
    their own, each with its own evidence. Particles are drawn in blocks under a memory bound, and only
    numbers are kept of them: a hundred thousand samples take megabytes.

    With ``target_error`` the number of samples is chosen by the samples themselves, and then :math:`\hat Z`
    is not exactly unbiased. It is decided at multiples of 64 and never before 128, so that with error
    :math:`\varepsilon` reached, relative deviation :math:`c` and skewness :math:`\gamma` of the weights the
    relative bias is about :math:`-\varepsilon^2(\gamma/c - 2)`: smaller than the error by a factor of order
    :math:`\varepsilon`, as is the :math:`-\varepsilon^2/2` that the logarithm has anyway. This is asymptotic:
    where k̂ is above 0.7 the error itself is too small, stopping comes too early, and a fixed number is safer.

    :param num_samples: ``K`` for each observation; with ``target_error`` the most that are drawn.
    :param vectorize_data: the returned function takes a list in place of each argument, one entry an
        observation, and runs the program once inside a plate, as :func:`~llmppl.fit` does.
    :param progress: show a progress bar if it takes more than a few seconds.
    :param target_error: stop as soon as the standard error of the log evidence is at most this, nats, for
        every observation. By default all ``num_samples`` are drawn.
    :raises ValueError: log-probabilities that are NaN (with site and row), a scaled site, a guide that
        misses sites or has no exact density, no sample of positive weight, or a ``target_error`` that is not
        a positive number or cannot be decided on with so few samples.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    if target_error is not None:
        check_target(target_error, num_samples)
    exactness = check_weights(guide)

    if vectorize_data:
        model, guide = in_data_plate(model), in_data_plate(guide)

    def run(*args: Any, **kwargs: Any) -> Posterior:
        gathering = Gathering()
        with (
            torch.no_grad(),
            tqdm(total=num_samples, desc="importance", disable=not progress, delay=5, leave=False) as bar,
        ):
            error = RunningError()
            for count, decides in plan(num_samples, block_size(model, args, kwargs)):
                _take(gathering, model, guide, args, kwargs, count)
                bar.update(count)
                error.add(gathering.parts[-1]["log_p"] - gathering.parts[-1]["log_q"])
                if target_error is not None and decides and error.largest() <= target_error:
                    break
        posterior = gathering.posterior("importance", exactness)
        if np.isneginf(posterior.log_evidence).any():
            raise ValueError(
                f"none of the {posterior.num_samples} samples has positive weight: a factor or an allowed= of the "
                "program excludes them all. Take more samples, or a guide that satisfies the condition."
            )
        return posterior

    return run


def block_size(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Particles that are drawn and scored together: :data:`BLOCK`, fewer where plates have many rows."""
    with randomness_kept():
        trace = structure(model, args, kwargs)
    tokens = 0
    for site in trace.nodes.values():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if is_text(site) and isinstance(site["value"], torch.Tensor):
            # Each row is read with its context.
            width = site["fn"].context.shape[-1] + site["value"].shape[-1]
            tokens += math.prod(torch.broadcast_shapes(site["fn"].batch_shape, site["value"].shape[:-1])) * width
        else:
            tokens += site["value"].numel() if isinstance(site["value"], torch.Tensor) else 1
    return min(max(BLOCK_BYTES // (TOKEN_BYTES * max(tokens, 1)), 1), BLOCK)


def _take(
    gathering: Gathering,
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: int,
) -> None:
    # A function of its own, so that the particles of one block are gone before the next is drawn.
    particles: Particles = run_particles(model, guide, args, kwargs, count)
    check_unscaled(particles)
    check_finite(particles.guide_trace)
    check_finite(particles.model_trace, allow_zero=True)
    gathering.add(particles)
