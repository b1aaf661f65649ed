"""Data explained by a formula: symbolic regression as a program over text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from llmppl.models.expression import Arithmetic
from llmppl.models.primitives import Maker
from llmppl.text.grammar import Grammar

FUNCTIONS: dict[str, Callable[[float], float]] = {
    "sin": math.sin,
    "cos": math.cos,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
}

LARGEST = 1e6
"""What a formula's value is cut at, and where it has none: far from any datum, at a finite density."""

OPERAND = r"(x|[1-9]|(sin|cos|exp)\(x\))"
FORMULAS = rf" {OPERAND}( [-+*/] {OPERAND}){{0,2}}"
"""A regular expression of formulas of up to three operands; the default grammar."""

OPERANDS = ("x", *map(str, range(1, 10)), "sin(x)", "cos(x)", "exp(x)")
"""Those of the default grammar."""

_BEGUN = re.compile(r"(sin|cos|exp|log|sqrt)(\(x?)?$")
"""A function whose argument is still to come."""


def evaluate(formula: str, x: float) -> float:
    """The value of a formula of ``x``: ``evaluate("2 * x + sin(x)", 0.5)``.

    Numbers, ``x``, ``+ - * /``, parentheses, and ``sin cos exp log sqrt``. Where there is no value (no formula, a
    division by zero, a logarithm of a negative number) it is ``1e6``, and no value is beyond that: a text that makes no
    sense is far from all data, and has a density. Nothing is executed.
    """
    try:
        value = Arithmetic(float, _check, {"x": float(x)}, FUNCTIONS).value(formula.strip())
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return LARGEST
    return min(max(value, -LARGEST), LARGEST)


def _check(value: float) -> None:
    if not math.isfinite(value):
        raise ValueError("no finite value.")


def formula(
    lm: Maker,
    prompt: str = "The data follow the formula y =",
    grammar: Grammar | None = None,
    noise: float = 0.3,
    max_tokens: int = 16,
) -> Callable[[Any, Any], Any]:
    r"""The program in which a formula and its noise explain data:

    .. math:: f \sim \text{lm}(\text{prompt}), \quad \sigma \sim \text{LogNormal}(\log\text{noise}, 1/2), \quad
              y_i \sim \mathcal N(f(x_i), \sigma)

    The posterior is over formulas *and* noise: a text guide takes a guide for ``noise`` as ``others=``.

    ``x`` and ``y`` are arrays of shape ``(n,)``.

    :param lm: a :class:`llmppl.LM`, or a :class:`llmppl.numpyro.LM`: the program is then one of NumPyro's.
    :param prompt: stands before the formula.
    :param grammar: of formulas, with the space before them; by default up to three operands of :data:`FORMULAS`.
    :param noise: median of the noise's prior.
    :param max_tokens: most tokens of a formula.
    :raises ValueError: ``noise`` that is not positive.
    """
    if not noise > 0:
        raise ValueError(f"noise must be positive, got {noise}.")
    law = {"grammar": grammar or Grammar.regex(FORMULAS), "max_tokens": max_tokens}
    sample, distributions = lm.primitives.sample, lm.primitives.distributions

    def value(text: str, x: float) -> float:
        return evaluate(text.removesuffix(lm.spelling.end), x)

    def explain(x: Any, y: Any) -> Any:
        scale = sample("noise", distributions.LogNormal(math.log(noise), 0.5))
        text = sample("formula", lm(prompt, **law))
        with lm.primitives.plate("points", len(x)):
            mean = lm.map(value, text, x, returns=float)
            sample("y", distributions.Normal(mean, scale), obs=y)
        return text

    return explain


def points_told(
    lm: Maker, prompt: str = "The data follow the formula y =", digits: int = 1
) -> Callable[..., list[Any]]:
    """What a guide is told of the data, as ``prompt={"formula": points_told(lm)}``: every point in words, then the
    program's own prompt."""
    written = f"{{:.{digits}f}}".format

    def pieces(x: Any, y: Any) -> list[Any]:
        told: list[Any] = ["Data:"]
        for n in range(len(x)):
            told += [f" f({written(float(x[n]))}) =", lm.map(lambda value: f" {written(value)};", y[..., n : n + 1])]
        return [*told, "\n", prompt]

    return pieces


def points_listed(lm: Maker, count: int, digits: int = 2) -> Callable[..., list[Any]]:
    """What :func:`unexplained` is told, as ``told={"formula": points_listed(lm, len(x))}`` of a
    :class:`~llmppl.guides.SteeredGuide`: the values ``y``, with spaces between."""
    written = f"{{:.{digits}f}}".format

    def pieces(y: Any) -> list[Any]:
        return [lm.map(lambda *values: " ".join(map(written, values)), *(y[..., n] for n in range(count)))]

    return pieces


def unexplained(x: Sequence[float], operands: Sequence[str] = OPERANDS) -> Callable[[str, str], list[float]]:
    """What a formula that is half written leaves of the data, as ``features={"formula": unexplained(x)}`` of a
    :class:`~llmppl.guides.SteeredGuide`.

    Three numbers, logarithms of the root mean square residual: of the formula as it is, with the best further operand,
    and the smaller of the two.

    :param x: where the data are, ``(n,)``.
    :param operands: that may come next.
    """
    places = [float(place) for place in x]

    @lru_cache(100_000)
    def values(candidate: str) -> list[float]:
        return [evaluate(candidate, place) for place in places]

    def residual(candidate: str, y: Sequence[float]) -> float:
        squares = sum((own - value) ** 2 for own, value in zip(values(candidate), y, strict=True))
        return math.log(min(math.sqrt(squares / len(places)), 1e3) + 0.1) / 3

    def features(told: str, text: str) -> list[float]:
        if not told:
            return [0.0] * 3
        y = [float(value) for value in told.split()]
        begun = _BEGUN.sub(r"\1(x)", text.strip())
        worst = math.log(1e3) / 3
        if not begun or begun[-1] in "+-*/":
            own, further = worst, [f"{begun} {operand}" for operand in operands]
        else:
            own, further = residual(begun, y), [f"{begun} {sign} {operand}" for sign in "+-*" for operand in operands]
        best = min(residual(candidate, y) for candidate in further)
        return [own, best, min(own, best)]

    return features
