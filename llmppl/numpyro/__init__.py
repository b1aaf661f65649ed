"""The same programs, guides and diagnostics for NumPyro, in JAX, without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmppl.numpyro.language_model import LM
    from llmppl.numpyro.lifting import jit
    from llmppl.numpyro.training import fit

_PUBLIC = {
    "LM": "llmppl.numpyro.language_model",
    "fit": "llmppl.numpyro.training",
    "jit": "llmppl.numpyro.lifting",
}

__all__ = ["LM", "fit", "jit"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'llmppl.numpyro' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
