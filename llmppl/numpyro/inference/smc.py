"""Sequential Monte Carlo over the tokens of a program's latent texts, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array, random
from tqdm.auto import tqdm

from llmppl.numpyro.inference.arguments import Compiled, check_key, language_model
from llmppl.numpyro.inference.importance import check_lists, current_params
from llmppl.numpyro.inference.outcomes import posterior_of
from llmppl.numpyro.inference.population import Outcome, Settings, run_population
from llmppl.numpyro.inference.stages import Stages
from llmppl.numpyro.programs.tracing import Program, in_data_plate
from llmppl.posterior.exactness import check_weights
from llmppl.posterior.posterior import Posterior
from llmppl.posterior.smc_runs import check_settings, pooled
from llmppl.text.arguments import check_programs
from llmppl.text.declared import declared


@declared
def smc(
    model: Program,
    guide: Program | None = None,
    num_samples: int = 64,
    targets: str | None = None,
    resampling: str | None = None,
    ess_threshold: float = 0.5,
    check_every: int | None = None,
    num_runs: int = 1,
    vectorize_data: bool = False,
    progress: bool = True,
    params: dict[str, Any] | None = None,
) -> Callable[..., Posterior]:
    r"""Sequential Monte Carlo: a function of a key and the program's arguments that returns a
    :class:`~llmppl.posterior.posterior.Posterior`.

    Particles are written token by token by the guide, and weighed on the way against intermediate targets
    :math:`\gamma_t`: between two looks a particle's weight grows by
    :math:`\gamma_t(z_{1:t}) / (\gamma_s(z_{1:s})\,q(z_{s+1:t}|z_{1:s}))`.
    Where the effective sample size has fallen the particles are resampled. The last target is the joint, so the mean
    of the final weights is an unbiased estimate of Z whatever the targets between are [1].

    - ``targets="prefixes"``: :math:`\gamma_t = p(z_{1:t})`, the prior's probability of the prefix; what follows a text
      is weighed when all particles have ended it. A prefix and a text that has ended have made different numbers of
      choices, so an ended text is put by and only prefixes of one length compete.
    - ``targets="flows"``: :math:`\gamma_t = R(z_{1:t}\top) / q(\top|z_{1:t})`, the flow through a prefix that a guide
      of terminable states implies [2]: the joint with the text ended here, divided by the guide's probability of ending
      it. For a guide that is the posterior it is the exact sum over all continuations. On ended texts it is the joint
      itself, so that all particles can be compared. It costs a scoring of the program at every look. A prefix that
      the program does not permit as a text is not weighed before it may end.

    A program with several latents is walked through in the guide's order; observed sites are weighed as soon as every
    latent before them is there. Latents that are no texts are proposed whole. A text in an inner plate advances with
    its neighbours, a token each at a time.

    The whole run is one compiled program: the first call compiles it, a later one with arguments of the same shapes
    does not. Strings are padded to a multiple of 16 tokens for that; numbers that are no arrays, truth values and
    objects are constants, so that another value compiles anew.

    :param guide: the proposal; ``None`` proposes from the program's own distributions.
    :param num_samples: ``K`` particles for each observation. Their keys and values, and logits, are held in memory at
        once; a prompt that they share is read and held once.
    :param targets: ``"prefixes"`` or ``"flows"``; by default flows where a guide is given and the latent text has a
        stop token.
    :param resampling: ``"systematic"`` (the default), ``"residual"`` or ``"multinomial"``. The ``"optimal"`` resampling
        of :func:`llmppl.smc` is not built here.
    :param ess_threshold: resample where the effective sample size is below this share of the particles that compete.
    :param check_every: tokens between looks at the weights; by default 1, and 4 with flows.
    :param num_runs: independent runs of ``K`` particles each, pooled.
    :param vectorize_data: the returned function takes a list (or a batch) in place of each argument, one entry an
        observation, and runs the program once inside a plate; each row is an observation of its own.
    :param params: of the guide's and the program's ``numpyro.param`` sites, as ``svi.get_params(state)`` returns them;
        those not given have their initial values.
    :returns: a function ``(rng_key, *args, **kwargs)``; the same key gives the same particles. Its posterior's
        :attr:`~llmppl.posterior.posterior.Posterior.ess` is the smallest at any look, taken before resampling.
    :raises ValueError: numbers out of range; flows of texts that cannot end; a guide that misses sites or has no exact
        density; a scaled site; NaN; no particle of positive weight.

    References

    [1] Del Moral, Doucet, Jasra (2006), `Sequential Monte Carlo samplers`.
    [2] Hu et al. (2024), `Amortizing intractable inference in large language models`, eq. 3; the flow is that of
    terminable states, F(s) = R(s⊤) / P(⊤|s).
    """
    check_programs(model=model)
    if guide is not None:
        check_programs(guide=guide)
    check_settings(num_samples, num_runs, targets, resampling, ess_threshold, check_every)
    if resampling == "optimal":
        raise ValueError(
            "resampling='optimal' is not built for NumPyro: which continuations are kept changes the shapes of "
            "compiled code. Use llmppl.smc of the torch side, or 'systematic'."
        )
    exactness = check_weights(guide)
    told = guide
    if vectorize_data:
        model, guide = in_data_plate(model), None if guide is None else in_data_plate(guide)
    settings = Settings(num_samples, targets, resampling or "systematic", ess_threshold, check_every)

    def population(key: Array, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        return run_population(settings, Stages(model, guide, args, kwargs), params, args, kwargs, key)

    compiled = Compiled(population)

    def run(rng_key: Array, *args: Any, **kwargs: Any) -> Posterior:
        check_key(rng_key)
        if vectorize_data:
            check_lists(args)
        stages = Stages(model, guide, args, kwargs)
        lm = language_model(told, stages.sites, stages.proposed)
        once = compiled.at(current_params(told, params), args, kwargs, lm)
        parts = []
        for key in tqdm(
            random.split(rng_key, num_runs), desc="smc", unit="run", disable=not progress, delay=5, leave=False
        ):
            parts.append(posterior_of(once(key), stages, exactness))
        posterior = pooled(parts)
        if np.isneginf(posterior.log_evidence).any():
            raise ValueError(
                f"none of the {num_samples * num_runs} particles has positive weight: a factor or an allowed= of the "
                "program excludes them all. Take more particles, or a guide that satisfies the condition."
            )
        return posterior

    run.compilations = compiled.count  # type: ignore[attr-defined]
    return run
