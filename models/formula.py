"""Data explained by a formula: symbolic regression as a program over text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from llmppl.models.expression import Arithmetic
from llmppl.models.primitives import Maker
from llmppl.text.declared import declared
from llmppl.text.grammar import Grammar

FUNCTIONS: dict[str, Callable[[float], float]] = {
    "sin": math.sin,
    "cos": math.cos,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
}

SPREAD = 0.5
"""Standard deviation of the logarithm of the noise."""

LARGEST = 1e6
"""What a formula's value is cut at, and where it has none: far from any datum, at a finite density."""

OPERAND = r"(x|[1-9]|(sin|cos|exp)\(x\))"
FORMULAS = rf" {OPERAND}( [-+*/] {OPERAND}){{0,2}}"
"""A regular expression of formulas of up to three operands; the default grammar."""

OPERANDS = ("x", *map(str, range(1, 10)), "sin(x)", "cos(x)", "exp(x)")
"""Those of the default grammar."""

_HALF = re.compile(r"[a-z]+\(?x?$")
"""A name that may go on."""

BY_LIKELIHOOD = ((0.0, -1.0), (-1.0, 0.0))
"""What the numbers of :func:`unexplained` count to start with: a text that goes on by the best that it can become, one
that ends by what it is."""

SPELLED = 8.0
"""Nats that a name costs, for a guide, after a space that is a token of its own."""

WORST = 24.0
"""Nats that data cost at most, for a guide."""


@declared
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


@declared
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

    The posterior is over formulas *and* noise: a text guide takes a guide for ``noise`` as ``others=``, such as
    :func:`noise_given`.

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

    value = _valued(lm)

    def explain(x: Any, y: Any) -> Any:
        text = sample("formula", lm(prompt, **law))
        scale = sample("noise", distributions.LogNormal(math.log(noise), SPREAD))
        with lm.primitives.plate("points", len(x)):
            mean = lm.map(value, text, x, returns=float)
            sample("y", distributions.Normal(mean, scale), obs=y)
        return text

    return explain


def noise_given(lm: Maker, noise: float = 0.3) -> dict[str, Callable[..., Any]]:
    """Noise proposed by what the formula leaves of the data, as ``others=noise_given(lm)`` of a text guide.

    Laplace's approximation of log σ given the formula: a LogNormal at the mode, as wide as the curvature there.

    :param noise: median of the noise's prior, as of the program.
    """
    value = _valued(lm)

    def mode(text: str, *points: float) -> float:
        x, y = points[: len(points) // 2], points[len(points) // 2 :]
        squares = sum((own - value(text, place)) ** 2 for place, own in zip(x, y, strict=True))
        return _mode(squares, len(x), math.log(noise))

    def width(at: float, count: int) -> float:
        # −d²/du² log p at the mode, where the squares are count + (u − log noise) / SPREAD² of exp(2u).
        return (2 * (count + (at - math.log(noise)) / SPREAD**2) + SPREAD**-2) ** -0.5

    def propose(x: Any, y: Any, formula: Any) -> Any:
        count = len(x)
        points = [*(float(place) for place in x), *_by_point(y, count)]
        at = lm.map(mode, formula, *points, returns=float)
        return lm.primitives.distributions.LogNormal(at, lm.map(lambda at: width(at, count), at, returns=float))

    return {"noise": propose}


def _mode(squares: float, count: int, middle: float) -> float:
    """The u = log σ of the highest posterior density, where squares exp(−2u) = count + (u − middle) / s², by Newton's
    method."""
    at = max(0.5 * math.log((squares + 1e-12) / count), middle) if squares > count * math.exp(2 * middle) else middle
    for _ in range(50):
        steep = squares * math.exp(-2 * at)
        step = (steep - count - (at - middle) / SPREAD**2) / (2 * steep + SPREAD**-2)
        at += step
        if abs(step) < 1e-9:
            break
    return at


def _by_point(y: Any, count: int) -> list[Any]:
    """The data one by one; simulated ones have rows before, and the points' plate stays."""
    return [y[n] if y.ndim == 1 else y[..., n : n + 1] for n in range(count)]


def _valued(lm: Maker) -> Callable[[str, float], float]:
    """:func:`evaluate` of texts as the program has them, with the token that ends a grammar."""
    return lambda text, x: evaluate(text.removesuffix(lm.spelling.end), x)


def points_told(
    lm: Maker, prompt: str = "The data follow the formula y =", digits: int = 1
) -> Callable[..., list[Any]]:
    """What a guide is told of the data, as ``prompt={"formula": points_told(lm)}``: every point in words, then the
    program's own prompt."""
    written = f"{{:.{digits}f}}".format

    def pieces(x: Any, y: Any) -> list[Any]:
        told: list[Any] = ["Data:"]
        for place, value in zip(x, _by_point(y, len(x)), strict=True):
            told += [f" f({written(float(place))}) =", lm.map(lambda value: f" {written(value)};", value)]
        return [*told, "\n", prompt]

    return pieces


def points_listed(lm: Maker, count: int, digits: int = 2) -> Callable[..., list[Any]]:
    """What :func:`unexplained` is told, as ``told={"formula": points_listed(lm, len(x))}`` of a
    :class:`~llmppl.guides.SteeredGuide`: the values ``y``, with spaces between."""
    written = f"{{:.{digits}f}}".format

    def pieces(y: Any) -> list[Any]:
        return [lm.map(lambda *values: " ".join(map(written, values)), *_by_point(y, count))]

    return pieces


def unexplained(
    x: Sequence[float], noise: float = 0.3, operands: Sequence[str] = OPERANDS, signs: str = "-+*/"
) -> Callable[[str, str], list[float]]:
    """What a formula that is half written leaves of the data, as ``features={"formula": unexplained(x)}`` of a
    :class:`~llmppl.guides.SteeredGuide`.

    Two numbers, −log p(y | formula), the noise integrated out by Laplace's approximation, in nats, 24 at most: of the
    formula as it is, and of the best that it can become, as it is or by one more operand. A name that is half written
    may become any that begins so; a first operand is seen with the best second one. So a guide may start from
    ``start={"formula": BY_LIKELIHOOD}``.

    After a space that is a token of its own a name costs more, since names are spelled together with their space.

    :param x: where the data are, ``(n,)``.
    :param noise: median of the noise's prior, as of the program.
    :param operands: that may come next.
    :param signs: that may come before them.
    """
    places = [float(place) for place in x]

    @lru_cache(100_000)
    def values(candidate: str) -> list[float]:
        return [evaluate(candidate, place) for place in places]

    @lru_cache(100_000)
    def cost(candidate: str, told: str) -> float:
        y = map(float, told.split())
        squares = sum((own - value) ** 2 for own, value in zip(values(candidate), y, strict=True))
        return min(-_log_evidence(squares, len(places), math.log(noise)), WORST)

    def features(told: str, text: str) -> list[float]:
        if not told:
            return [0.0] * 2
        begun = text.strip()
        half = _HALF.search(begun)
        if begun and begun[-1] not in signs and (half is None or half[0] in operands):
            own = cost(begun, told)
            costs = [cost(f"{begun} {sign} {one}", told) for sign in signs for one in operands]
        else:
            tail = half[0] if half and begun[-1] not in signs else ""
            head, alone = begun.removesuffix(tail), text.endswith(" ")
            own, costs = WORST, []
            for one in operands:
                if one.startswith(tail):
                    more = [f"{one} {sign} {second}" for sign in signs for second in operands] if not head else []
                    extra = SPELLED if alone and not one.isdigit() else 0.0
                    costs += [extra + cost(f"{head} {text}", told) for text in (one, *more)]
        return [own, min([own, *costs])]

    return features


def _log_evidence(squares: float, count: int, middle: float) -> float:
    """log ∫ p(y | σ) p(σ) dσ of data with this sum of squared residuals, by Laplace's approximation in log σ, nats."""
    at = _mode(squares, count, middle)
    steep = squares * math.exp(-2 * at)
    log_joint = -0.5 * (count * math.log(2 * math.pi) + steep + ((at - middle) / SPREAD) ** 2) - count * at
    return log_joint - math.log(SPREAD) - 0.5 * math.log(2 * steep + SPREAD**-2)
