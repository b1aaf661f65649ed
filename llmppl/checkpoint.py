"""Adapters as safetensors files, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "llmppl-adapter-1"


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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "model": json.dumps(dict(model)), "settings": json.dumps(dict(settings))}
    stored = {key: tensor.detach().to(dtype).cpu().contiguous() for key, tensor in tensors.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".tmp-")
    os.close(handle)
    try:
        save_file(stored, temporary, metadata=metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The guide settings of an adapter file.

    :raises FileNotFoundError, ValueError: missing or damaged.
    """
    with _open(Path(path)) as file:
        return json.loads(file.metadata()["settings"])


def load_adapter(
    path: str | os.PathLike[str],
    expected: Mapping[str, Tensor],
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Read the tensors of an adapter file after checking that they fit.

    :raises FileNotFoundError, ValueError: naming what differs.
    """
    path = Path(path)
    with _open(path) as file:
        metadata = file.metadata()
        for kind, wanted in (("model", model), ("settings", settings)):
            stored = json.loads(metadata[kind])
            for key, value in wanted.items():
                if stored.get(key) != value:
                    what = "language model" if kind == "model" else "guide"
                    raise ValueError(
                        f"{path} belongs to another {what}: its {key} is {stored.get(key)!r}, this one's is "
                        f"{value!r}. Make the guide as the saved one was made, or choose another file."
                    )
        names = set(file.keys())
        if names != set(expected):
            odd = sorted(names ^ set(expected))[0]
            raise ValueError(
                f"{path} does not fit this guide: {odd!r} is on one side only. Make the guide with the "
                "same target_modules as the saved one."
            )
        tensors = {name: file.get_tensor(name) for name in names}
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path} does not fit this guide: {name!r} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected[name].shape)}. Make the guide with the saved one's rank."
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path} is damaged: {name!r} holds numbers that are not finite.")
    return tensors


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file {path}. Write one with guide.save(path).")
    try:
        file = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}). Train and save it again.") from None
    if (file.metadata() or {}).get("format") != FORMAT:
        raise ValueError(f"{path} was not written by guide.save of this library.")
    return file
