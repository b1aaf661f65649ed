"""What a notebook shows of a posterior."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmppl.pages.style import FRAGMENT
from llmppl.pages.table import posterior_table
from llmppl.pages.tokens import number

if TYPE_CHECKING:
    from llmppl.inference.posterior import Posterior

COLUMNS = {
    "enumeration": {"log Z": "log_evidence", "ESS": "ess"},
    "importance": {
        "log Ẑ": "log_evidence",
        "± s.e.": "log_evidence_error",
        "ELBO": "elbo",
        "ESS": "ess",
        "k̂": "khat",
    },
    "smc": {"log Ẑ": "log_evidence", "± s.e.": "log_evidence_error", "ESS": "ess", "ancestors": "distinct_ancestors"},
    "mcmc": {"ESS": "ess", "R̂": "rhat"},
    "decoding": {},
}
"""By method, the numbers of each row: heading and attribute."""

MOST_ROWS = 50


def posterior_html(posterior: Posterior) -> str:
    """The numbers of a posterior and its heaviest texts, as HTML; with batch rows, the numbers of each."""
    head = f'{FRAGMENT}<div class="llmppl"><p><code>{html.escape(repr(posterior))}</code></p>'
    if not posterior.batch_shape:
        return head + "</div>" + "".join(posterior_table(posterior, site, 10) for site in posterior.texts)
    place = ", ".join("0" for _ in posterior.batch_shape)
    hint = f"<p>Texts and weights of one row: <code>posterior.row({place})</code>.</p>"
    places = list(np.ndindex(posterior.batch_shape))
    names = [", ".join(map(str, place)) for place in places]
    return f"{head}{numbers_table([posterior.row(*place) for place in places], names)}{hint}</div>"


def numbers_table(rows: Sequence[Posterior], names: Sequence[str] | None = None, links: bool = False) -> str:
    """The numbers of posteriors of one method, each of one observation, as an HTML table.

    :param names: of the rows; by default their numbers.
    :param links: each row's name points to the anchor ``row-<n>``.
    """
    method = rows[0].method
    columns = ["best log joint"] if method == "decoding" else list(COLUMNS[method])
    lines = []
    for n, row in enumerate(rows[:MOST_ROWS]):
        values = [row.log_joint.max()] if method == "decoding" else [getattr(row, f) for f in COLUMNS[method].values()]
        name = str(n) if names is None else names[n]
        name = f'<a href="#row-{n}">{name}</a>' if links else name
        lines.append(f"<tr><td>{name}</td>{''.join(f'<td>{number(value)}</td>' for value in values)}</tr>")
    left = f"<p>{len(rows) - MOST_ROWS} more rows.</p>" if len(rows) > MOST_ROWS else ""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    return (
        f'<table class="numbers"><thead><tr><th>row</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
        f"{left}"
    )
