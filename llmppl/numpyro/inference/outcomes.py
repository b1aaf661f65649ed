"""What a compiled run of sequential Monte Carlo ends with, as a :class:`~llmppl.posterior.posterior.Posterior`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpyro import distributions as dist

from llmppl.numpyro.inference.gathering import (
    computed_decoders,
    computed_events,
    laid_out,
    masks,
    observed_values,
    plate_names,
)
from llmppl.numpyro.inference.population import Outcome, event_dims
from llmppl.numpyro.inference.stages import Stages
from llmppl.numpyro.programs.tracing import is_text
from llmppl.posterior.posterior import Posterior


def posterior_of(outcome: Outcome, stages: Stages, exactness: str) -> Posterior:
    """The particles of one run.

    :param stages: made from the run's own arguments.
    :raises ValueError: NaN.
    """
    where, sites = stages.where, stages.sites
    if any(np.isnan(np.asarray(x)).any() for x in (outcome.log_weight, outcome.log_joint)):
        raise ValueError(
            "some log-probability is NaN. Check the model's weights and dtype (float16 overflows), and the factors of "
            "the program."
        )
    texts = {n: site for n, site in sites.items() if site["type"] == "sample" and is_text(site)}
    numbers = event_dims(stages) | computed_events(sites)
    masked = [n for n in outcome.values if masks(stages.proposed[n], stages.sites[n])]
    looked = np.asarray(outcome.looked)
    plates, dims = plate_names(sites, where)
    factors = {n for n, site in sites.items() if site["type"] == "sample" and isinstance(site["fn"], dist.Unit)}
    return Posterior(
        samples={n: laid_out(value, where, numbers[n]) for n, value in (outcome.values | outcome.computed).items()},
        log_weights=_double(outcome.log_weight),
        log_joint=_double(outcome.log_joint),
        method="smc",
        exactness=exactness,
        decoders={n: site["fn"].lm.decode for n, site in texts.items()} | computed_decoders(sites),
        observed=observed_values(sites, where),
        plates=plates,
        dims=dims,
        token_log_p={n: _double(laid_out(value, where, 1)) for n, value in outcome.token_log_p.items()},
        token_log_q={n: _double(laid_out(value, where, 1)) for n, value in outcome.token_log_q.items()},
        log_likelihood={n: _double(v) for n, v in outcome.log_likelihood.items() if n not in factors},
        masked=tuple(masked),
        deterministic=tuple(outcome.computed),
        ancestors=np.asarray(outcome.ancestor),
        num_ancestors=len(outcome.log_weight),
        ess_history=_double(outcome.ess)[looked],
    )


def _double(values: Any) -> np.ndarray[Any, Any]:
    return np.asarray(values, dtype=np.float64)
