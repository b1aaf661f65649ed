"""Arithmetic on strings, for programs whose text may hold anything."""

from __future__ import annotations

import re
from fractions import Fraction

from llmppl.models.expression import Arithmetic
from llmppl.text.declared import declared

UNKNOWN = "?"
"""The result of what is no arithmetic."""

LONGEST = 64
"""Characters of an expression, at most."""

DIGITS = 12
"""Digits of a number, at most, given or computed."""

_CHARACTERS = re.compile(r"[0-9+\-*/(). ]*")


@declared
def calculate(expression: str) -> str:
    """The value of an arithmetic expression: ``"6 - 10 ="`` gives ``"-4"``.

    Numbers, ``+ - * /`` (``×``, ``÷`` and ``−`` mean the same) and parentheses, with an equals sign at the end or
    without. Fractions are exact on the way; a result that is none is rounded to six significant digits. Whatever else
    it is given, the result is ``"?"`` and never an error: a division by zero, numbers of more than 12 digits,
    expressions of more than 64 characters, words. Nothing is executed.
    """
    text = expression.strip().removesuffix("=").translate(str.maketrans("×÷−", "*/-")).strip()
    if len(text) > LONGEST or not _CHARACTERS.fullmatch(text):
        return UNKNOWN
    try:
        value = _EXACT.value(text)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return UNKNOWN
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"


def _check(value: Fraction) -> None:
    if abs(value) >= 10**DIGITS or value.denominator >= 10**DIGITS:
        raise ValueError("too many digits.")


_EXACT = Arithmetic(number=Fraction, check=_check)
