"""Learning a program along Markov chains over its latents."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from llmppl.objectives.behaviour import prior_draws
from llmppl.objectives.particle_objective import ParticleObjective, diagnostics
from llmppl.programs.observation_keys import rows_of
from llmppl.programs.observations import Given, has_other_observations
from llmppl.programs.particles import Particles, check_finite, common_axes, compute_log_prob, log_prior, sum_sites
from llmppl.programs.plates import check_whole, has_data_plate, in_particles
from llmppl.programs.structure import Program, is_latent, learns, plate_nesting, structure
from llmppl.text.declared import declared


class ChainScore(ParticleObjective):
    r"""The score of a program's evidence along Markov chains over its latents: TRICE [1].

    Each observation has ``K`` chains of latents, which go on from step to step. Proposals :math:`\tilde z_k` are the
    program's own; a chain takes one with probability :math:`\alpha_k = \min(1, p(x|\tilde z_k) / p(x|z_k))`, so that it
    tends to the posterior of a program that changes slowly. The program then learns by

    .. math:: \frac1K\sum_k \nabla\log p(x, z'_k) - \beta_k\,\nabla\log p(\tilde z_k),
              \qquad \beta_k = \frac1{K-1}\sum_{j\ne k}\alpha_j

    whose second term, the control variate, is zero on average (a score at a draw) and takes away what the first has in
    common with it: most of its variance once nearly all proposals are taken. Where the chains are at the posterior it
    is the gradient of :math:`\log p(x)`, by Fisher's identity; chains that lag behind bias it.

    The guide is not asked, and learns nothing: pass any, such as :class:`~llmppl.guides.PromptGuide`. Rows that are
    possible under no latent so far are left out, and counted as ``skipped``. :attr:`acceptance` is the mean
    :math:`\alpha` of the last step.

    :param num_particles: ``K``, chains for each observation, at least 2. Their latents are kept for as many
        observations as there are.
    :param control_variate: whether to subtract it.
    :raises ValueError: a program without parameters; simulated observations.

    References

    [1] Phan, Hoffman, Dohan, et al. (2023), `Training chain-of-thought via latent-variable inference`, sec. 2.2 and
    algorithm 1.
    """

    fewest_particles = 2

    @declared
    def __init__(self, num_particles: int = 8, control_variate: bool = True) -> None:
        super().__init__(num_particles)
        self.control_variate = control_variate
        self.chains: dict[str, dict[str, Tensor]] = {}
        """By observation and site, ``(K,)`` and what one row of the site has."""
        self.acceptance = math.nan

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        sites = structure(model, args, kwargs)
        if has_other_observations(model) or hasattr(model, "simulated_pair"):
            raise ValueError(
                "ChainScore follows the observations of the data, and these are simulated. Leave out simulated rows, "
                "Regularisation(simulated=) among them."
            )
        if torch.is_grad_enabled() and not learns(sites):
            raise ValueError(
                "the program has no parameters, and ChainScore trains nothing else. Adapt its language model, "
                "lm.adapt(...), or train a guide by another objective."
            )
        check_whole(sites, "ChainScore")
        nesting, split = plate_nesting(sites), has_data_plate(sites)
        events = {name: site["fn"].event_dim for name, site in sites.nodes.items() if is_latent(site)}
        names = rows_of(model, args, kwargs, split)
        proposed = prior_draws(model, args, kwargs, self.num_particles, nesting)
        before = self._before(names, proposed, events, split)
        new = self._scored(model, proposed, args, kwargs, nesting)
        fits, prior = (new.log_p - log_prior(new)).detach(), log_prior(new)
        old = self._scored(model, before, args, kwargs, nesting)
        ratio = fits - (old.log_p - log_prior(old)).detach()
        # From an impossible latent every proposal is taken; 0/0 is no ratio.
        alpha = torch.where(ratio.isnan(), 1.0, ratio.clamp(max=0.0).exp())
        taken = torch.rand_like(alpha) < alpha
        after = {
            name: torch.where(_over(taken, new.axes, nesting, events[name]), value, before[name])
            for name, value in proposed.items()
        }
        self._keep(names, after, events, split)
        log_p = torch.where(taken, new.log_p, old.log_p)
        possible = (log_p > -math.inf).detach()
        surrogate = torch.where(possible, log_p, 0.0)
        if self.control_variate:
            others = (alpha.sum(0) - alpha) / (self.num_particles - 1)
            surrogate = surrogate - others * prior
        surrogate = -surrogate.mean(0).sum()
        self.acceptance = float(alpha.mean())
        skipped = int((~possible).all(0).sum())
        self.diagnostics = diagnostics(fits) | ({"skipped": skipped} if skipped else {})
        value = -(fits.logsumexp(0) - math.log(self.num_particles))
        return surrogate - surrogate.detach() + torch.where(value.isinf(), 0.0, value).sum()

    def _scored(
        self, model: Program, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], nesting: int
    ) -> Particles:
        """The program at given latents."""
        with Given(values):
            trace = poutine.trace(in_particles(model, self.num_particles, nesting)).get_trace(*args, **kwargs)
        compute_log_prob(trace)
        check_finite(trace, allow_zero=True)
        axes = common_axes(trace)
        log_p = sum_sites(trace, axes, nesting, self.num_particles)
        return Particles(log_p, torch.zeros_like(log_p), trace, trace, axes, nesting)

    def _before(
        self, names: list[str], proposed: dict[str, Tensor], events: dict[str, int], split: bool
    ) -> dict[str, Tensor]:
        """Where the chains are; those that begin are at their proposals."""
        found = {}
        for name, value in proposed.items():
            dim = value.dim() - 1 - events[name]
            rows = value.unbind(dim) if split else [value]
            known = [self.chains.get(key, {}).get(name, row) for key, row in zip(names, rows, strict=True)]
            found[name] = torch.stack(known, dim) if split else known[0]
        return found

    def _keep(self, names: list[str], values: dict[str, Tensor], events: dict[str, int], split: bool) -> None:
        for name, value in values.items():
            rows = value.unbind(value.dim() - 1 - events[name]) if split else [value]
            for key, row in zip(names, rows, strict=True):
                self.chains.setdefault(key, {})[name] = row.detach()

    def settings(self) -> dict[str, Any]:
        """What makes a run of this objective the same run."""
        return {"num_particles": self.num_particles, "control_variate": self.control_variate}

    def state_dict(self) -> dict[str, Any]:
        """The chains, for checkpoints."""
        return {"chains": self.chains}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.chains = state["chains"]


def _over(rows: Tensor, axes: tuple[int, ...], nesting: int, event: int) -> Tensor:
    """Of each row, ``(K,) + batch_shape``, as something for a site's values, with all dimensions of the plates."""
    shape = [1] * nesting
    for axis, size in zip(axes, rows.shape[1:], strict=True):
        shape[axis] = size
    return rows.reshape((len(rows), *shape, *(1,) * event))
