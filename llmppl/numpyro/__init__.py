"""The same programs, guides and diagnostics for NumPyro, in JAX, without torch."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmppl.numpyro.distributions.torch_likelihood import TorchLikelihood
    from llmppl.numpyro.inference.bounds import bounds
    from llmppl.numpyro.inference.enumeration import exact_posterior
    from llmppl.numpyro.inference.importance import importance
    from llmppl.numpyro.inference.replication import replicate
    from llmppl.numpyro.inference.smc import smc
    from llmppl.numpyro.language_model import LM
    from llmppl.numpyro.network.lifting import jit
    from llmppl.numpyro.training.fit import fit
    from llmppl.posterior.inference_gap import inference_gap
    from llmppl.posterior.posterior import Posterior

if any(find_spec(name) is None for name in ("jax", "numpyro")):
    raise ModuleNotFoundError(
        "llmppl.numpyro needs jax and numpyro, which are optional. Install them with:  "
        "pip install 'pyro-llmppl[numpyro]'"
    )

_PUBLIC = {
    "LM": "llmppl.numpyro.language_model",
    "Posterior": "llmppl.posterior.posterior",
    "TorchLikelihood": "llmppl.numpyro.distributions.torch_likelihood",
    "bounds": "llmppl.numpyro.inference.bounds",
    "exact_posterior": "llmppl.numpyro.inference.enumeration",
    "fit": "llmppl.numpyro.training.fit",
    "importance": "llmppl.numpyro.inference.importance",
    "inference_gap": "llmppl.posterior.inference_gap",
    "jit": "llmppl.numpyro.network.lifting",
    "replicate": "llmppl.numpyro.inference.replication",
    "smc": "llmppl.numpyro.inference.smc",
}

__all__ = [
    "LM",
    "Posterior",
    "TorchLikelihood",
    "bounds",
    "exact_posterior",
    "fit",
    "importance",
    "inference_gap",
    "jit",
    "replicate",
    "smc",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'llmppl.numpyro' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
