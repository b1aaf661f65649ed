"""What a notebook shows of a posterior."""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np

from llmppl.display.posterior_table import posterior_table
from llmppl.display.protocols import Samples
from llmppl.display.style import FRAGMENT
from llmppl.display.token_marks import number

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


def posterior_html(posterior: Samples) -> str:
    """The numbers of a posterior and its heaviest texts, as HTML; with batch rows, the numbers of each."""
    head = f'{FRAGMENT}<div class="llmppl"><p><code>{html.escape(repr(posterior))}</code></p>'
    if not posterior.batch_shape:
        return head + "</div>" + "".join(posterior_table(posterior, site, 10) for site in posterior.texts)
    places = list(np.ndindex(posterior.batch_shape))
    rows = {", ".join(map(str, place)): posterior.row(*place) for place in places[:MOST_ROWS]}
    left = f"<p>{len(places) - MOST_ROWS} more rows.</p>" if len(places) > MOST_ROWS else ""
    hint = f"<p>Texts and weights of one row: <code>posterior.row({next(iter(rows), '')})</code>.</p>"
    return f"{head}{numbers_table(rows)}{left}{hint}</div>"


def numbers_table(rows: Mapping[str, Samples], links: bool = False) -> str:
    """The numbers of several posteriors by one method, each without batch rows, as an HTML table.

    :param links: the n-th name points to the anchor ``row-<n>``.
    """
    method = next((row.method for row in rows.values()), "importance")
    columns = COLUMNS[method]
    lines = []
    for n, (name, row) in enumerate(rows.items()):
        name = html.escape(name)
        name = f'<a href="#row-{n}">{name}</a>' if links else name
        values = [row.log_joint.max()] if method == "decoding" else [getattr(row, field) for field in columns.values()]
        lines.append(f"<tr><td>{name}</td>{''.join(f'<td>{number(value)}</td>' for value in values)}</tr>")
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in columns or ("best log joint",))
    return f'<table class="numbers"><thead><tr><th>row</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
