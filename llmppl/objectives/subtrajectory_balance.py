"""Subtrajectory balance over texts that may end at every prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from llmppl.distributions.autoregressive import AutoregressiveText
from llmppl.objectives.trajectory_balance import OffPolicyObjective
from llmppl.text import PAD, lengths
from llmppl.tracing import (
    Given,
    Particles,
    Program,
    check_finite,
    compute_log_prob,
    in_particles,
    is_latent,
    sum_sites,
    text_sites,
)


class SubTrajectoryBalance(OffPolicyObjective):
    r"""Subtrajectory balance [1] in the form for terminable states of [2].

    Every prefix of a sampled text, ended by a stop token ⊤, is a text of its own with reward
    :math:`R(z_{1:t}\top)`, the program's joint. With the log-weight
    :math:`A_t = \log R(z_{1:t}\top) - \log q(z_{1:t}\top|x)`,

    .. math:: \mathcal L(x) = \frac1K\sum_k \sum_{i<j} \omega_{ij}\,(A_i - A_j)^2,
              \qquad \omega_{ij} \propto \lambda^{j-i},\ \sum_{i<j}\omega_{ij} = 1

    which is eq. 3 of [2] after its sums of :math:`\log q` are collected. It is zero exactly where all
    texts have one weight, and needs no log-partition. A prefix shorter than ``min_tokens`` cannot end
    and is left out; a text cut at ``max_tokens`` ends without a stop token. Where several tokens stop a
    text, any of them closes a prefix rightly: the one that ended the sample is taken, or the first of
    the law.

    A step scores the program at every prefix; prefixes of one text share their tokens in one pass.

    :param num_particles: ``K``.
    :param decay: λ; below 1 short subtrajectories count more.
    :param temperatures: particles take turns at these sampling temperatures, as in
        :class:`TrajectoryBalance`.

    References

    [1] Madan, Rector-Brooks, Korablyov, Bengio, Jain, Nica, Bosc, Bengio, Malkin (2023), `Learning
    GFlowNets from partial episodes for improved convergence and stability`.
    [2] Hu, Jain, Elmoznino, Kaddar, Lajoie, Bengio, Malkin (2024), `Amortizing intractable inference in
    large language models`, eq. 3.
    """

    def __init__(self, num_particles: int = 8, decay: float = 1.0, temperatures: Sequence[float] = (1.0,)) -> None:
        super().__init__(num_particles, temperatures)
        if not decay > 0:
            raise ValueError(f"decay={decay} must be positive.")
        self.decay = decay

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            particles = self._particles(model, guide, args, kwargs, self._temperatures())
        name, fn = _text_site(particles)
        assert fn.law.max_tokens is not None
        value = particles.guide_trace.nodes[name]["value"]  # (K, ..., T)
        texts, terminable = prefixes(value, fn.law.stop, fn.law.min_tokens, fn.law.max_tokens)
        count = texts.shape[0]
        # Every prefix of every particle is a particle: (J * K, ..., T).
        given = {name: texts.flatten(0, 1)}
        log_p, log_q = (self._score(f, args, kwargs, given, particles, count) for f in (model, guide))
        log_weights = (log_p - log_q).unflatten(0, (count, self.num_particles))  # (J, K) + batch_shape
        ends = self._rows(terminable, particles)
        return self._balance(log_weights, ends).mean(0).sum()

    def _score(
        self,
        program: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: dict[str, Tensor],
        particles: Particles,
        count: int,
    ) -> Tensor:
        number = count * self.num_particles
        with poutine.block(), Given(given):
            trace = poutine.trace(in_particles(program, number, particles.nesting)).get_trace(*args, **kwargs)
        compute_log_prob(trace)
        check_finite(trace)
        return sum_sites(trace, particles.axes, particles.nesting, number)

    def _rows(self, terminable: Tensor, particles: Particles) -> Tensor:
        """``(J, K) + batch_shape`` from the shape of the site."""
        full = terminable.reshape(
            terminable.shape[:2] + (1,) * (particles.nesting + 2 - terminable.dim()) + terminable.shape[2:]
        )
        inner = [d for d in range(-particles.nesting, 0) if d not in particles.axes]
        return full.all(dim=inner) if inner else full

    def _balance(self, log_weights: Tensor, ends: Tensor) -> Tensor:
        """Weighted mean of the squared differences over the pairs of prefixes that can end."""
        count = len(log_weights)
        place = torch.arange(count, device=log_weights.device)
        distance = (place[None] - place[:, None]).to(log_weights.dtype)  # (J, J): j - i
        shape = (count, count) + (1,) * (log_weights.dim() - 1)
        weight = torch.where(distance > 0, self.decay**distance, 0.0).reshape(shape)
        weight = weight * (ends[:, None] & ends[None])
        squares = (log_weights[:, None] - log_weights[None]).square()
        return (weight * squares).sum((0, 1)) / weight.sum((0, 1)).clamp(min=torch.finfo(weight.dtype).tiny)


def _text_site(particles: Particles) -> tuple[str, AutoregressiveText]:
    """The program's only latent site, a text that a stop token ends.

    :raises ValueError: any other program; names an objective that takes it.
    """
    trace = particles.guide_trace
    latent = [name for name, site in trace.nodes.items() if is_latent(site)]
    texts = text_sites(trace)
    instead = "Use TrajectoryBalance, which takes any program."
    if len(latent) != 1 or len(texts) != 1:
        raise ValueError(
            f"SubTrajectoryBalance takes programs with one latent site, a text; this one has {latent}. {instead}"
        )
    name, site = next(iter(texts.items()))
    fn = site["fn"]
    if not isinstance(fn, AutoregressiveText) or not len(fn.law.stop):
        raise ValueError(f"latent site {name!r} has no stop token, so its prefixes are no texts. {instead}")
    if fn.law.grammar is not None:
        raise ValueError(f"latent site {name!r} has a grammar, so its prefixes may be no texts. {instead}")
    return name, fn


def prefixes(value: Tensor, stop: Tensor, min_tokens: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Every prefix of texts, ended.

    :param value: ``batch_shape + (T,)`` with ``T = max_tokens``.
    :returns: texts ``(T + 1,) + batch_shape + (T,)``: entry ``j`` holds the first ``j`` tokens and a stop
        token, entry ``T`` a text cut at ``max_tokens``; and which of them are texts that the sample
        passed through, ``(T + 1,) + batch_shape``. Entries that are not repeat the sample itself.
    """
    length = lengths(value)
    last = value.gather(-1, (length - 1).clamp(min=0)[..., None])[..., 0]
    stopped = torch.isin(last, stop)
    closing = torch.where(stopped, last, stop[0])
    free = length - stopped.long()  # tokens before the stop token
    place = torch.arange(max_tokens, device=value.device)
    texts, valid = [], []
    for j in range(max_tokens + 1):
        if j < max_tokens:
            kept = torch.where(place < j, value, PAD)
            text = torch.where(place == j, closing[..., None], kept)
            reached = (free >= j) & (j + 1 >= min_tokens)
        else:
            text, reached = value, ~stopped
        texts.append(torch.where(reached[..., None], text, value))
        valid.append(reached)
    return torch.stack(texts), torch.stack(valid)
