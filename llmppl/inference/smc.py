"""Sequential Monte Carlo over the tokens of a program's latent texts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from llmppl.inference.gathering import NoWeightError, check_unmasked, check_unscaled, gather, of_observations
from llmppl.inference.population import Population
from llmppl.inference.stages import Stages
from llmppl.network.random_states import randomness_kept
from llmppl.posterior.exactness import check_share, check_weights
from llmppl.posterior.posterior import Posterior
from llmppl.posterior.smc_runs import check_settings, pooled
from llmppl.programs.particles import Particles
from llmppl.programs.plates import in_data_plate
from llmppl.programs.structure import Program
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
    seed: int | None = None,
    progress: bool = True,
    defensive: float = 0.0,
) -> Callable[..., Posterior]:
    r"""Sequential Monte Carlo: a function of the program's arguments that returns a :class:`Posterior`.

    Particles are written token by token by the guide, and weighed on the way against intermediate targets
    :math:`\gamma_t`: between two looks a particle's weight grows by
    :math:`\gamma_t(z_{1:t}) / (\gamma_s(z_{1:s})\,q(z_{s+1:t}|z_{1:s}))`.
    Where the effective sample size has fallen the particles are resampled. The last target is the joint, so
    the mean of the final weights is an unbiased estimate of Z whatever the targets between are [1].

    - ``targets="prefixes"``: :math:`\gamma_t = p(z_{1:t})`, the prior's probability of the prefix; what follows a
      text is weighed when all particles have ended it. A prefix and a text that has ended have made different
      numbers of choices, so an ended text is put by and only prefixes of one length compete.
    - ``targets="flows"``: :math:`\gamma_t = R(z_{1:t}\top) / q(\top|z_{1:t})`, the flow through a prefix that a guide
      of terminable states implies [2]: the joint with the text ended here, divided by the guide's probability
      of ending it. For a guide that is the posterior it is the exact sum over all continuations. On ended texts
      it is the joint itself, so that all particles can be compared. It costs a scoring of the program at every
      look.

    With ``defensive`` :math:`\alpha` texts are proposed by the mixture :math:`(1-\alpha)\,q(z|x) + \alpha\,p(z)` [4], a
    token at a time: its next token is that of both, mixed by what each has made of the text so far. Exact like any
    other proposal, and without resampling no weight exceeds :math:`1/\alpha` of the likelihood. Latents that are no
    texts are the guide's alone.

    A program with several latents is walked through in the guide's order; observed sites are weighed as soon
    as every latent before them is there. Latents that are no texts are proposed whole. A text in an inner
    plate advances with its neighbours, a token each at a time.

    :param guide: the proposal; ``None`` proposes from the program's own distributions.
    :param num_samples: ``K`` particles for each observation. Their keys and values, and logits, are held
        in memory at once.
    :param targets: ``"prefixes"`` or ``"flows"``; by default flows where a guide is given and every latent text
        can end at every prefix (a stop token, no grammar).
    :param resampling: ``"systematic"``, ``"residual"``, ``"multinomial"``; or ``"optimal"``, which at each token lets
        all continuations of all particles compete and keeps ``K`` different ones [3]: for laws with few
        continuations that matter, such as grammars. Where no more than ``K`` prefixes of one length are possible it
        enumerates them: the posterior is then :attr:`~Posterior.complete`. By default ``"optimal"`` where the guide's
        texts have a grammar that the program's have not, ``"systematic"`` elsewhere.
    :param ess_threshold: resample where the effective sample size is below this share of the particles that
        compete.
    :param check_every: tokens between looks at the weights; by default 1, and 4 with flows.
    :param num_runs: independent runs of ``K`` particles each, pooled; under ``"optimal"`` the standard error
        needs at least 2.
    :param vectorize_data: as for :func:`~llmppl.importance`; each row is an observation of its own.
    :param seed: of the run's random numbers, which are then none of the caller's.
    :param defensive: share of the prior in what proposes texts, from 0 to below 1. It reads the prior, too, at every
        token; a :class:`~llmppl.guides.WordGuide` has read it anyway.
    :returns: its :attr:`~Posterior.ess` is the smallest at any look, taken before resampling;
        :attr:`~Posterior.distinct_ancestors` and :meth:`~Posterior.distinct_texts` say what resampling has left.
    :raises ValueError: numbers out of range; flows of texts that cannot end; a guide that misses sites or has
        no exact density; a scaled site; NaN; no particle of positive weight; ``defensive`` without a guide or under
        ``"optimal"`` resampling.

    References

    [1] Del Moral, Doucet, Jasra (2006), `Sequential Monte Carlo samplers`.
    [2] Hu et al. (2024), `Amortizing intractable inference in large language models`, eq. 3; the flow is that of
    terminable states, F(s) = R(s⊤) / P(⊤|s).
    [3] Fearnhead, Clifford (2003), `On-line inference for hidden Markov models via particle filters`.
    [4] Hesterberg (1995), `Weighted average importance sampling and defensive mixture distributions`.
    """
    check_programs(model=model)
    if guide is not None:
        check_programs(guide=guide)
    check_settings(num_samples, num_runs, targets, resampling, ess_threshold, check_every)
    check_share(defensive)
    if defensive and (guide is None or resampling == "optimal"):
        raise ValueError(
            f"defensive={defensive} mixes a guide's texts with the prior's: give a guide, and another resampling than "
            "'optimal', which draws nothing. Or leave it out."
        )
    exactness = check_weights(guide)
    if vectorize_data:
        model, guide = in_data_plate(model), None if guide is None else in_data_plate(guide)

    def run(*args: Any, **kwargs: Any) -> Posterior:
        with (
            torch.no_grad(),
            nullcontext() if seed is None else randomness_kept(seed),
            tqdm(desc="smc", unit="token", disable=not progress, delay=5, leave=False) as bar,
        ):
            stages = Stages(model, guide, args, kwargs, num_samples)
            parts = []
            for _ in range(num_runs):
                scheme = resampling or ("optimal" if stages.narrowed and not defensive else "systematic")
                population = Population(stages, targets, scheme, ess_threshold, check_every, None, defensive)
                population.run(bar)
                parts.append(_posterior(population, exactness))
        posterior = of_observations(pooled(parts), model, args, kwargs, vectorize_data)
        if np.isneginf(posterior.log_evidence).any():
            raise NoWeightError(
                posterior,
                f"none of the {num_samples * num_runs} particles has positive weight: a factor or an allowed= of the "
                "program excludes them all. Take more particles, or a guide that satisfies the condition.",
            )
        return posterior

    return run


def _posterior(population: Population, exactness: str) -> Posterior:
    """The particles of one run."""
    stages = population.stages
    log_p, trace = population.log_joint, population.trace
    particles = Particles(log_p, torch.zeros_like(log_p), trace, population.guide_trace(), stages.axes, stages.nesting)
    check_unscaled(particles)
    check_unmasked(particles, "smc")
    return replace(
        gather([particles], "smc", exactness),
        log_weights=population.log_weights.cpu().numpy(),
        ancestors=population.ancestors.cpu().numpy(),
        num_ancestors=population.num_ancestors,
        complete=population.complete,
        ess_history=torch.stack(population.ess_history).cpu().numpy(),
    )
