"""Folders to write to."""

from __future__ import annotations

import os
from pathlib import Path


def made(path: str | os.PathLike[str]) -> Path:
    """A folder, made with those above it where they do not exist.

    :raises NotADirectoryError: it, or one above it, is a file.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next((own for own in (folder, *folder.parents) if own.is_file()), folder)
        raise NotADirectoryError(f"{folder} cannot be a folder: {file} is a file. Choose another path.") from error
    return folder
