"""Arguments refused where they are not what a public signature declares, in one place for all of them.

A wrong argument would otherwise be found in the middle of a framework, by a traceback that names neither it nor a mend.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from llmppl.text.arguments import check_count, check_programs

F = TypeVar("F", bound=Callable[..., Any])

LARGEST = 2**31 - 1
"""Of a number that counts something: more is a mistake, and overflows frameworks' own integers."""

LEAST: dict[str, float] = {
    "clip_norm": 0.0,
    "height": 1,
    "hidden": 1,
    "learning_rate": 0.0,
    "log_partition_learning_rate": 0.0,
    "max_staleness": 0,
    "model_learning_rate": 0.0,
    "num_orders": 1,
    "num_virtual_tokens": 1,
    "output_tokens": 1,
    "prose_tokens": 0,
    "rank": 1,
    "result_tokens": 1,
    "seed": 0,
    "shortest": 1,
    "temperatures": 1,
    "warmup_steps": 0,
    "weight_decay": 0.0,
}
"""What a number of this name is at least, wherever it is an argument."""

SEEDS = 2**32
"""Seeds are below: NumPy's random numbers, which the others are started with, take no more."""

OWN = {"name_or_folder", "options", "target_modules", "text"}
"""Arguments with a check, and a sentence, of their own."""

OWN_RANGE = {"floor", "probs", "temperature", "x"}
"""Numbers whose range, NaN included, the function has a sentence for."""

FINITE = {"alpha", "decay", "learning_rate", "log_partition_learning_rate", "model_learning_rate", "weight_decay"}


def declared(function: F) -> F:
    """A function, or a method, that looks at its arguments' declared types before it does anything.

    What a declaration does not say in builtin types is left to the function itself.

    :raises TypeError: by the returned function: an argument of another type, by its name.
    :raises ValueError: a number that is NaN, or out of the range that its name has in this library.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # missing or unknown ones: Python's own call names them
            given = {}
        for name, value in given.items():
            parameter = signature.parameters[name]
            traced = type(value).__name__.endswith("Tracer")  # JAX's: known when the program runs
            if value is parameter.default or traced or name in OWN or parameter.kind is parameter.VAR_KEYWORD:
                continue
            if parameter.kind is parameter.VAR_POSITIONAL:
                for n, item in enumerate(value):
                    check_declared(f"{name}[{n}]", item, parameter.annotation)
            else:
                check_declared(name, value, parameter.annotation)
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def check_fields(options: Any) -> None:
    """The same of a dataclass, for its ``__post_init__``."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.init and value is not field.default:
            check_declared(field.name, value, field.type)


def check_declared(name: str, value: Any, annotation: Any) -> None:
    """Refuse a value that is of none of the types of an annotation, as far as these are builtin ones.

    :raises TypeError, ValueError: naming it.
    """
    parts = _alternatives(annotation) if isinstance(annotation, str) else ()
    known = [_CHECKS.get(part.split("[")[0] if part.startswith(("Callable", "Mapping", "dict")) else part)
             for part in parts]  # fmt: skip
    if not parts or not all(known):
        return
    if value is None and "None" in parts:
        return
    if "os.PathLike[str]" in parts and isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name} must be a path, and {_shown(value)} holds a null character. Give a file's path.")
    errors = []
    for part, check in zip(parts, known, strict=True):
        if part == "None" or check is None:
            continue
        try:
            check(name, value)
            return
        except (TypeError, ValueError) as error:
            errors.append(error)
    if len(errors) == 1 or isinstance(errors[0], ValueError):
        raise errors[0]
    raise TypeError(f"{name} must be {', or '.join(_WORDS.get(part, part) for part in parts)}, got {_shown(value)}.")


def _alternatives(annotation: str) -> tuple[str, ...]:
    """The parts of ``A | B[C | D] | None``."""
    found, depth = [""], 0
    for sign in annotation:
        depth += (sign == "[") - (sign == "]")
        if sign == "|" and not depth:
            found.append("")
        else:
            found[-1] += sign
    return tuple(part.strip() for part in found)


def _whole(name: str, value: Any) -> None:
    if not hasattr(value, "__index__") or isinstance(value, bool) or getattr(value, "shape", ()) != ():
        raise TypeError(f"{name} must be a whole number, got {_shown(value)}.")
    try:
        number = value.__index__()
    except (TypeError, ValueError, RuntimeError):  # a tensor or an array of floats
        raise TypeError(f"{name} must be a whole number, got {_shown(value)}.") from None
    if name == "seed" and not isinstance(value, numbers.Integral):
        raise TypeError(f"seed must be a whole number, got {_shown(value)}.")
    if name == "seed" and not 0 <= number < SEEDS:
        raise ValueError(f"seed must lie between 0 and 2**32 - 1, got {number}.")
    if name in LEAST:
        check_count(int(LEAST[name]), **{name: number})
    if name != "seed" and abs(number) > LARGEST:
        raise ValueError(f"{name} must be at most 2**31 - 1, got {number}.")


def _number(name: str, value: Any) -> None:
    try:
        if isinstance(value, (bool, str, bytes, bytearray)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {_shown(value)}.") from None
    except OverflowError:
        raise ValueError(f"{name} must be a number that fits a float, got {_shown(value)}.") from None
    if name.split("[")[0] in OWN_RANGE:
        return
    if math.isnan(number):
        raise ValueError(f"{name} must be a number, got {number}.")
    if math.isinf(number) and name in FINITE:
        raise ValueError(f"{name} must be finite, got {number}.")
    if name in LEAST and number < LEAST[name]:
        raise ValueError(f"{name} must be at least {LEAST[name]:g}, got {number}.")


def _boolean(name: str, value: Any) -> None:
    if not (isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")):
        raise TypeError(f"{name} must be True or False, got {_shown(value)}.")


def _string(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {_shown(value)}.")


def _path(name: str, value: Any) -> None:
    if not isinstance(value, os.PathLike) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name} must be a path, got {_shown(value)}.")


def is_list(value: Any) -> bool:
    """Whether something holds things in an order: no string, no mapping, no single number."""
    return (
        isinstance(value, Iterable)
        and not isinstance(value, (str, bytes, bytearray, Mapping))
        and getattr(value, "shape", None) != ()  # one number, of which frameworks say that it is iterable
    )


def _strings(name: str, value: Any) -> None:
    if not is_list(value):
        raise TypeError(f"{name} must be a list of strings, got {_shown(value)}.")
    for n, item in enumerate(_items(value)):
        if not isinstance(item, str):
            raise TypeError(f"{name} must be a list of strings, and {name}[{n}] is {_shown(item)}.")


def _numbers(name: str, value: Any, count: int | None = None, each: Callable[[str, Any], None] = _number) -> None:
    words = "a list of numbers" if count is None else f"{count} numbers"
    if not is_list(value):
        raise TypeError(f"{name} must be {words}, got {_shown(value)}.")
    items = _items(value)
    if count is not None and len(items) != count:
        raise ValueError(f"{name} must be {words}, got {_shown(value)}.")
    for n, item in enumerate(items):
        each(f"{name}[{n}]", item)


def _items(value: Any) -> list[Any]:
    # What can be read once only is left for the function.
    return list(value) if hasattr(value, "__len__") else []


def _function(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {_shown(value)}.")


def _mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping by name, such as a dict, got {_shown(value)}.")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{name} must have names as keys, and one is {_shown(key)}.")


def _list(name: str, value: Any) -> None:
    if not is_list(value) or not hasattr(value, "__len__"):
        raise TypeError(f"{name} must be a list, got {_shown(value)}.")


def _triples(name: str, value: Any) -> None:
    _list(name, value)
    for n, item in enumerate(value):
        if not isinstance(item, (tuple, list)) or len(item) != 3 or isinstance(item[1], (int, float, type(None))):
            raise TypeError(f"{name}[{n}] must have three parts, got {_shown(item)}.")
        if not isinstance(item[0], str) or not isinstance(item[2], str):
            raise TypeError(f"{name}[{n}] must have strings, got {_shown(item)}.")


def _dtype(name: str, value: Any) -> None:
    if f"{type(value).__module__}.{type(value).__name__}" != "torch.dtype":
        raise TypeError(f"{name} must be a type of torch's numbers, such as torch.float32, got {_shown(value)}.")


KINDS = (
    "Behaviour",
    "Evaluation",
    "Grammar",
    "MaskedLM",
    "Posterior",
    "RaySamplers",
    "Regularisation",
    "ReplayBuffer",
)
"""Classes of this library, known here by their names: the storeys that have them lie above."""


def _instance(name: str, value: Any, kind: str) -> None:
    if not any(base.__name__ == kind for base in type(value).__mro__):
        article = "an" if kind[0] in "AEIOU" else "a"
        raise TypeError(f"{name} must be {article} {kind}, got {_shown(value)}.")


_WORDS = {
    "None": "None",
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "str": "a string",
    "os.PathLike[str]": "a path",
    "Sequence[str]": "a list of strings",
    "Sequence[int]": "a list of whole numbers",
    "Sequence[float]": "a list of numbers",
}
_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "None": lambda name, value: None,
    "int": _whole,
    "float": _number,
    "bool": _boolean,
    "str": _string,
    "os.PathLike[str]": _path,
    "Sequence[str]": _strings,
    "Sequence[int]": functools.partial(_numbers, each=_whole),
    "Sequence[float]": _numbers,
    "tuple[float, float]": functools.partial(_numbers, count=2),
    "tuple[int, int]": functools.partial(_numbers, count=2, each=_whole),
    "list[str]": _strings,
    "Sequence[tuple[Any, ...]]": _list,
    "Sequence[tuple[str, str, str]]": _triples,
    "Sequence[tuple[str, Sequence[str], str]]": _triples,
    "torch.dtype": _dtype,
    **{kind: functools.partial(_instance, kind=kind) for kind in KINDS},
    "Program": lambda name, value: check_programs(**{name: value}),
    "Callable": _function,
    "Mapping": _mapping,
    "dict": _mapping,
}


def _shown(value: Any) -> str:
    """A value as a message names it: short, and without asking a broken ``repr`` twice."""
    if hasattr(value, "shape"):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
