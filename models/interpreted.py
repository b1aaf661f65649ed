"""The values of interpreted code: their kinds, their sizes, the order they show, and Python's functions of them."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from typing import Any

SIZE = 1000
"""Elements and characters of a value, at most, those of the values in it included."""

BITS = 256
"""Of an integer, at most."""


class Refused(Exception):
    """Code that is not of the subset, or that goes beyond a limit."""


class OnePass:
    """What ``zip``, ``enumerate``, ``reversed`` and generator expressions give: walked once, as far as it is asked for.

    As in Python one equals itself alone and is true, even if nothing is left of it.
    """

    def __init__(self, left: Iterator[Any]) -> None:
        self.left = left


KINDS = (int, float, str, bool, type(None), list, tuple, dict, set, range, OnePass)
"""Of values; nothing else can arise."""


def weight(value: Any) -> int:
    """How many elements and characters there are in a value, however often one stands in it."""
    waiting, count = [value], 0
    while waiting:
        item = waiting.pop()
        count += len(item) if isinstance(item, str) else 1
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        if count + len(waiting) > SIZE + 1:
            raise Refused("a value too large")
    return count


def in_order(value: Any) -> Any:
    """The value, unless it is a set whose order is another in each process: that of strings is, by their hashes."""
    if isinstance(value, (set, frozenset)) and len(value) > 1 and not all(_lasting(item) for item in value):
        raise Refused("the order of a set")
    return value


def _lasting(value: Any) -> bool:
    """Whether a value's hash is the same in each process and version of Python; not-a-number hashes by its address."""
    if isinstance(value, tuple):
        return all(_lasting(item) for item in value)
    return isinstance(value, (int, float)) and value == value


def shown(value: Any) -> str:
    """``repr``, but of no value that is written by its address, or in an order of the process."""
    waiting = [value]
    while waiting:
        item = in_order(waiting.pop())
        if isinstance(item, OnePass):
            raise Refused("a value that is walked once")
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            waiting += item
    return repr(value)


def _text(*values: Any) -> str:
    """``str``, but of what can be shown."""
    for value in values:
        shown(value)
    return str(*values)


def _rounded(value: Any, digits: int | None = None) -> Any:
    """``round``, but to few digits only: of an integer it computes that power of ten."""
    if digits is None:
        return round(value)
    if not isinstance(digits, int) or abs(digits) > 20:
        raise Refused("digits too many")
    return round(value, digits)


def _whole(*values: Any) -> int:
    """``int``, but of short strings only: a long one takes quadratic time."""
    if any(isinstance(value, str) and len(value) > 20 for value in values):
        raise Refused("a number too long")
    return int(*values)


BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
IN_PLACE: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.iadd,
    ast.Sub: operator.isub,
    ast.Mult: operator.imul,
    ast.Div: operator.itruediv,
    ast.FloorDiv: operator.ifloordiv,
    ast.Mod: operator.imod,
    ast.Pow: operator.ipow,
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}

OWN: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "all": all,
    "any": any,
    "bool": bool,
    "enumerate": lambda values, start=0: OnePass(enumerate(values, start)),
    "float": float,
    "int": _whole,
    "len": len,
    "list": list,
    "max": max,
    "min": min,
    "range": range,
    "reversed": lambda values: OnePass(reversed(values)),
    "round": _rounded,
    "set": set,
    "sorted": sorted,
    "str": _text,
    "sum": sum,
    "tuple": tuple,
    "zip": lambda *values: OnePass(zip(*values, strict=False)),
}
"""The functions that there are, each bounded by the size of what it is given."""

GATHERING = {"list", "max", "min", "set", "sorted", "sum", "tuple"}
"""Those that walk what they are given to its end."""

ORDERED = {"list", "sum", "tuple"}
"""Those of them whose value depends on its order."""
