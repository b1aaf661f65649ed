"""Trajectory balance, with a learned log-partition or its VarGrad form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmppl.objectives.behaviour import Behaviour
from llmppl.objectives.off_policy import OffPolicyObjective
from llmppl.objectives.particle_objective import program_loss
from llmppl.programs.structure import Program
from llmppl.text.declared import declared


class TrajectoryBalance(OffPolicyObjective):
    r"""Trajectory balance [1], an off-policy objective: any particles serve.

    ``log_partition="vargrad"`` [2, 3], for each observation :math:`x` the sample variance over its
    own ``K`` particles,

    .. math:: \mathcal L(x) = \operatorname{Var}_k\left[\log q(z_k|x) - \log p(x, z_k)\right]

    On-policy its expected gradient is :math:`2 \nabla \mathrm{KL}(q \| p)`, with the leave-one-out
    baseline of :class:`LeaveOneOutELBO`.

    ``log_partition="learned"``, with the guide's own :math:`\log Z_\theta(x)`
    (:class:`~llmppl.guides.GFlowNetGuide` has one),

    .. math:: \mathcal L(x) = \frac1K\sum_k\left(\log Z_\theta(x) + \log q(z_k|x) - \log p(x, z_k)\right)^2

    Both are zero exactly where the guide is the posterior. A step costs one sampling pass of the guide,
    one scoring pass of the model and one gradient pass of the guide.

    :param num_particles: ``K``.
    :param log_partition: ``"vargrad"`` or ``"learned"``.
    :param behaviour: where particles come from, a :class:`~llmppl.Behaviour`; by default from the guide.
    :param floor: nats that stand for a joint that is less, as of a hard condition (−inf); a bias, see
        :class:`~llmppl.objectives.off_policy.OffPolicyObjective`.

    References

    [1] Malkin, Jain, Bengio, Sun, Bengio (2022), `Trajectory balance: improved credit assignment in GFlowNets`.
    [2] Richter, Boustati, Nüsken, Ruiz, Akyildiz (2020), `VarGrad: a low-variance gradient
    estimator for variational inference`.
    [3] Zhang, Rainone, Peschl, Bondesan (2023), `Robust scheduling with GFlowNets`.
    """

    @declared
    def __init__(
        self,
        num_particles: int = 8,
        log_partition: str = "vargrad",
        behaviour: Behaviour | None = None,
        floor: float | None = None,
    ) -> None:
        super().__init__(num_particles, behaviour, floor)
        if log_partition not in ("vargrad", "learned"):
            raise ValueError(f"log_partition={log_partition!r} must be 'vargrad' or 'learned'.")
        self.log_partition = log_partition

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        call, particles = self._off_policy_particles(model, guide, args, kwargs)
        chosen = call.on_policy.to(particles.log_p.device)
        learned = program_loss(call.model, particles.log_p[chosen], particles.log_weights[chosen])
        excess = particles.log_q - particles.log_p.detach() / self.target_temperature  # (K,) + batch_shape
        if self.log_partition == "vargrad":
            return excess.var(0).sum() + learned
        if not hasattr(guide, "log_partition"):
            raise TypeError(
                f"log_partition='learned' needs a guide with log_partition(*args), and {type(guide).__name__} has "
                "none. Use GFlowNetGuide, or log_partition='vargrad'."
            )
        log_z = call.guide.log_partition(*args, **kwargs)  # type: ignore[attr-defined]
        rows = excess.shape[1:]
        if log_z.shape != rows:
            raise ValueError(
                f"guide.log_partition(*args) has shape {tuple(log_z.shape)}, but the program has observations of "
                f"shape {tuple(rows)}: rows that share a latent are one observation. Use log_partition='vargrad'."
            )
        return (log_z + excess).square().mean(0).sum() + learned

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "log_partition": self.log_partition}
