"""How far a guide is from the posterior."""

from llmppl.diagnostics.calibration import Calibration, Coverage, calibrate, expected_coverage
from llmppl.diagnostics.findings import Finding
from llmppl.diagnostics.gap_report import gap_report
from llmppl.diagnostics.verdict import Diagnosis, diagnose
from llmppl.inference.bounds import bounds
from llmppl.posterior.brackets import Bounds
from llmppl.posterior.gap_parts import GapReport, Gaps
from llmppl.posterior.inference_gap import InferenceGap, inference_gap

__all__ = [
    "Bounds",
    "Calibration",
    "Coverage",
    "Diagnosis",
    "Finding",
    "GapReport",
    "Gaps",
    "InferenceGap",
    "bounds",
    "calibrate",
    "diagnose",
    "expected_coverage",
    "gap_report",
    "inference_gap",
]
