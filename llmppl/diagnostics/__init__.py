"""How far a guide is from the posterior."""

from llmppl.diagnostics.bounds import Bounds, bounds
from llmppl.diagnostics.gap import InferenceGap, inference_gap

__all__ = ["Bounds", "InferenceGap", "bounds", "inference_gap"]
