"""Folders and files to write to: whole or not at all, and what to do where they cannot be written."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Callable
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
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder


def written_whole(path: str | os.PathLike[str], write: Callable[[str], object]) -> Path:
    """A file written whole or not at all: what was there before stays until the new one is on the disk.

    :param write: writes the file that it is given the path of, one beside ``path``.
    :raises OSError: with the path and the mend.
    """
    path = Path(path)
    made(path.parent)
    try:
        folder = path.is_dir()
    except OSError as error:  # a name that is too long
        raise unwritable(path, error) from error
    if folder:
        raise IsADirectoryError(f"{path} is a folder, and a file is to be written. Give a file's name.")
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name[:100] + ".tmp-")
        os.close(handle)
        write(temporary)
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        failed = _of_the_system(error)
        if failed is None:
            raise
        raise unwritable(path, failed) from error
    return path


def unwritable(path: Path, error: OSError) -> OSError:
    """What a path that cannot be written says: why, and the mend. Of the same type and number."""
    mend = {
        errno.ENOSPC: "Make room on the disk, or choose another path",
        errno.EDQUOT: "Make room within the quota, or choose another path",
        errno.EFBIG: "Raise the limit of a file's size (ulimit -f), or choose another path",
        errno.EACCES: "Choose a path that you may write to",
        errno.EPERM: "Choose a path that you may write to",
        errno.EROFS: "Choose a path that can be written to",
        errno.ENAMETOOLONG: "Choose a shorter name",
    }.get(error.errno or 0, "Choose another path")
    why = os.strerror(error.errno) if error.errno else str(error)
    return OSError(error.errno or errno.EIO, f"{path} cannot be written: {why}. {mend}; what was there is as it was.")


def _of_the_system(error: BaseException) -> OSError | None:
    """The system's error in what a library for files made of it."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)|[Ee]rrno (?:= )?(\d+)", str(error))
    return None if number is None else OSError(int(number[1] or number[2]), str(error))
