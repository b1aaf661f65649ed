"""Expressions that a text holds: read by Python's parser, and evaluated here, node by whitelisted node.

Nothing is executed. Whatever is not whitelisted is refused by a ``ValueError``.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Number = TypeVar("Number")

OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Arithmetic(Generic[Number]):
    """What an expression may consist of, and what it means.

    :param number: from a constant as it is written to its value.
    :param check: refuses a value, given or computed, by a ``ValueError``.
    :param names: values of variables.
    :param functions: of one argument.
    """

    number: Callable[[str], Number]
    check: Callable[[Number], None]
    names: Mapping[str, Number] = field(default_factory=dict)
    functions: Mapping[str, Callable[[Number], Number]] = field(default_factory=dict)

    def value(self, text: str) -> Number:
        """The value of an expression.

        :raises ValueError, SyntaxError, ZeroDivisionError, OverflowError: what cannot be read or has no value.
        """
        return self._value(ast.parse(text, mode="eval").body, text)

    def _value(self, node: ast.expr, text: str) -> Number:
        if isinstance(node, ast.Constant):
            found = self.number(ast.get_source_segment(text, node) or "")
        elif isinstance(node, ast.Name) and node.id in self.names:
            found = self.names[node.id]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            inner: Any = self._value(node.operand, text)
            found = -inner if isinstance(node.op, ast.USub) else inner
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            found = OPERATIONS[type(node.op)](self._value(node.left, text), self._value(node.right, text))
        elif self._calls(node):
            found = self.functions[node.func.id](self._value(node.args[0], text))  # type: ignore[attr-defined]
        else:
            raise ValueError(f"{type(node).__name__} is not allowed.")
        self.check(found)
        return found

    def _calls(self, node: ast.expr) -> bool:
        return (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in self.functions
            and len(node.args) == 1
            and not node.keywords
            and not isinstance(node.args[0], ast.Starred)
        )
