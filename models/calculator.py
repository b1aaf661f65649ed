"""Arithmetic on strings, for programs whose text may hold anything."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

UNKNOWN = "?"
"""The result of what is no arithmetic."""

LONGEST = 64
"""Characters of an expression, at most."""

DIGITS = 12
"""Digits of a number, at most, given or computed."""

_CHARACTERS = re.compile(r"[0-9+\-*/(). ]*")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression: ``"6 - 10 ="`` gives ``"-4"``.

    Numbers, ``+ - * /`` (``×``, ``÷`` and ``−`` mean the same) and parentheses, with an equals sign at the end or
    without. Fractions are exact on the way; a result that is none is rounded to six significant digits. Whatever else
    it is given, the result is ``"?"`` and never an error: a division by zero, numbers of more than 12 digits,
    expressions of more than 64 characters, words. Nothing is executed: the expression is read by Python's parser, and
    the tree of whitelisted nodes evaluated here.
    """
    text = expression.strip().removesuffix("=").translate(str.maketrans("×÷−", "*/-")).strip()
    if len(text) > LONGEST or not _CHARACTERS.fullmatch(text):
        return UNKNOWN
    try:
        value = _value(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return UNKNOWN
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.6g}"


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant):
        source = ast.get_source_segment(text, node) or ""
        value = Fraction(source)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _value(node.operand, text)
        value = -value if isinstance(node.op, ast.USub) else value
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        value = _OPERATIONS[type(node.op)](_value(node.left, text), _value(node.right, text))
    else:
        raise ValueError(f"{type(node).__name__} is no arithmetic.")
    if abs(value) >= 10**DIGITS or value.denominator >= 10**DIGITS:
        raise ValueError("too many digits.")
    return value
