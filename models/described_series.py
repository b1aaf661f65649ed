"""A series that a sentence describes: "rises until May, then falls"."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from typing import Any

from llmppl.models.primitives import Maker, stacked
from llmppl.text.declared import declared
from llmppl.text.grammar import Grammar

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
MOVES = {"rises sharply": 2.0, "rises": 1.0, "stays flat": 0.0, "falls": -1.0, "falls sharply": -2.0}
"""What a description calls a slope, units a month."""

FAR = 100.0
"""Where a text that is no description lies, units: far from all data, at a finite density."""

PROMPT = "Over the year the number of visitors"

_SENTENCE = re.compile(
    rf"\s*({'|'.join(MOVES)})(?: until ({'|'.join(MONTHS)}), then ({'|'.join(MOVES)})| all year)\.?\s*"
)


def described(text: str) -> list[float]:
    """The twelve monthly values of a description, zero in January: ``described(" rises until May, then falls.")``.

    :raises TypeError, ValueError: no such description.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {text!r}. Describe a year's series in a sentence.")
    found = _SENTENCE.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text!r} is no description. Write e.g. ' rises until May, then falls.' or ' stays flat all year.', of "
            f"{list(MOVES)}."
        )
    first, month, second = found.groups()
    turn = len(MONTHS) - 1 if month is None else MONTHS.index(month)
    later = MOVES[second or first]
    return [MOVES[first] * min(n, turn) + later * max(n - turn, 0) for n in range(len(MONTHS))]


def descriptions() -> list[str]:
    """All that the grammar writes."""
    inner = [f" {a} until {m}, then {b}." for a, m, b in product(MOVES, MONTHS[1:-1], MOVES) if a != b]
    return [*(f" {move} all year." for move in MOVES), *inner]


@declared
def described_series(
    lm: Maker, prompt: str = PROMPT, noise: float = 1.0, max_tokens: int = 24, temperature: float = 1.0
) -> Callable[[Any], Any]:
    r"""The program in which a sentence describes a year's series:

    .. math:: d \sim \text{lm}(\text{prompt}), \quad y_n \sim \mathcal N(\text{described}(d)_n, \text{noise}),
              \quad n = 1, \dots, 12

    under a grammar of sentences with at most one turn (:func:`descriptions`, 205 of them). Only the tokens that the
    tokenizer writes them with may occur: a mask that lets ``" ri"`` stand before ``"ses"`` gives most of the prior to
    spellings that nobody uses. Sites: latent ``description``, observed ``y``, ``(12,)``, or in a plate one a row.

    :param lm: a :class:`llmppl.LM`, or a :class:`llmppl.numpyro.LM`: the program is then one of NumPyro's.
    :param prompt: stands before the description.
    :param noise: standard deviation.
    :param max_tokens: most tokens of a description.
    :param temperature: of the description's prior. A guide meets rare descriptions sooner when it learns from what a
        flatter program simulates.
    :raises ValueError: ``noise`` that is not positive.
    """
    if not noise > 0:
        raise ValueError(f"noise must be positive, got {noise}.")
    pattern = "|".join(re.escape(text) for text in descriptions())
    written = lm.encode([text + lm.spelling.end for text in descriptions()], special=True)
    law = {
        "grammar": Grammar.regex(pattern),
        "allowed": sorted({int(token) for row in written.tolist() for token in row if token >= 0}),
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    primitives, known = lm.primitives, {text: described(text) for text in descriptions()}

    def value(text: str, month: float) -> float:
        # A text that max_tokens cuts off is no description.
        series = known.get(text.removesuffix(lm.spelling.end))
        return FAR if series is None else series[int(month)]

    def series(y: Any) -> Any:
        text = primitives.sample("description", lm(prompt, **law))
        mean = stacked(lm, [lm.map(value, text, float(month), returns=float) for month in range(len(MONTHS))])
        primitives.sample("y", primitives.distributions.Normal(mean, noise).to_event(1), obs=y)
        return text

    return series
