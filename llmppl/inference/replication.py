"""Data that a program could have seen: prior and posterior predictive draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from tqdm.auto import tqdm

from llmppl.inference.blocks import block_size
from llmppl.inference.gathering import Gathering, value_of
from llmppl.network.row_map import decoder_of
from llmppl.posterior.given_latents import given_latents, number_of_draws
from llmppl.posterior.posterior import Posterior
from llmppl.posterior.replicates import Replicates
from llmppl.programs.observations import Given
from llmppl.programs.particles import Particles, common_axes, common_shape
from llmppl.programs.plates import in_data_plate, in_particles
from llmppl.programs.simulation import Simulated, check_simulable
from llmppl.programs.structure import (
    Program,
    is_deterministic,
    is_latent,
    is_observation,
    is_text,
    plate_nesting,
    structure,
)
from llmppl.text.arguments import check_programs
from llmppl.text.declared import declared


@declared
def replicate(
    model: Program,
    posterior: Posterior | None = None,
    num_samples: int | None = None,
    vectorize_data: bool = False,
    progress: bool = True,
) -> Callable[..., Replicates]:
    r"""Draws of the observed sites, a function of the program's arguments: of the prior, or with a posterior

    .. math:: z_k \sim p(z|x), \quad x_k^\text{rep} \sim p(x|z_k)

    (Gelman, Meng, Stern 1996). The arguments are those of the posterior; what they observe says only how long an
    observed stream is. For ``posterior.to_arviz(prior=..., posterior_predictive=...)`` and ArviZ's ``plot_ppc``::

        data = posterior.to_arviz(posterior_predictive=replicate(story, posterior)(beginning, ending))

    :param posterior: of this program at the same arguments; weighted samples are resampled. Without it the program
        draws its own latents.
    :param num_samples: draws; by default as many as the posterior has samples, and 100 of the prior.
    :param vectorize_data: the returned function takes lists in place of its arguments, as that of
        :func:`~llmppl.importance` does.
    :raises TypeError: no :class:`~llmppl.Posterior`.
    :raises ValueError: a factor, which cannot be drawn; a posterior of other sites or rows.
    """
    check_programs(model=model)
    count = number_of_draws(posterior, num_samples)
    if vectorize_data:
        model = in_data_plate(model)

    def run(*args: Any, **kwargs: Any) -> Replicates:
        sites = structure(model, args, kwargs)
        check_simulable(sites)
        axes, nesting = common_axes(sites), plate_nesting(sites)
        rows = common_shape(sites, axes)
        latent = {
            name: {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
            for name, site in sites.nodes.items()
            if is_latent(site)
        }
        given = {
            name: torch.as_tensor(value.copy(), device=sites.nodes[name]["value"].device)
            for name, value in given_latents(posterior, latent, axes, rows, nesting, count).items()
        }
        gathering, size = Gathering(), block_size(model, args, kwargs)
        with tqdm(total=count, desc="replicate", disable=not progress, delay=5, leave=False) as bar:
            for first in range(0, count, size):
                some = {name: value[first : first + size] for name, value in given.items()}
                block = min(size, count - first)
                with torch.no_grad(), poutine.block(), Simulated(), Given(some):
                    trace = poutine.trace(in_particles(model, block, nesting)).get_trace(*args, **kwargs)
                _gather(gathering, trace, block, axes, nesting, rows)
                bar.update(block)
        drawn = gathering.posterior("mcmc", "marginal")
        seen = {name for name, site in sites.nodes.items() if is_observation(site)}
        return Replicates(
            latents={name: value for name, value in drawn.samples.items() if name not in seen},
            observations={name: value for name, value in drawn.samples.items() if name in seen},
            of_posterior=posterior is not None,
            batch_shape=tuple(rows),
            decoders=drawn.decoders,
            plates=drawn.plates,
            dims=drawn.dims,
        )

    return run


def _gather(
    gathering: Gathering,
    trace: poutine.Trace,
    count: int,
    axes: tuple[int, ...],
    nesting: int,
    rows: torch.Size,
) -> None:
    zeros = torch.zeros((count, *rows))
    particles = Particles(zeros, zeros, trace, trace, axes, nesting)
    kept = {
        name: site
        for name, site in trace.nodes.items()
        if is_latent(site) or is_deterministic(site) or is_observation(site)
    }
    for name, site in kept.items():
        decoder = (
            decoder_of(site["value"]) if is_deterministic(site) else site["fn"].lm.decode if is_text(site) else None
        )
        if decoder is not None:
            gathering.decoders.setdefault(name, decoder)
    gathering.name_plates(particles, kept)
    columns = ("token_log_p", "token_log_q", "log_likelihood")
    gathering.parts.append(
        {
            "count": count,
            "samples": {name: value_of(particles, name, rows) for name in kept},
            "log_p": zeros.numpy(),
            "log_q": zeros.numpy(),
            **{column: {} for column in columns},
        }
    )
