"""A text's tokens as strings that can be shown, each with what prior and guide say of it."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

LEVELS = (0.1, 0.5, 1.0, 2.0)
"""From how many nats of difference on a token is coloured, and more so."""

MISSING = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""


class Piece(NamedTuple):
    """Tokens ``start`` to ``stop`` of a text, which decode together."""

    text: str
    start: int
    stop: int


def pieces(ids: np.ndarray, decoder: Callable[[np.ndarray], str]) -> list[Piece]:
    """A text cut into the smallest runs of tokens that decode to whole characters.

    Joined they are the decoded text: each is what its tokens add to the text before them, since a token
    decoded alone can lose a space that it starts with.

    :param ids: ``(T,)``, padding last.
    """
    ids = ids[ids >= 0]
    found: list[Piece] = []
    start, before = 0, ""
    for stop in range(1, len(ids) + 1):
        text = decoder(ids[:stop])
        if not text.startswith(before):
            # What follows changed what stood before: cut the text no further up than here.
            found, start, before = [], 0, ""
        if not text.endswith(MISSING) or stop == len(ids):
            found.append(Piece(text[len(before) :], start, stop))
            start, before = stop, text
    return found


def visible(text: str) -> str:
    """Escaped for HTML, with line breaks, tabs and tokens without text made visible."""
    shown = html.escape(text).replace("\r", "").replace("\n", "⏎\n").replace("\t", "⇥\t")
    return shown or "∅"


def coloured(piece: Piece, log_p: np.ndarray | None, log_q: np.ndarray | None) -> str:
    """A piece marked by how far the guide's log-probability is above the prior's.

    :param log_p: the text's token log-probabilities under the prior, ``(T,)``, nats.
    :param log_q: the same under the guide.
    """
    text = visible(piece.text)
    if log_p is None or log_q is None:
        return f"<span>{text}</span>"
    p, q = (float(scores[piece.start : piece.stop].sum()) for scores in (log_p, log_q))
    title = f"{piece.text!r}: guide {q:.2f}, prior {p:.2f}, guide − prior {q - p:+.2f} nats"
    return f'<span class="{shade(q - p)}" title="{html.escape(title)}">{text}</span>'


def shade(difference: float) -> str:
    """The CSS class of a difference log q − log p: ``up1`` to ``up4``, ``down1`` to ``down4``, or ``even``."""
    if np.isnan(difference):
        return "even"
    level = sum(abs(difference) >= limit for limit in LEVELS)
    return "even" if level == 0 else f"{'up' if difference > 0 else 'down'}{level}"


def legend() -> str:
    """What the colours say."""
    ups = "".join(f'<span class="up{n}">+{limit:g}</span>' for n, limit in enumerate(LEVELS, 1))
    downs = "".join(f'<span class="down{n}">−{limit:g}</span>' for n, limit in reversed(list(enumerate(LEVELS, 1))))
    return (
        "<p class=\"legend\">Each token: the guide's log-probability less the prior's, nats. "
        f'<span class="key">{downs}</span> dashed: the guide gives it less than the prior; '
        f'<span class="key">{ups}</span> solid: the guide gives it more. Beyond the last number the shade stays.</p>'
    )


def scores_table(found: list[Piece], log_p: np.ndarray, log_q: np.ndarray) -> str:
    """The numbers behind the colours, for where a pointer cannot hover."""
    lines = []
    for piece in found:
        p, q = (float(scores[piece.start : piece.stop].sum()) for scores in (log_p, log_q))
        lines.append(
            f'<tr><td class="text"><span class="{shade(q - p)}">{visible(piece.text)}</span></td>'
            f"<td>{number(q)}</td><td>{number(p)}</td><td>{number(q - p, '+.2f')}</td></tr>"
        )
    return (
        '<table class="scores"><thead><tr><th class="text">token</th><th>guide</th><th>prior</th><th>difference</th>'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def number(value: Any, form: str = ".2f") -> str:
    """A number with a true minus sign, "n/a" where there is none."""
    value = float(value)
    if np.isnan(value):
        return "n/a"
    return f"{value:{form}}".replace("-", "−").replace("inf", "∞")
