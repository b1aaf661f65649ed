"""How far a guide is from the posterior."""

from llmppl.diagnostics.bounds import Bounds, bounds
from llmppl.diagnostics.gap import InferenceGap, inference_gap
from llmppl.diagnostics.gap_report import gap_report
from llmppl.diagnostics.gaps import GapReport, Gaps

__all__ = ["Bounds", "GapReport", "Gaps", "InferenceGap", "bounds", "gap_report", "inference_gap"]
