"""Adapters as safetensors files of torch tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmppl.files import guide_file
from llmppl.files.guide_file import FORMAT, read_settings

__all__ = ["FORMAT", "load_adapter", "read_settings", "save_adapter"]


def save_adapter(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Write named tensors with what they belong to.

    :param model: fingerprint of the language model.
    :param settings: of the guide.
    """
    stored = {key: tensor.detach().to(dtype).cpu().contiguous() for key, tensor in tensors.items()}
    guide_file.write(path, stored, model, settings, save_file)


def load_adapter(
    path: str | os.PathLike[str],
    expected: Mapping[str, Tensor],
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Read the tensors of an adapter file after checking that they fit.

    :raises FileNotFoundError, ValueError: naming what differs.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    return guide_file.read(path, shapes, model, settings, "pt", lambda tensor: bool(tensor.isfinite().all()))
