"""What a notebook shows of a posterior."""

from __future__ import annotations

import html
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
    return f"{head}{numbers_table(posterior)}{hint}</div>"


def numbers_table(posterior: Posterior, links: bool = False) -> str:
    """The numbers of each batch row as an HTML table.

    :param links: each row's name points to the anchor ``row-<n>``.
    """
    columns = {name: np.asarray(getattr(posterior, field)) for name, field in COLUMNS[posterior.method].items()}
    if posterior.method == "decoding":
        columns = {"best log joint": posterior.log_joint.max(0)}
    places = list(np.ndindex(posterior.batch_shape))
    lines = []
    for n, place in enumerate(places[:MOST_ROWS]):
        name = ", ".join(map(str, place)) or "0"
        name = f'<a href="#row-{n}">{name}</a>' if links else name
        cells = "".join(f"<td>{number(values[place])}</td>" for values in columns.values())
        lines.append(f"<tr><td>{name}</td>{cells}</tr>")
    left = f"<p>{len(places) - MOST_ROWS} more rows.</p>" if len(places) > MOST_ROWS else ""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    return (
        f'<table class="numbers"><thead><tr><th>row</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
        f"{left}"
    )
