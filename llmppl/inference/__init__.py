"""Inference: each function returns a :class:`~llmppl.inference.posterior.Posterior`."""

from llmppl.inference.enumeration import exact_posterior
from llmppl.inference.importance import importance
from llmppl.inference.posterior import Posterior

__all__ = ["Posterior", "exact_posterior", "importance"]
