r"""A mixture around parents as a proposal of whole configurations.

``M`` parents :math:`y_m \sim q` are weighed, :math:`\alpha_m \propto \tilde p(y_m)/q(y_m)`, and the configuration is
drawn from

.. math:: q_{\text{mix}}(z) = \varepsilon\, q(z) + (1-\varepsilon) \sum_m \alpha_m\, \rho(z \mid y_m, B_m)

where :math:`\rho` draws the tokens :math:`B_m` of one site's text anew, given all others of the parent. Given parents,
masks and order this is a density on all texts [1, 2], so that :math:`\mathbb E[\tilde p(z)/q_{\text{mix}}(z)] = Z`.
Without its first part it would not reach every text, and the mean weight would be below ``Z`` [3].

References

[1] Cappé, Guillin, Marin, Robert (2004), `Population Monte Carlo`.
[2] Owen, Zhou (2000), `Safe and effective importance sampling`; Elvira, Martino, Luengo, Bugallo (2019), `Generalized
multiple importance sampling`.
[3] Hesterberg (1995), `Weighted average importance sampling and defensive mixture distributions`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmppl.refinement.annealing import choose_site, draw_masks
from llmppl.refinement.configurations import Configuration, Configurations, Values

DEFENSIVE = 0.25
"""ε, the share of fresh draws of the guide."""


@dataclass(frozen=True)
class Parents:
    """Parents of every unit, and what is masked of them.

    :param configuration: with a leading dimension of ``M``.
    :param site: whose texts are drawn anew, with ``masks`` where.
    :param log_alpha: log α, normalised over the parents; −inf where all have weight zero.
    """

    space: Configurations
    configuration: Configuration
    site: str
    masks: Tensor
    log_alpha: Tensor


def draw_parents(space: Configurations, count: int) -> Parents:
    """``M`` draws of the guide in every unit, with masks."""
    wide = space.repeated(count)
    found, site = wide.draw(), choose_site(space)
    dead = found.log_weight.isneginf().all(0, keepdim=True)
    log_alpha = found.log_weight.masked_fill(dead, 0.0).log_softmax(0).masked_fill(dead, -torch.inf)
    return Parents(wide, found, site, draw_masks(found.values[site]), log_alpha)


def mix(space: Configurations, count: int) -> tuple[Values, Tensor]:
    """Draw parents and configurations around them.

    :param count: ``M`` parents of each unit.
    :returns: the values, and log q_mix given parents, masks and order, of the shape of the units in nats.
    """
    parents, fresh = draw_parents(space, count), space.draw()
    values = around(space, parents)
    # Where no parent has positive weight there is nothing to draw around.
    lonely = parents.log_alpha.isneginf().all(0)
    height = torch.rand(space.shape, dtype=torch.float64).to(lonely.device)
    taken = (height < DEFENSIVE) | lonely
    state = space.at(values).with_taken(taken, fresh)
    return state.values, log_density(space, parents, state.values, state.log_q)


def mixture_of(space: Configurations, count: int, values: Values) -> Tensor:
    """What :func:`mix` returns of given values, around parents drawn now."""
    return log_density(space, draw_parents(space, count), values, space.at(values).log_q)


def around(space: Configurations, parents: Parents) -> Values:
    """A parent of each unit by its weight, with its masked tokens drawn anew."""
    gumbel = -(-torch.rand(parents.log_alpha.shape, dtype=torch.float64).log()).log()
    score = parents.log_alpha + gumbel.to(parents.log_alpha.device)
    index = score.nan_to_num(neginf=-math.inf).argmax(0, keepdim=True)
    values = {name: _taken(index, value)[0] for name, value in parents.configuration.values.items()}
    masks = _taken(index, parents.masks)[0]
    text, _, _ = space.proposals(values)[parents.site].refill(values[parents.site], masks)
    return {**values, parents.site: text}


def log_density(space: Configurations, parents: Parents, values: Values, log_q: Tensor) -> Tensor:
    """log q_mix of values whose log q given their order is known."""
    wide, known = parents.space, parents.configuration.values
    same = torch.zeros(parents.log_alpha.shape, dtype=torch.float64, device=log_q.device)
    for name, value in known.items():
        if name != parents.site:
            differs = (value != values[name]).any(-1)
            same = same + wide.summed(torch.where(differs, -torch.inf, 0.0))
    old = known[parents.site]
    refilled = wide.proposals(known)[parents.site].refill_log_prob(old, parents.masks, values[parents.site])
    of_parents = (parents.log_alpha + same + wide.summed(refilled)).logsumexp(0)
    mixed = torch.logaddexp(log_q + math.log(DEFENSIVE), of_parents + math.log1p(-DEFENSIVE))
    return torch.where(parents.log_alpha.isneginf().all(0), log_q, mixed)


def _taken(index: Tensor, values: Tensor) -> Tensor:
    """One of ``M`` of each unit, ``(1, ...)``.

    :param index: ``(1,)`` and the shape of the units.
    """
    full = index[..., None].expand(1, *values.shape[1:])
    return values.gather(0, full)
