"""Language models as Pyro distributions, with amortized guides and exact weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmppl.diagnostics.calibration import calibrate, expected_coverage
    from llmppl.diagnostics.gap_report import gap_report
    from llmppl.diagnostics.verdict import diagnose
    from llmppl.inference.answering import answer
    from llmppl.inference.bounds import bounds
    from llmppl.inference.decoding import decode
    from llmppl.inference.enumeration import exact_posterior
    from llmppl.inference.importance import importance
    from llmppl.inference.mcmc import mcmc
    from llmppl.inference.predictive import predict
    from llmppl.inference.replication import replicate
    from llmppl.inference.smc import smc
    from llmppl.language_model import LM
    from llmppl.masked_lm import MaskedLM
    from llmppl.network.embedded import Embedded
    from llmppl.network.vllm_engine import VLLM
    from llmppl.objectives.behaviour import Behaviour
    from llmppl.objectives.replay_buffer import ReplayBuffer
    from llmppl.posterior.inference_gap import inference_gap
    from llmppl.posterior.posterior import Posterior
    from llmppl.text.grammar import Grammar
    from llmppl.training.evaluation import Evaluation
    from llmppl.training.fit import fit
    from llmppl.training.gain import held_out_gain
    from llmppl.training.ray_samplers import RaySamplers
    from llmppl.training.regularisation import Regularisation
    from llmppl.training.simulated_set import SimulatedSet
    from llmppl.training.simulated_stream import SimulatedStream, simulate

__version__ = "0.1.0"
"""The library's version."""

_PUBLIC = {
    "Behaviour": "llmppl.objectives.behaviour",
    "Embedded": "llmppl.network.embedded",
    "Evaluation": "llmppl.training.evaluation",
    "Grammar": "llmppl.text.grammar",
    "LM": "llmppl.language_model",
    "MaskedLM": "llmppl.masked_lm",
    "Posterior": "llmppl.posterior.posterior",
    "RaySamplers": "llmppl.training.ray_samplers",
    "Regularisation": "llmppl.training.regularisation",
    "ReplayBuffer": "llmppl.objectives.replay_buffer",
    "SimulatedSet": "llmppl.training.simulated_set",
    "SimulatedStream": "llmppl.training.simulated_stream",
    "VLLM": "llmppl.network.vllm_engine",
    "answer": "llmppl.inference.answering",
    "bounds": "llmppl.inference.bounds",
    "calibrate": "llmppl.diagnostics.calibration",
    "diagnose": "llmppl.diagnostics.verdict",
    "decode": "llmppl.inference.decoding",
    "exact_posterior": "llmppl.inference.enumeration",
    "expected_coverage": "llmppl.diagnostics.calibration",
    "fit": "llmppl.training.fit",
    "gap_report": "llmppl.diagnostics.gap_report",
    "held_out_gain": "llmppl.training.gain",
    "importance": "llmppl.inference.importance",
    "inference_gap": "llmppl.posterior.inference_gap",
    "mcmc": "llmppl.inference.mcmc",
    "predict": "llmppl.inference.predictive",
    "replicate": "llmppl.inference.replication",
    "simulate": "llmppl.training.simulated_stream",
    "smc": "llmppl.inference.smc",
}

__all__ = [
    "LM",
    "VLLM",
    "Behaviour",
    "Embedded",
    "Evaluation",
    "Grammar",
    "MaskedLM",
    "Posterior",
    "RaySamplers",
    "Regularisation",
    "ReplayBuffer",
    "SimulatedSet",
    "SimulatedStream",
    "__version__",
    "answer",
    "bounds",
    "calibrate",
    "decode",
    "diagnose",
    "exact_posterior",
    "expected_coverage",
    "fit",
    "gap_report",
    "held_out_gain",
    "importance",
    "inference_gap",
    "mcmc",
    "predict",
    "replicate",
    "simulate",
    "smc",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'llmppl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
