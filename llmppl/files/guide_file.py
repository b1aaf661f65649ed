"""The safetensors files of trained guides: what is in them, and whether it fits. The same for torch and JAX."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llmppl.files.folders import written_whole

FORMAT = "llmppl-adapter-1"


def write(
    path: str | os.PathLike[str],
    tensors: dict[str, Any],
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    save_file: Callable[..., None],
) -> None:
    """Write named tensors with what they belong to, whole or not at all.

    :param model: fingerprint of the language model.
    :param settings: of the guide.
    :param save_file: of ``safetensors.torch`` or ``safetensors.numpy``.
    """
    metadata = {"format": FORMAT, "model": json.dumps(dict(model)), "settings": json.dumps(dict(settings))}
    written_tensors(Path(path), tensors, metadata, save_file)


def written_tensors(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str], save_file: Callable[..., None]
) -> None:
    """A safetensors file, written whole or not at all.

    :param save_file: of ``safetensors.torch`` or ``safetensors.numpy``.
    """
    written_whole(path, lambda temporary: save_file(dict(tensors), temporary, metadata=dict(metadata)))


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The guide settings of an adapter file.

    :raises FileNotFoundError, ValueError: missing or damaged.
    """
    with _open(Path(path), "numpy") as file:
        return dict(json.loads(file.metadata()["settings"]))


def read(
    path: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int, ...]],
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    framework: str,
    is_finite: Callable[[Any], bool],
) -> dict[str, Any]:
    """Read the tensors of an adapter file after checking that they fit.

    :param shapes: of the guide's own tensors, by name.
    :param framework: whose tensors to return, as ``safe_open`` names it.
    :raises FileNotFoundError, ValueError: naming what differs.
    """
    path = Path(path)
    with _open(path, framework) as file:
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
        if names != set(shapes):
            odd = sorted(names ^ set(shapes))[0]
            raise ValueError(
                f"{path} does not fit this guide: {odd!r} is on one side only. Make the guide with the "
                "same target_modules as the saved one."
            )
        tensors = {name: file.get_tensor(name) for name in names}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise ValueError(
                f"{path} does not fit this guide: {name!r} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(shapes[name])}. Make the guide with the saved one's rank."
            )
        if not is_finite(tensor):
            raise ValueError(f"{path} is damaged: {name!r} holds numbers that are not finite.")
    return tensors


def _open(path: Path, framework: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file {path}. Write one with guide.save(path).")
    try:
        file = safe_open(str(path), framework=framework)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}). Train and save it again.") from None
    if (file.metadata() or {}).get("format") != FORMAT:
        raise ValueError(f"{path} was not written by guide.save of this library.")
    return file
