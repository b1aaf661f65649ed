"""Ready guides for programs with latent text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmppl.numpyro.guides.autoregressive import AutoregressiveGuide
    from llmppl.numpyro.guides.gflownet import GFlowNetGuide
    from llmppl.numpyro.guides.prompt import PromptGuide
    from llmppl.numpyro.guides.soft_prompt import SoftPromptGuide
    from llmppl.numpyro.guides.text_guide import TextGuide

_PUBLIC = {
    "AutoregressiveGuide": "llmppl.numpyro.guides.autoregressive",
    "GFlowNetGuide": "llmppl.numpyro.guides.gflownet",
    "PromptGuide": "llmppl.numpyro.guides.prompt",
    "SoftPromptGuide": "llmppl.numpyro.guides.soft_prompt",
    "TextGuide": "llmppl.numpyro.guides.text_guide",
}

__all__ = ["AutoregressiveGuide", "GFlowNetGuide", "PromptGuide", "SoftPromptGuide", "TextGuide"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'llmppl.numpyro.guides' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
