"""Objectives for guides over latent text: each an ELBO of NumPyro's."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmppl.numpyro.objectives.behaviour import Behaviour
    from llmppl.numpyro.objectives.optimizers import optimizer
    from llmppl.numpyro.objectives.particle_objective import ParticleObjective
    from llmppl.numpyro.objectives.trajectory_balance import TrajectoryBalance
    from llmppl.numpyro.objectives.variational import LeaveOneOutELBO
    from llmppl.numpyro.objectives.wake_sleep import WakeSleep

_PUBLIC = {
    "Behaviour": "llmppl.numpyro.objectives.behaviour",
    "LeaveOneOutELBO": "llmppl.numpyro.objectives.variational",
    "ParticleObjective": "llmppl.numpyro.objectives.particle_objective",
    "TrajectoryBalance": "llmppl.numpyro.objectives.trajectory_balance",
    "WakeSleep": "llmppl.numpyro.objectives.wake_sleep",
    "optimizer": "llmppl.numpyro.objectives.optimizers",
}

__all__ = ["Behaviour", "LeaveOneOutELBO", "ParticleObjective", "TrajectoryBalance", "WakeSleep", "optimizer"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'llmppl.numpyro.objectives' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
