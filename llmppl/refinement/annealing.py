r"""Annealed importance sampling of whole configurations, with Metropolis-Hastings moves.

Through targets :math:`\pi_\beta \propto q^{1-\beta}\tilde p^{\beta}` on configurations and unmasking orders, from
:math:`z_0\sim q` with moves :math:`z_t\sim K_{\beta_t}(z_{t-1}\to\cdot)` that leave these targets invariant,

.. math:: \log w = \sum_{t=0}^{T} (\beta_{t+1}-\beta_t)\log\frac{\tilde p(z_t)}{q(z_t)}, \qquad
          \beta_0 = 0,\ \beta_{T+1} = 1, \qquad \mathbb E[w] = Z

[1]. The trajectory back from an exact posterior draw, by the same moves in reverse order, has the same weight, and
gives a bound of log Z from above [2].

References

[1] Neal (2001), `Annealed importance sampling`.
[2] Grosse, Ghahramani, Adams (2015), `Sandwiching the marginal likelihood using bidirectional Monte Carlo`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from llmppl.network.text_tensors import lengths
from llmppl.refinement.configurations import Configuration, Configurations, Values
from llmppl.text import PAD

MAX_EXPONENT = 2.0
"""``β_t = (t/(T+1))²``: log p̃/q varies most under ``q``, so that the first steps are the shortest."""


def anneal(space: Configurations, temperatures: int) -> tuple[Values, Tensor]:
    """Draw configurations and refine them.

    :param temperatures: ``T``, intermediate targets; 0 leaves the draws as they are.
    :returns: the values, and log q(z, trajectory) − log r(trajectory | z), so that the weight of the joint over it is
        ``w``; of the shape of the units in nats.
    """
    betas = schedule(temperatures)
    start = space.draw()
    state, log_w, before = start, torch.zeros_like(start.log_q), 0.0
    for beta in betas:
        log_w = log_w + (beta - before) * state.log_weight
        state, before = remasked(space, independent(space, state, beta), beta), beta
    log_w = log_w + (1.0 - before) * state.log_weight
    # Of probability zero a start never moves: its weight is zero whatever its density.
    return state.values, torch.where(start.log_p.isneginf(), start.log_q, state.log_p - log_w)


def anneal_back(space: Configurations, temperatures: int, values: Values) -> Tensor:
    """What :func:`anneal` returns of given values, with a trajectory drawn backwards from them."""
    betas = [*schedule(temperatures), 1.0]
    end = space.at(values)
    state, log_w = end, torch.zeros_like(end.log_q)
    for beta, after in reversed(list(itertools.pairwise(betas))):
        log_w = log_w + (after - beta) * state.log_weight
        state = independent(space, remasked(space, state, beta), beta)
    log_w = log_w + betas[0] * state.log_weight
    found = torch.where(end.log_p.isneginf(), end.log_q, end.log_p - log_w)
    return torch.where(end.log_q.isneginf(), end.log_q, found)


def schedule(temperatures: int) -> list[float]:
    """The inverse temperatures of the intermediate targets, increasing."""
    return [(t / (temperatures + 1)) ** MAX_EXPONENT for t in range(1, temperatures + 1)]


def independent(space: Configurations, state: Configuration, beta: float) -> Configuration:
    r"""A move to another draw of the guide, accepted with probability :math:`\min(1, (w'/w)^\beta)`."""
    new = space.draw()
    return accepted(state, new, beta * (new.log_weight - state.log_weight))


def remasked(space: Configurations, state: Configuration, beta: float) -> Configuration:
    r"""A move that masks some tokens of one text and fills them in anew in one pass, given all others.

    It is accepted with probability :math:`\min\big(1, \frac{\pi_\beta(z')\,\rho(z\mid z')}{\pi_\beta(z)\,\rho(z'\mid
    z)}\big)`. Which tokens is decided from the text's length alone, which stays, so that the choice cancels.
    """
    name = choose_site(space)
    value = state.values[name]
    masks = draw_masks(value) & space.one_entry(value.shape[:-1]).to(value.device)[..., None]
    text, there, back = space.proposals(state.values)[name].refill(value, masks)
    new = space.at({**state.values, name: text}, state.steps)
    ratio = (1 - beta) * (new.log_q - state.log_q) + beta * (new.log_p - state.log_p) + space.summed(back - there)
    return accepted(state, new, ratio)


def accepted(state: Configuration, new: Configuration, log_ratio: Tensor) -> Configuration:
    """The new configuration in the units where the move is accepted, with probability ``min(1, exp(log_ratio))``."""
    height = torch.rand(log_ratio.shape, dtype=torch.float64).to(log_ratio.device)
    # Comparisons with NaN, of two configurations of probability zero, are false.
    return state.with_taken((height.log() < log_ratio) & ~state.log_p.isneginf(), new)


def choose_site(space: Configurations) -> str:
    """One of the sites, the same for all units."""
    return space.names[int(torch.randint(len(space.names), ()))]


def draw_masks(value: Tensor) -> Tensor:
    """Random tokens of each text: ``m`` of its ``n`` with probability log((m+1)/m) / log(n+1), all sets of a size
    alike. Boolean, of the value's shape.

    Few tokens are accepted more often, and all of them are no other move than a draw of the same length.
    """
    count = lengths(value)
    height = torch.rand(count.shape, dtype=torch.float64).to(value.device)
    size = ((count + 1).double() ** height).long().clamp(min=1).minimum(count)
    keys = torch.rand(value.shape, dtype=torch.float64).to(value.device).masked_fill(value == PAD, 2.0)
    return (keys.argsort(-1).argsort(-1) < size[..., None]) & (value != PAD)
