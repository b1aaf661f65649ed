"""Subtrajectory balance and detailed balance over texts that may end at every prefix."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from llmppl.objectives.behaviour import Behaviour
from llmppl.objectives.off_policy import Call, OffPolicyObjective
from llmppl.objectives.particle_objective import diagnostics, program_loss
from llmppl.objectives.prefix_states import States, ended_prefixes
from llmppl.programs.observations import Given, original
from llmppl.programs.particles import (
    check_finite,
    common_shape,
    compute_log_prob,
    drops,
    log_q_drawn,
    propose,
    run_model,
    sum_sites,
)
from llmppl.programs.plates import check_whole, has_data_plate, in_particles
from llmppl.programs.structure import Program, learns, structure
from llmppl.text.arguments import check_count
from llmppl.text.declared import declared


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

    With several latent texts each continues the trajectory of the former: the states are the first
    text's prefixes, then the second's after the whole first, and so on. A state is ended by a stop
    token, and the later texts, and latents that are no such texts, are those of the sample; every
    state is then a configuration with a joint and a log q of its own, whose weights must all be equal.

    A step scores the program at every prefix; prefixes of one text share their tokens in one pass. With ``every=``
    more than one only prefixes of multiples of so many tokens are states, and the texts as they are: fewer to score
    where texts are long. The weights of a subset of states are equal where all are, so that the posterior is zero of
    this loss, too; interpolating rewards between every so many prefixes [3, eq. 8] moves it.

    :param num_particles: ``K``.
    :param decay: λ; below 1 short subtrajectories count more.
    :param behaviour: where particles come from, a :class:`~llmppl.Behaviour`; by default from the guide.
    :param floor: nats that stand for a joint that is less, as of a hard condition (−inf), which most prefixes of a text
        may violate; a bias, see :class:`~llmppl.objectives.off_policy.OffPolicyObjective`.
    :param every: tokens between the prefixes that are states.
    :raises TypeError, ValueError: ``every`` that is no number, or beyond a text's ``max_tokens``.

    References

    [1] Madan, Rector-Brooks, Korablyov, Bengio, Jain, Nica, Bosc, Bengio, Malkin (2023), `Learning
    GFlowNets from partial episodes for improved convergence and stability`.
    [2] Hu, Jain, Elmoznino, Kaddar, Lajoie, Bengio, Malkin (2024), `Amortizing intractable inference in
    large language models`, eq. 3.
    [3] Sun et al. (2025), `Latent chain-of-thought for visual reasoning`, arXiv:2510.23925.
    """

    # A single particle already has subtrajectories to compare.
    fewest_particles = 1

    @declared
    def __init__(
        self,
        num_particles: int = 8,
        decay: float = 1.0,
        behaviour: Behaviour | None = None,
        floor: float | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(num_particles, behaviour, floor)
        check_count(every=every)
        self.every = every
        if not decay > 0:
            raise ValueError(f"decay={decay} must be positive.")
        self.decay = float(decay)
        self._checked: Program | None = None

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        call = self.prepare(model, guide, args, kwargs)
        with torch.no_grad():
            trace, axes, nesting = propose(
                call.model, call.guide, args, kwargs, self.num_particles, behaviour=call.handler
            )
        drawn = log_q_drawn(trace, axes, nesting, self.num_particles) if drops(trace) else None
        states = ended_prefixes(trace, axes, nesting, type(self).__name__, self.every)
        sites = structure(call.model, args, kwargs)
        check_whole(sites, "SubTrajectoryBalance")
        learning = learns(sites)
        with torch.no_grad():
            log_p = self._log_p(call, trace, states, axes, nesting, not learning)  # (J, K) + batch_shape
        log_q = self._score(call.guide, call, states, axes, nesting)
        sampled_p, sampled_q = states.of_samples(log_p), states.of_samples(log_q)
        if self._checked is not original(model):
            self._check_prefixes(call, trace, sampled_p, axes, nesting)
            self._checked = original(model)
        chosen = call.on_policy.to(log_p.device)
        sampled = (sampled_p - (sampled_q if drawn is None else drawn)).detach()
        self.diagnostics = {**diagnostics(sampled[chosen]), "staleness": call.staleness}
        self.remember(call, trace, sampled_p, sampled, None if learning else log_p)
        learned = self._learned(call, trace, sampled, axes, nesting) if learning else 0.0
        log_p = self._floored(log_p)
        log_weights = log_p / self.target_temperature - log_q
        weight = self.pair_weights(states)  # (J, J, K) + batch_shape
        squares = (log_weights[:, None] - log_weights[None]).square()
        # A particle whose text can end at one place only has nothing to compare.
        total = weight.sum((0, 1)).clamp(min=torch.finfo(weight.dtype).tiny)
        return ((weight * squares).sum((0, 1)) / total).mean(0).sum() + learned

    def pair_weights(self, states: States) -> Tensor:
        """ω up to a factor for each pair of states, ``(J, J, K) + batch_shape``; zero where one is none."""
        distance = states.place[None] - states.place[:, None]
        weight = torch.where(distance > 0, self.decay ** distance.double(), 0.0)
        return weight * (states.valid[:, None] & states.valid[None])

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "decay": self.decay, **({} if self.every == 1 else {"every": self.every})}

    def _learned(
        self, call: Call, trace: poutine.Trace, log_weights: Tensor, axes: tuple[int, ...], nesting: int
    ) -> Tensor:
        """What the program learns by: at the samples alone, whose prefixes only the guide is judged by."""
        log_p = self._at_samples(call, trace, axes, nesting)
        chosen = call.on_policy.to(log_p.device)
        return program_loss(call.model, log_p[chosen], log_weights[chosen])

    def _at_samples(self, call: Call, trace: poutine.Trace, axes: tuple[int, ...], nesting: int) -> Tensor:
        """The program's joint at the samples, run without their prefixes."""
        scored = run_model(call.model, trace, call.args, call.kwargs, self.num_particles, nesting)
        compute_log_prob(scored)
        return sum_sites(scored, axes, nesting, self.num_particles)

    def _log_p(
        self, call: Call, trace: poutine.Trace, states: States, axes: tuple[int, ...], nesting: int, frozen: bool
    ) -> Tensor:
        """The program's joint at every state; of replayed particles it may be known, unless the program learns and is
        another by now."""
        known = call.known_log_p(len(states.place), common_shape(trace, axes), has_data_plate(trace))
        if known is not None and frozen:
            first = known.shape[1]
            rest = self._score(call.model, call, states, axes, nesting, first)
            return torch.cat([known.to(rest), rest], 1)
        return self._score(call.model, call, states, axes, nesting)

    def _score(
        self, program: Program, call: Call, states: States, axes: tuple[int, ...], nesting: int, first: int = 0
    ) -> Tensor:
        """Log-density at the states of the particles from ``first`` on."""
        shape = (len(states.place), self.num_particles - first)
        number = shape[0] * shape[1]
        values = {
            name: value.unflatten(0, (shape[0], self.num_particles))[:, first:].flatten(0, 1)
            for name, value in states.values.items()
        }
        try:
            with poutine.block(), Given(values):
                trace = poutine.trace(in_particles(program, number, nesting)).get_trace(*call.args, **call.kwargs)
        except Exception as error:
            raise ValueError(
                f"the program cannot be run at prefixes of its texts ({type(error).__name__}: {error}). "
                f"{type(self).__name__} needs the joint of every prefix, as particles of one plate: what the program "
                "does in Python must not depend on a latent text. Use TrajectoryBalance, which runs it at the samples "
                "only."
            ) from error
        compute_log_prob(trace)
        check_finite(trace, self.floor is not None and program is call.model)
        return sum_sites(trace, axes, nesting, number).unflatten(0, shape)

    def _check_prefixes(
        self, call: Call, trace: poutine.Trace, sampled: Tensor, axes: tuple[int, ...], nesting: int
    ) -> None:
        """Refuse a program whose joint at a text depends on which other particles are run.

        :raises ValueError: e.g. an observed site that Python cuts to the longest text of the batch.
        """
        with torch.no_grad(), poutine.block():
            alone = self._at_samples(call, trace, axes, nesting)
        same = alone == sampled.detach()  # −inf, both times
        difference = float(torch.where(same, 0.0, alone - sampled.detach()).abs().max())
        # Another batch sums in another order, half precision coarsely so; anything more is another density.
        single = alone.dtype in (torch.float32, torch.float64)
        size = float(torch.where(alone.isfinite(), alone, 0.0).abs().max())
        if not difference < (1e-3 if single else 0.05) * (1.0 + size):
            raise ValueError(
                f"the joint of a sampled text changes by {difference:.3g} nats when its prefixes are run beside it: "
                "the program depends in Python on the texts' lengths. Let observed sites and factors depend on each "
                f"particle's own tokens only, or use TrajectoryBalance in place of {type(self).__name__}."
            )


class DetailedBalance(SubTrajectoryBalance):
    r"""Detailed balance [1] in the form for terminable states [2]: :class:`SubTrajectoryBalance` between
    neighbouring states only,

    .. math:: \mathcal L(x) = \frac1K\sum_k\frac1{n_k}\sum_t\Big(\log\frac{R(z_{1:t}\top)\,q(z_{t+1}|z_{1:t})\,
              q(\top|z_{1:t+1})}{R(z_{1:t+1}\top)\,q(\top|z_{1:t})}\Big)^2

    A token is judged by what it changes at once, so that credit for a late reward travels slowly;
    :class:`SubTrajectoryBalance` and :class:`TrajectoryBalance` carry it in one step.

    :param num_particles: ``K``.
    :param behaviour: where particles come from, a :class:`~llmppl.Behaviour`; by default from the guide.
    :param floor: as of :class:`SubTrajectoryBalance`.

    References

    [1] Bengio, Lahlou, Deleu, Hu, Tiwari, Bengio (2023), `GFlowNet foundations`.
    [2] Deleu, Góis, Emezue, Rankawat, Lacoste-Julien, Bauer, Bengio (2022), `Bayesian structure learning with
    generative flow networks`.
    """

    @declared
    def __init__(self, num_particles: int = 8, behaviour: Behaviour | None = None, floor: float | None = None) -> None:
        super().__init__(num_particles, behaviour=behaviour, floor=floor)

    def pair_weights(self, states: States) -> Tensor:
        rank = states.valid.long().cumsum(0)  # states stand in the order of the trajectory
        neighbours = rank[None] - rank[:, None] == 1
        return (neighbours & states.valid[:, None] & states.valid[None]).double()
