"""What a training run keeps in its folder: checkpoints, metrics, TensorBoard's events.

A checkpoint is one file, ``step-00000123-<sha256>.pt``, whose name has the first 16 hexadecimal digits
of the hash of its bytes. It is written under another name and moved in place when it is on the disk, so
that a file of this name is whole; the name tells if it is not. The newest two are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import filelock
import torch

from llmppl.files.folders import made, unwritable

FORMAT = "llmppl-run-1"
KEPT = 2
PARTS = {"identity", "step", "tensors", "parts", "random"}
"""Of a run's state in a checkpoint."""
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")


class RunFolder:
    """The folder of a run. Made if it does not exist; what an interrupted write left behind is removed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = made(path)
        for leftover in self.path.glob("*.tmp-*"):
            leftover.unlink(missing_ok=True)
        self._board: Any = None
        self._lock: Any = None
        self._complained = False
        self._readable = False

    def claim(self) -> None:
        """Make the folder this process's until it is closed, or the process ends, however it ends.

        :raises ValueError: another run is writing to it.
        """
        for name in (".lock", self.metrics.name, "tensorboard"):
            if (self.path / name).is_symlink():
                raise ValueError(
                    f"{self.path / name} is a link, and a run writes within its folder alone. Delete it, or choose "
                    "another folder."
                )
        self._lock = filelock.FileLock(self.path / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except OSError as error:
            if isinstance(error, filelock.Timeout):
                raise ValueError(self._in_use()) from None
            raise unwritable(self.path / ".lock", error) from error

    def _in_use(self) -> str:
        said = "another run is writing to it now. Wait for it or stop it, or choose another folder."
        return f"{self.path} is in use: {said}"

    def checkpoints(self) -> list[Path]:
        """The newest first."""
        found = [(match, file) for file in self.path.iterdir() if (match := _NAME.fullmatch(file.name))]
        return [file for _, file in sorted(found, key=lambda pair: (-int(pair[0][1]), pair[1].name))]

    # --- checkpoints -------------------------------------------------------------------------------

    def save(self, step: int, state: dict[str, Any]) -> bool:
        """Write a checkpoint, and remove all but the newest two.

        :param state: tensors, numbers, strings, lists, tuples and dicts, nothing else.
        :returns: whether it was written. A disk that is full or otherwise fails makes a warning, and leaves the
            older checkpoints as they are.
        :raises TypeError: ``state`` holds something else.
        """
        content = _pack(state)
        if not self._readable:
            # Once: what cannot be read back is better known now than at the resumption.
            try:
                _unpack(content)
            except pickle.UnpicklingError as error:
                raise TypeError(
                    "a checkpoint holds tensors, numbers, strings, lists and dicts only, and something else is in "
                    f"the state of this run. Change what objective.state_dict() returns. ({error})"
                ) from None
            self._readable = True
        try:
            written = _write(self.path / f"step-{step:08d}-{_hash(content)}.pt", content)
        except OSError as error:
            warnings.warn(
                f"no checkpoint could be written to {self.path} at step {step} ({error}). Training goes on, and the "
                "next checkpoint is tried in its turn; those written before are intact. Make room on the disk.",
                stacklevel=3,
            )
            return False
        others = [file for file in self.checkpoints() if file != written]
        with contextlib.suppress(OSError):
            for file in others[KEPT - 1 :]:
                file.unlink(missing_ok=True)
        return True

    def load(self) -> dict[str, Any] | None:
        """The state of the newest checkpoint that is whole, or None where there is no checkpoint.

        Damaged ones that are newer are set aside, with a warning each.

        :raises ValueError: there are checkpoints, and all of them are damaged.
        """
        damaged: list[Path] = []
        files = self.checkpoints()
        for file in files:
            state = _read(file)
            if state is None:
                damaged.append(file)
                continue
            for bad in damaged:
                warnings.warn(
                    f"checkpoint {bad} is damaged: its bytes are not those that its name stands for. It is set aside, "
                    f"and {file.name} is used.",
                    stacklevel=3,
                )
                with contextlib.suppress(OSError):
                    bad.replace(bad.with_name(bad.name + ".damaged"))
            return state
        if files:
            raise ValueError(
                f"every checkpoint in {self.path} is damaged: {', '.join(file.name for file in files)}. Restore one of "
                "them from a copy, or start again in another folder."
            )
        return None

    # --- metrics -----------------------------------------------------------------------------------

    @property
    def metrics(self) -> Path:
        """One JSON object a line: a step's numbers, or an evaluation's."""
        return self.path / "metrics.jsonl"

    def begin(self, step: int) -> None:
        """Drop the metrics of steps after ``step``, which are about to be taken again, and open TensorBoard's
        events if it is installed.

        :param step: of the checkpoint; 0 is a run from the start, of which no line is left.
        """
        try:
            if self.metrics.exists():
                lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                _write(self.metrics, "".join(line for line in lines if step and _belongs(line, step)).encode())
        except OSError as error:
            self._complain(error)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)
        except ImportError:
            pass
        except OSError as error:
            self._complain(error)

    def record(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Append a line to the metrics. A disk that fails makes one warning.

        :param event: ``"step"`` or ``"evaluation"``.
        """
        line = json.dumps({"event": event, "step": step, **{k: _finite(v) for k, v in values.items() if k != "step"}})
        try:
            self._append(line + "\n")
            if self._board is not None:
                for key, value in values.items():
                    if isinstance(value, float) and math.isfinite(value):
                        self._board.add_scalar(f"{event}/{key}", value, step)
        except OSError as error:
            self._complain(error)

    def _append(self, line: str) -> None:
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            # Half a line would spoil the next one.
            with contextlib.suppress(OSError):
                os.truncate(self.metrics, size)
            raise

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            warnings.warn(f"metrics of {self.path} cannot be written ({error}). Training goes on.", stacklevel=4)
        self._complained = True


def _pack(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    return buffer.getvalue()


def _unpack(content: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _read(file: Path) -> dict[str, Any] | None:
    """The state in a file, or None if it is damaged."""
    try:
        content = file.read_bytes()
    except OSError:  # a folder, a link to nowhere, a disk that fails
        return None
    match = _NAME.fullmatch(file.name)
    if match is None or _hash(content) != match[2]:
        return None
    try:
        state = _unpack(content)
    # Whatever a reader of foreign bytes raises; nothing in them is run.
    except Exception as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{file} was not written by fit: it is no file of tensors, numbers, strings, lists and dicts ({why[0]}) "
            "Delete it, and do not trust what it came with."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= PARTS:
        raise ValueError(
            f"{file} was written by another version of fit. Resume it with that, or choose another folder."
        )
    return state


def _write(path: Path, content: bytes) -> Path:
    """A file written whole or not at all, even if the machine stops."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    # Not every file system can, and the file itself is safe.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path


def _belongs(line: str, step: int) -> bool:
    """Whether a line of metrics is whole and not after a step."""
    try:
        return line.endswith("\n") and int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
