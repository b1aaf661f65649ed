"""Notebooks as pages, with the outputs that are stored in them; nothing is run."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# Inside a shadow tree the page's own styles do not hold.
STYLE = (
    "<style>:host{display:block;overflow-x:auto;margin:1em 0;font-size:.7rem}table{border-collapse:collapse}"
    "td,th{padding:.25em .7em;border-bottom:1px solid #8885;vertical-align:top}</style>"
)


@dataclass
class Page:
    """A notebook's markdown, its pictures by file name, and the HTML of its outputs by key."""

    markdown: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict)
    embedded: dict[str, str] = field(default_factory=dict)


def convert(path: Path) -> Page:
    page, parts = Page(), []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"]).strip("\n")
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source:
            parts.append(fenced(source, "python"))
            for place, output in enumerate(joined(cell["outputs"])):
                parts.append(_shown(output, f"{number}-{place}", path.stem, page))
    page.markdown = "\n\n".join(part for part in parts if part) + "\n"
    return page


def joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Outputs whose streams, which a notebook stores in pieces, are whole."""
    found: list[dict[str, Any]] = []
    for output in outputs:
        if output["output_type"] == "stream" and found and found[-1]["output_type"] == "stream":
            found[-1] = {**output, "text": "".join(found[-1]["text"]) + "".join(output["text"])}
        else:
            found.append(output)
    return found


def _shown(output: dict[str, Any], key: str, name: str, page: Page) -> str:
    if output["output_type"] == "stream":
        return _text(output["text"])
    if output["output_type"] == "error":
        raise ValueError(f"{name}.ipynb: cell {key} has stored an error")
    data = output["data"]
    if "application/vnd.jupyter.widget-view+json" in data:
        return ""  # a progress bar
    if "image/png" in data:
        picture = f"{key}.png"
        page.pictures[picture] = base64.b64decode("".join(data["image/png"]))
        return f"![Figure of the cell above]({name}/{picture})"
    html = "".join(data.get("text/html", ""))
    # An xarray tree needs its notebook's style sheet; its text says the same.
    if html and "xr-header" not in html:
        page.embedded[key] = html
        return f'<div class="stored" data-output="{name}/{key}"></div>'
    return _text(data.get("text/plain", ""))


def _text(text: str | list[str]) -> str:
    lines = [line.rpartition("\r")[2] for line in ANSI.sub("", "".join(text)).rstrip().split("\n")]
    return fenced("\n".join(lines), "{ .text .output }") if any(lines) else ""


def fenced(text: str, kind: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence} {kind}\n{text}\n{fence}"


def shadow(html: str) -> str:
    return f'<div class="stored"><template shadowrootmode="open">{STYLE}{html}</template></div>'
