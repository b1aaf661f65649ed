"""How far a guide is from the posterior."""

from llmppl.diagnostics.bounds import Bounds, bounds
from llmppl.diagnostics.calibration import Calibration, Coverage, calibrate, expected_coverage
from llmppl.diagnostics.gap import InferenceGap, inference_gap

__all__ = [
    "Bounds",
    "Calibration",
    "Coverage",
    "InferenceGap",
    "bounds",
    "calibrate",
    "expected_coverage",
    "inference_gap",
]
