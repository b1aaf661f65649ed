"""Formulas as MathML, made when the site is: browsers draw it, without a script, and offline."""

from __future__ import annotations

import html as escapes
import re
import unicodedata
from contextlib import suppress

from latex2mathml.converter import convert

MARKED = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<formula>.*?)\\[)\]]</(?P=tag)>', re.S)
# log x, not logx: MathML leaves no space behind a function's name.
NAMES = re.compile(r"(<m[io][^>]*>(?:log|exp|ln|max|min)</m[io]>)(?=<m(?:i|sub|sup|frac|over|under|row)\b)")
# Browsers draw letters of other alphabets where they are characters of their own, not where they are a style.
STYLED = re.compile(r'<mi mathvariant="(script|double-struck)">([A-Z])</mi>')


def _letter(style: str, letter: str) -> str:
    for name in (f"MATHEMATICAL {style.upper()} CAPITAL {letter}", f"{style.upper()} CAPITAL {letter}"):
        with suppress(KeyError):
            return unicodedata.lookup(name)
    return letter


def render(html: str) -> tuple[str, list[str]]:
    """The page with its formulas, and what could not be read."""
    problems: list[str] = []

    def replaced(found: re.Match[str]) -> str:
        formula = escapes.unescape(found["formula"]).strip()
        try:
            if found["tag"] == "span":
                return _drawn(formula, "inline")
            return f'<div class="formula">{"".join(_drawn(part, "block") for part in _parts(formula))}</div>'
        except Exception as error:
            problems.append(f"formula {formula!r}: {type(error).__name__} {error}")
            return found[0]

    return MARKED.sub(replaced, html), problems


def _parts(formula: str) -> list[str]:
    """What wide spaces part, as formulas of their own, so that a narrow page can put them below one another."""
    parts = [part.strip() for part in formula.split(r"\qquad") if part.strip()]
    whole = all(part.count("{") == part.count("}") and r"\begin" not in part and r"\left" not in part for part in parts)
    return parts if whole else [formula]


def _drawn(formula: str, display: str) -> str:
    if formula.replace(r"\{", "").count("{") != formula.replace(r"\}", "").count("}"):
        raise ValueError("its braces do not pair")
    made = convert(formula, display=display)
    if unread := re.findall(r"<m[io]>(\\[A-Za-z]+)", made):
        raise ValueError(f"{unread} cannot be read")
    made = STYLED.sub(lambda found: f"<mi>{_letter(found[1], found[2])}</mi>", made)
    made = made.replace("<mo>&#x022A4;</mo>", "<mi>⊤</mi>")  # the end of a text is a symbol, no operator
    made = made.replace("<mi>&#x0007E;</mi>", '<mo lspace="0.28em" rspace="0.28em">∼</mo>')
    made = NAMES.sub(r'\1<mspace width="0.17em"/>', made)
    return made.replace("<math ", f'<math aria-label="{escapes.escape(formula, quote=True)}" ', 1)
