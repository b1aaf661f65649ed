"""Importance sampling with a guide: exact weights, and what they say of the evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from llmppl.distributions.autoregressive import AutoregressiveText
from llmppl.inference.posterior import Posterior
from llmppl.particles import Particles, check_finite, run_particles, sum_site
from llmppl.tracing import Program, Site, in_data_plate, is_latent, is_text

BLOCK = 64
"""Particles that are drawn and scored together."""


def importance(
    model: Program,
    guide: Program,
    num_samples: int = 64,
    vectorize_data: bool = False,
    progress: bool = True,
) -> Callable[..., Posterior]:
    r"""Importance sampling: a function of the program's arguments that returns a :class:`Posterior`.

    .. math:: w_k = p(x, z_k) / q(z_k|x), \quad z_k\sim q, \qquad \mathbb E[w_k] = Z

    with the log q recorded while sampling. Rows of plates that contain every site are observations of
    their own, each with its own evidence.

    :param num_samples: ``K`` for each observation.
    :param vectorize_data: the returned function takes a list in place of each argument, one entry an
        observation, and runs the program once inside a plate, as :func:`~llmppl.fit` does.
    :param progress: show a progress bar if it takes more than a few seconds.
    :raises ValueError: log-probabilities that are NaN (with site and row), a scaled site, a guide that
        misses sites or has no exact density, or no sample of positive weight.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    exactness = getattr(guide, "exactness", "marginal")
    if exactness == "none":
        raise ValueError(
            f"{type(guide).__name__} has no exact density (exactness 'none'), so its samples have no weights."
        )

    if vectorize_data:
        model, guide = in_data_plate(model), in_data_plate(guide)

    def run(*args: Any, **kwargs: Any) -> Posterior:
        blocks: list[Particles] = []
        with (
            torch.no_grad(),
            tqdm(total=num_samples, desc="importance", disable=not progress, delay=5, leave=False) as bar,
        ):
            for start in range(0, num_samples, BLOCK):
                count = min(BLOCK, num_samples - start)
                particles = run_particles(model, guide, args, kwargs, count)
                check_unscaled(particles)
                check_finite(particles.guide_trace)
                check_finite(particles.model_trace, allow_zero=True)
                blocks.append(particles)
                bar.update(count)
        posterior = gather(blocks, "importance", exactness)
        if np.isneginf(posterior.log_evidence).any():
            raise ValueError(
                f"none of the {num_samples} samples has positive weight: a factor or an allowed= of the program "
                "excludes them all. Take more samples, or a guide that satisfies the condition."
            )
        return posterior

    return run


def gather(blocks: list[Particles], method: str, exactness: str) -> Posterior:
    """The particles of several passes as one posterior."""
    first = blocks[0].model_trace
    latent = {name: site for name, site in first.nodes.items() if is_latent(site)}
    rows = blocks[0].log_p.shape[1:]
    samples = {name: np.concatenate([_value(block, name, rows) for block in blocks]) for name in latent}
    observed = {
        name: site["value"].cpu().numpy()
        for name, site in first.nodes.items()
        if site["type"] == "sample" and site["is_observed"] and is_text(site)
    }
    log_weights = [b.log_p if method == "enumeration" else b.log_weights for b in blocks]
    texts = [name for name, site in latent.items() if isinstance(site["fn"], AutoregressiveText)]
    seen = [
        name
        for name, site in first.nodes.items()
        if site["type"] == "sample" and site["is_observed"] and not isinstance(site["fn"], dist.Unit)
    ]
    return Posterior(
        samples=samples,
        log_weights=_numpy(torch.cat(log_weights)),
        log_joint=_numpy(torch.cat([block.log_p for block in blocks])),
        method=method,
        exactness=exactness,
        decoders={
            name: site["fn"].lm.decode
            for name, site in first.nodes.items()
            if site["type"] == "sample" and is_text(site)
        },
        observed=observed,
        token_log_p={
            name: np.concatenate([_token_scores(b, b.model_trace, name, rows) for b in blocks]) for name in texts
        },
        token_log_q={
            name: np.concatenate([_token_scores(b, b.guide_trace, name, rows) for b in blocks])
            for name in texts
            if name in blocks[0].guide_trace.nodes
            and isinstance(blocks[0].guide_trace.nodes[name]["fn"], AutoregressiveText)
        },
        log_likelihood={
            name: _numpy(
                torch.cat(
                    [
                        sum_site(b.model_trace.nodes[name]["log_prob"], b.axes, b.nesting).expand(len(b.log_p), *rows)
                        for b in blocks
                    ]
                )
            )
            for name in seen
        },
    )


def _token_scores(particles: Particles, trace: poutine.Trace, name: str, rows: torch.Size) -> np.ndarray:
    """A text's token log-probabilities, laid out as its values are; known from scoring the trace."""
    site = trace.nodes[name]
    return _layout(particles, site["fn"].token_log_prob(site["value"]), 1, rows)


def _value(particles: Particles, name: str, rows: torch.Size) -> np.ndarray:
    """A site's values as ``(K,) + batch_shape + inner + event_shape``."""
    site = particles.model_trace.nodes[name]
    return _layout(particles, site["value"], site["value"].dim() - _batch_dims(site), rows)


def _layout(particles: Particles, value: Tensor, event: int, rows: torch.Size) -> np.ndarray:
    count = len(particles.log_p)
    missing = 1 + particles.nesting - (value.dim() - event)
    value = value.reshape((1,) * missing + value.shape) if missing > 0 else value
    # Rows in front, dimensions of inner plates behind, those of size 1 dropped.
    inner = [d for d in range(1, 1 + particles.nesting) if d - 1 - particles.nesting not in particles.axes]
    outer = [d for d in range(1, 1 + particles.nesting) if d not in inner]
    behind = list(range(1 + particles.nesting, value.dim()))
    value = value.permute(0, *outer, *inner, *behind)
    value = value.expand((count, *rows) + value.shape[1 + len(outer) :])
    for dim in reversed(range(1 + len(outer), 1 + len(outer) + len(inner))):
        if value.shape[dim] == 1:
            value = value.squeeze(dim)
    return value.detach().cpu().numpy()


def _batch_dims(site: Site) -> int:
    return site["value"].dim() - site["fn"].event_dim


def check_unscaled(particles: Particles) -> None:
    """Refuse scaled sites: their weights are not those of the program.

    :raises ValueError: naming the site.
    """
    for trace in (particles.model_trace, particles.guide_trace):
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not _is_one(site["scale"]):
                raise ValueError(
                    f"site {name!r} is scaled (by poutine.scale or a subsampled plate), so its weights are not those "
                    "of the program. Run importance sampling without scaling or subsampling."
                )


def _is_one(scale: float | Tensor) -> bool:
    return bool((scale == 1).all()) if isinstance(scale, Tensor) else scale == 1


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()
