"""How far a guide is from the posterior."""

from llmppl.diagnostics.gap import InferenceGap, inference_gap

__all__ = ["InferenceGap", "inference_gap"]
