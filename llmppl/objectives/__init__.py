"""Objectives that train guides for latent text; each is a pyro ``ELBO``."""

from llmppl.objectives.chain_score import ChainScore
from llmppl.objectives.denoising import Denoising
from llmppl.objectives.off_policy import OffPolicyObjective
from llmppl.objectives.particle_objective import ParticleObjective
from llmppl.objectives.subtrajectory_balance import DetailedBalance, SubTrajectoryBalance
from llmppl.objectives.trajectory_balance import TrajectoryBalance
from llmppl.objectives.variational import LeaveOneOutELBO
from llmppl.objectives.wake_sleep import WakeSleep

__all__ = [
    "ChainScore",
    "Denoising",
    "DetailedBalance",
    "LeaveOneOutELBO",
    "OffPolicyObjective",
    "ParticleObjective",
    "SubTrajectoryBalance",
    "TrajectoryBalance",
    "WakeSleep",
]
