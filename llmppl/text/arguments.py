"""Arguments that every call has, refused where they cannot be what they are called."""

from __future__ import annotations

from typing import Any


def check_programs(**programs: Any) -> None:
    """Refuse a program or a guide that cannot be called.

    :raises TypeError: naming the argument and the mend.
    """
    for name, program in programs.items():
        if not callable(program):
            raise TypeError(
                f"{name} must be a function, a module or a guide, got {program!r}. Pass the function itself, not what "
                "it returns."
            )


def check_endings(endings: Any) -> None:
    """Refuse what is no list of name endings of layers.

    :raises TypeError: naming the mend.
    """
    if isinstance(endings, (str, bytes)) or not hasattr(endings, "__iter__"):
        raise TypeError(f"target_modules={endings!r} must be a list of name endings of layers, such as ['q_proj'].")
    for ending in endings:
        if not isinstance(ending, str):
            raise TypeError(f"target_modules holds {ending!r}. Give name endings of layers, such as 'q_proj'.")


def check_name(name_or_folder: Any) -> None:
    """Refuse what names no model.

    :raises TypeError: neither a string nor a path of one.
    """
    if not isinstance(name_or_folder, str) and not isinstance(getattr(name_or_folder, "__fspath__", bytes)(), str):
        raise TypeError(f"name_or_folder must be a model's name or a folder's path, got {name_or_folder!r}.")


def check_count(least: int = 1, **counts: Any) -> None:
    """Refuse numbers that count nothing.

    :raises TypeError: no whole number.
    :raises ValueError: below ``least``.
    """
    for name, count in counts.items():
        if isinstance(count, bool) or not hasattr(count, "__index__"):
            raise TypeError(f"{name} must be a whole number, got {count!r}.")
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}.")
