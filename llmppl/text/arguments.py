"""Arguments that every call has, refused where they cannot be what they are called."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
HUB_NAME = re.compile(f"{_WORD}(?:/{_WORD})?")
"""How the Hugging Face hub names models, alone or behind who has made them."""


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


def check_arguments(program: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse arguments that a program does not take, before it is run within a framework.

    :raises TypeError: naming what it takes.
    """
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple of the program's arguments, got {args!r}.")
    try:
        signature = inspect.signature(getattr(program, "forward", program))
    except (TypeError, ValueError):  # of a builtin: it says itself what is wrong
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(program, "__name__", type(program).__name__)
        raise TypeError(
            f"the program's arguments do not fit: {name}{signature} was called with {len(args)} by place"
            f"{''.join(f', {key}=' for key in kwargs)}: {error}. Pass one value for each."
        ) from None


def check_endings(endings: Any) -> None:
    """Refuse what is no list of name endings of layers.

    :raises TypeError: naming the mend.
    """
    if isinstance(endings, (str, bytes, Mapping)) or not isinstance(endings, Iterable) or hasattr(endings, "shape"):
        raise TypeError(f"target_modules={endings!r} must be a list of name endings of layers, such as ['q_proj'].")
    for ending in endings:
        if not isinstance(ending, str):
            raise TypeError(f"target_modules holds {ending!r}. Give name endings of layers, such as 'q_proj'.")


def check_name(name_or_folder: Any) -> None:
    """Refuse what names no model.

    :raises TypeError: neither a string nor a path of one.
    :raises ValueError: what is neither a folder nor can be a name of the hub.
    """
    if not isinstance(name_or_folder, str) and not isinstance(getattr(name_or_folder, "__fspath__", bytes)(), str):
        raise TypeError(f"name_or_folder must be a model's name or a folder's path, got {name_or_folder!r}.")
    name = os.fspath(name_or_folder)
    try:
        folder = Path(name).is_dir()
    except OSError as error:
        raise ValueError(f"name_or_folder={name[:40]!r}... can be no path: {error.strerror}.") from error
    if not HUB_NAME.fullmatch(name) and not name.startswith(("/", ".", "~")) and not folder:
        raise ValueError(
            f"name_or_folder={name!r} is no folder here, and no name of the hub, such as 'organisation/model', either. "
            "Pass a folder made by save_pretrained, or check how the name is written."
        )


def unavailable(name: str, error: Exception) -> FileNotFoundError:
    """What a name says whose model cannot be had, in the first sentence of the hub's client."""
    why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return FileNotFoundError(
        f"name_or_folder={name!r} cannot be loaded: {why} Pass a folder made by save_pretrained, or the packaged "
        "'smollm2-135m'."
    )


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
