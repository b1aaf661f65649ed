"""Arithmetic with a tool: the text asks, a calculator answers, and the text goes on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from llmppl.models.calculator import calculate
from llmppl.models.primitives import Maker, kept
from llmppl.text.declared import declared

# What stands before it is an operand's end, and so no other operator: a sign is none. Signs may stand behind it.
_OPERATOR = re.compile(r"(?:[0-9]\.?|\))\s*[-+*/×÷−]\s*(?=(?:[-+−]\s*)*(?:\.?[0-9]|\())")


@declared
def arithmetic(
    lm: Maker,
    examples: Sequence[tuple[str, Sequence[str], str]] = (),
    steps: int | Callable[[str], int] | None = None,
    tool: Callable[[str], str] = calculate,
    max_tokens: int = 10,
    result_tokens: int = 20,
) -> Callable[[Any, Any], Any]:
    r"""The program in which a text hands its expressions to a calculator:

    .. math:: p(e_1|x)\, p(e_2|x, e_1, r_1) \cdots p(y|x, e_1, r_1, \dots, e_n, r_n), \qquad r_i = \text{tool}(e_i)

    An expression ends with its equals sign, and what the tool makes of it is the next piece of the text (Hu et al.
    2024, sec. 4.3). Latent sites ``expression_1``, ...; deterministic ones ``result_1``, ...; observed ``answer``,
    which is drawn, too, where none is given.

    Question and answer are strings, or lists of strings inside a plate: ``"6 - 0 - 4"`` and ``"2"``.

    :param lm: a :class:`llmppl.LM`, or a :class:`llmppl.numpyro.LM`: the program is then one of NumPyro's.
    :param examples: worked ones that stand before the question: question, expressions without equals sign, answer.
    :param steps: expressions of a question, or a function that says so of its text; by default the question's number of
        operators. The questions of a list have equally many. In a compiled NumPyro program the question is no string
        any more: say the number.
    :param tool: from an expression, as written, to its result; of what it cannot read it returns a string, too.
    :param max_tokens: most tokens of an expression.
    :param result_tokens: most tokens of a result, and of the answer.
    :raises ValueError: an example's expression that has its equals sign.
    """
    shown = "".join(_example(*example, tool) for example in examples)

    def written(function: Callable[[str], str], text: Any) -> Any:
        return lm.map(function, text, max_tokens=result_tokens, returns=str)

    def solve(question: Any, answer: Any = None) -> Any:
        pieces = [shown + "Question: ", question, " = ?\nAnswer:"]
        for step in range(1, _steps(question, steps) + 1):
            law = lm(*pieces, max_tokens=max_tokens, stop="=")
            expression = lm.primitives.sample(f"expression_{step}", law)
            pieces += [expression, kept(lm, f"result_{step}", written(lambda text: f" {tool(text)},", expression))]
        pieces.append(" the answer is")
        if answer is None:
            return lm.primitives.sample("answer", lm(*pieces, max_tokens=max_tokens, stop="."))
        return lm.primitives.sample("answer", lm(*pieces), obs=written(lambda text: f" {text.strip()}.", answer))

    return solve


def _example(question: str, expressions: Sequence[str], answer: str, tool: Callable[[str], str]) -> str:
    for expression in expressions:
        if "=" in expression:
            raise ValueError(
                f"examples: the expression {expression!r} has an equals sign, which is written behind each. Leave it "
                f"out: {expression.partition('=')[0].strip()!r}."
            )
    worked = "".join(f" {expression} = {tool(expression)}," for expression in expressions)
    return f"Question: {question} = ?\nAnswer:{worked} the answer is {answer}.\n\n"


def _steps(question: Any, steps: int | Callable[[str], int] | None) -> int:
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}.")
        return steps
    texts = [question] if isinstance(question, str) else question
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"question is a {type(question).__name__}, of which the number of steps cannot be seen. Pass strings, or "
            "say steps=."
        )
    count = steps or number_of_operators
    found = {count(text): text for text in texts}
    if len(found) != 1:
        raise ValueError(
            f"the questions of a list need equally many steps, and there are {sorted(found)}: {found!r}. Sort them "
            "into lists of one number each, or say steps=."
        )
    number = next(iter(found))
    if number < 1:
        raise ValueError(f"question={texts[0]!r} has no operator, hence no steps. Say steps=.")
    return number


def number_of_operators(question: str) -> int:
    """How many operators stand between the numbers of a question: ``"6 - -2 + 1"`` has two, ``"-5 + .5"`` one."""
    return len(_OPERATOR.findall(question))
