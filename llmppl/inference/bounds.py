"""Bounds of the log evidence from both sides, and of both divergences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmppl.inference.population import Population
from llmppl.inference.resampling import log_mean
from llmppl.inference.simulated_pairs import draws, score_given
from llmppl.inference.stages import Stages
from llmppl.posterior.brackets import Bounds
from llmppl.posterior.exactness import check_scores_given
from llmppl.programs.observations import observing
from llmppl.programs.plates import in_data_plate
from llmppl.programs.simulation import simulate
from llmppl.programs.structure import Program
from llmppl.text.arguments import check_programs
from llmppl.text.declared import declared

METHODS = ("importance", "smc")


@declared
def bounds(
    model: Program,
    guide: Program,
    num_samples: int = 64,
    simulations: int = 1,
    vectorize_data: bool = False,
    method: str = "importance",
) -> Callable[..., Bounds]:
    r"""Two-sided bounds on simulated data [1, 2]: a function of the program's arguments.

    It draws :math:`(z^*, x^*)` from the program, so that :math:`z^*` is an exact posterior draw at
    :math:`x^*`. With :math:`w(z) = p(x^*, z)/q(z|x^*)` and :math:`z_k \sim q`

    .. math:: \mathbb E\log\frac1K\sum_{k=1}^{K} w(z_k) \le \log Z(x^*)
              \le \mathbb E\log\frac1K\Big(w(z^*) + \sum_{k=1}^{K-1} w(z_k)\Big)

    and with :math:`\log Z` both divergences are bracketed. The observed values among the arguments say
    only what is observed and, of a stream, how many tokens. The bounds hold on average over simulated
    observations; of an observation that was not simulated they say nothing. For such, the arguments as they
    are, ask with ``simulations=0``: the lower bound is all there is.

    By SMC both estimates are those of :func:`~llmppl.smc` with multinomial resampling; for the upper one
    :math:`z^*` is the retained particle of a conditional particle filter [3], under whose law the expected
    log Ẑ is above log Z for the same reason.

    A step costs one sampling pass of the guide, one scoring pass of the model for the particles, and
    a pass of each for :math:`z^*`.

    Of a guide that is exact given an order, or with a trajectory, that of :math:`z^*` is drawn from its law at
    :math:`z^*`, and the divergences are those of both together, never smaller than those of the latents alone.

    :param num_samples: ``K``, at least 2.
    :param simulations: draws of :math:`(z^*, x^*)` for each call; 0 for the observations as they are.
    :param method: ``"importance"`` or ``"smc"``.
    :param vectorize_data: as for :func:`~llmppl.importance`; each row is an observation of its own.
    :raises ValueError: a factor in the program, a guide that does not score what it did not draw, a scaled site.
    :raises TypeError: a guide that takes no ``observations=``.

    References

    [1] Grosse, Ghahramani, Adams (2015), `Sandwiching the marginal likelihood using bidirectional Monte Carlo`.
    [2] Zhao, Brekelmans, Makhzani, Grosse (2024), `Probabilistic inference in language models via twisted
    sequential Monte Carlo`, prop. 5.1.
    [3] Andrieu, Doucet, Holenstein (2010), `Particle Markov chain Monte Carlo methods`, sec. 4.3.
    """
    check_programs(model=model, guide=guide)
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}: one of them is the simulated latents.")
    if simulations < 0:
        raise ValueError(f"simulations must not be negative, got {simulations}. 0 takes the observations as given.")
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {METHODS}.")
    check_scores_given(guide, "bounds()")
    if vectorize_data:
        model, guide = in_data_plate(model), in_data_plate(guide)

    def run(*args: Any, **kwargs: Any) -> Bounds:
        with torch.no_grad():
            if not simulations:
                return _bounds(model, guide, args, kwargs, num_samples, method, None)
            parts = []
            for _ in range(simulations):
                latents, observations = simulate(model, args, kwargs)
                programs = observing(model, guide, observations)
                parts.append(_bounds(*programs, args, kwargs, num_samples, method, latents))
            return Bounds.join(parts)

    return run


def _bounds(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: int,
    method: str,
    latents: dict[str, Tensor] | None,
) -> Bounds:
    """The bounds of one call; ``latents`` are an exact posterior draw, if there is one."""
    drawn = torch.cat([block.log_weights for block in draws(model, guide, args, kwargs, count)])  # (K,) + batch_shape
    # Where the guide cannot go, KL(p‖q) is infinite: an answer, not an error.
    exact = None if latents is None else score_given(model, guide, args, kwargs, latents, 1).log_weights
    if method == "smc":
        lower = _log_evidence(model, guide, args, kwargs, count, None)
        upper = None if latents is None else _log_evidence(model, guide, args, kwargs, count, latents)
    else:
        lower = log_mean(drawn)
        upper = None if exact is None else log_mean(torch.cat([drawn[:-1], exact]))
    return Bounds(
        lower=_flat(lower),
        upper=None if upper is None else _flat(upper),
        elbo=_flat(drawn.mean(0)),
        exact_log_weight=None if exact is None else _flat(exact[0]),
        num_samples=count,
        method=method,
    )


def _log_evidence(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: int,
    retained: dict[str, Tensor] | None,
) -> Tensor:
    """log Ẑ of one run of SMC, with the retained particle among the ``K`` if there is one."""
    stages = Stages(model, guide, args, kwargs, count)
    population = Population(stages, None, "multinomial", 0.5, None, retained)
    population.run()
    return log_mean(population.log_weights)


def _flat(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy().reshape(-1)
