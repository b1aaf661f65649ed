"""The safetensors files of trained guides: what is in them, and whether it fits. The same for torch and JAX."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llmppl.files.folders import written_whole

FORMAT = "llmppl-adapter-1"
"""Names the format of a guide's file, in the file itself."""
HASH = "sha256"
"""Of the header without it, and of all numbers."""
BLANK = "0" * 64
"""Stands in a hash's place until it is known."""
MOST_HEADER = 100_000_000
"""Bytes, as in the readers of the format."""


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

    def write(temporary: str) -> None:
        save_file(dict(tensors), temporary, metadata={**metadata, HASH: BLANK})
        _put_hash(Path(temporary))

    written_whole(path, write)


def check_whole(path: Path) -> None:
    """Refuse a safetensors file whose bytes are not those that were written. One of another writer has no hash.

    :raises ValueError: damaged.
    """
    stored = _header(path).get("__metadata__", {})
    if isinstance(stored, dict) and stored.get(HASH, "") and stored[HASH] != _hash(path):
        raise ValueError("its bytes are not those that were written")


def _header(path: Path) -> dict[str, Any]:
    """What stands before the numbers.

    :raises ValueError: none.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(path.stat().st_size, MOST_HEADER):
            raise ValueError("its header is cut off")
        try:
            found = json.loads(file.read(size))
        except RecursionError:
            raise ValueError("its header is no header") from None
    if not isinstance(found, dict):
        raise ValueError("its header is no header")
    return found


def _put_hash(path: Path) -> None:
    """Write the hash, which is of what is written, where its place has been kept."""
    found = _hash(path)
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
        place = header.index(f'"{HASH}":"{BLANK}"'.encode()) + len(f'"{HASH}":"')
        file.seek(8 + place)
        file.write(found.encode())


def _hash(path: Path) -> str:
    header = _header(path)
    described = header.get("__metadata__", {})
    kept = {**header, "__metadata__": {k: v for k, v in described.items() if k != HASH}}
    state = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The guide settings of an adapter file.

    :raises FileNotFoundError, ValueError: missing or damaged.
    """
    path = Path(path)
    with _open(path, "numpy") as file:
        return _stored(path, file.metadata(), "settings")


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
            stored = _stored(path, metadata, kind)
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


def _stored(path: Path, metadata: Mapping[str, str], kind: str) -> dict[str, Any]:
    """What a file says that it belongs to.

    :raises ValueError: nothing, or no JSON.
    """
    try:
        found = json.loads(metadata[kind])
    except (KeyError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: what it says of its {kind} cannot be read. Train and save it again.")
    return found


def _open(path: Path, framework: str) -> Any:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and an adapter is a file. Give the file's name.")
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file {path}. Write one with guide.save(path).")
    try:
        check_whole(path)
        file = safe_open(str(path), framework=framework)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}). Train and save it again.") from None
    if (file.metadata() or {}).get("format") != FORMAT:
        raise ValueError(f"{path} was not written by guide.save of this library.")
    return file
