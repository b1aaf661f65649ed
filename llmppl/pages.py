"""Posteriors as HTML. Needs numpy only."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmppl.inference.posterior import Posterior


def posterior_html(posterior: Posterior) -> str:
    """What a notebook shows of a posterior: its numbers, and the heaviest texts of each site."""
    parts = [f"<p><code>{html.escape(repr(posterior))}</code></p>"]
    if not posterior.batch_shape:
        for site in posterior.texts:
            rows = "".join(
                f"<tr><td style='text-align:right'>{weight:.1%}</td>"
                f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
                for text, weight in posterior.top(site)
            )
            parts.append(
                f"<table><thead><tr><th>weight</th><th style='text-align:left'>{html.escape(site)}</th>"
                f"</tr></thead><tbody>{rows}</tbody></table>"
            )
    return "".join(parts)
