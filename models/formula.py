"""Data explained by a formula: symbolic regression as a program over text."""

from __future__ import annotations

import math
from collections.abc import Callable
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
