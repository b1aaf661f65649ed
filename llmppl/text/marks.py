"""What is known of an object for as long as it lives, without touching it."""

from __future__ import annotations

import weakref
from typing import Any


class Marks:
    """Notes on objects by identity. A tensor compares entry by entry, so that no dictionary takes it as a key, and an
    attribute of its own would be copied and saved with it."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[weakref.ref[Any], Any]] = {}

    def put(self, target: Any, note: Any) -> None:
        key = id(target)
        self._notes[key] = (weakref.ref(target, lambda _: self._notes.pop(key, None)), note)

    def get(self, target: Any) -> Any:
        """The note, or ``None``."""
        found = self._notes.get(id(target))
        return found[1] if found is not None and found[0]() is target else None
