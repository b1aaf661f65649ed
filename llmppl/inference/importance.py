"""Importance sampling with a guide: exact weights, and what they say of the evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from llmppl.inference.blocks import block_size
from llmppl.inference.gathering import Gathering, NoWeightError, check_unscaled, of_observations
from llmppl.inference.simulated_pairs import score_given
from llmppl.inference.stages import latents_of
from llmppl.posterior.exactness import check_scores_given, check_share, check_weights
from llmppl.posterior.posterior import Posterior
from llmppl.posterior.running_error import RunningError, check_target, plan
from llmppl.programs.particles import check_finite, log_mixture, log_prior, run_particles
from llmppl.programs.plates import in_data_plate
from llmppl.programs.structure import Program, is_latent
from llmppl.text.arguments import check_count, check_programs
from llmppl.text.declared import declared


@declared
def importance(
    model: Program,
    guide: Program,
    num_samples: int = 64,
    vectorize_data: bool = False,
    progress: bool = True,
    target_error: float | None = None,
    defensive: float = 0.0,
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

    With ``defensive`` :math:`\alpha` a share of the samples comes from the program's own latents, and every weight is
    that of the mixture [1]:

    .. math:: w = p(x, z) / \big((1 - \alpha)\, q(z|x) + \alpha\, p(z)\big)

    Exact like any other, and bounded by :math:`1/\alpha` of the likelihood: where the condition is easy a guide is
    then never much worse than the prior. The shares are kept exactly in each block (the balance heuristic [2]).

    :param num_samples: ``K`` for each observation; with ``target_error`` the most that are drawn.
    :param vectorize_data: the returned function takes a list in place of each argument, one entry an
        observation, and runs the program once inside a plate, as :func:`~llmppl.fit` does.
    :param progress: show a progress bar if it takes more than a few seconds.
    :param target_error: stop as soon as the standard error of the log evidence is at most this, nats, for
        every observation. By default all ``num_samples`` are drawn.
    :param defensive: share of the samples from the prior, from 0 to below 1.
    :raises ValueError: log-probabilities that are NaN (with site and row), a scaled site, a guide that
        misses sites or has no exact density, no sample of positive weight, or a ``target_error`` that is not
        a positive number or cannot be decided on with so few samples; ``defensive`` outside [0, 1), or with a guide
        that does not score what it did not draw.

    References

    [1] Hesterberg (1995), `Weighted average importance sampling and defensive mixture distributions`.
    [2] Veach, Guibas (1995), `Optimally combining sampling techniques for Monte Carlo rendering`.
    """
    check_programs(model=model, guide=guide)
    check_count(num_samples=num_samples)
    if target_error is not None:
        check_target(target_error, num_samples)
    check_share(defensive := float(defensive))
    exactness = check_weights(guide)
    if defensive:
        check_scores_given(guide, "defensive=")

    if vectorize_data:
        model, guide = in_data_plate(model), in_data_plate(guide)

    def run(*args: Any, **kwargs: Any) -> Posterior:
        gathering = Gathering()
        with (
            torch.no_grad(),
            tqdm(total=num_samples, desc="importance", disable=not progress, delay=5, leave=False) as bar,
        ):
            error, drawn = RunningError(), 0
            for count, decides in plan(num_samples, block_size(model, args, kwargs)):
                share = round(defensive * (drawn + count)) - round(defensive * drawn)
                drawn, taken = drawn + count, len(gathering.parts)
                _take(gathering, model, guide, args, kwargs, count, share)
                bar.update(count)
                for part in gathering.parts[taken:]:
                    error.add(part["log_p"] - part["log_q"])
                if target_error is not None and decides and error.largest() <= target_error:
                    break
        posterior = of_observations(gathering.posterior("importance", exactness), model, args, kwargs, vectorize_data)
        if np.isneginf(posterior.log_evidence).any():
            raise NoWeightError(
                posterior,
                f"none of the {posterior.num_samples} samples has positive weight: a factor or an allowed= of the "
                "program excludes them all. Take more samples, or a guide that satisfies the condition.",
            )
        return posterior

    return run


def _take(
    gathering: Gathering,
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: int,
    share: int,
) -> None:
    """Draw a block of samples, ``share`` of them from the prior."""
    # A function of its own, so that the particles of one block are gone before the next is drawn.
    parts = []
    if count > share:
        particles = run_particles(model, guide, args, kwargs, count - share)
        parts.append((particles, log_prior(particles), particles.log_q))
    if share:
        particles = run_particles(model, latents_of(model), args, kwargs, share)
        latents = {name: site["value"] for name, site in particles.model_trace.nodes.items() if is_latent(site)}
        parts.append((particles, particles.log_q, score_given(model, guide, args, kwargs, latents, share).log_q))
    for particles, of_prior, of_guide in parts:
        check_unscaled(particles)
        check_finite(particles.guide_trace)
        check_finite(particles.model_trace, allow_zero=True)
        if share:
            particles = replace(particles, log_q=log_mixture(of_guide, of_prior, share / count))
        gathering.add(particles)
