"""Links as GitHub has them, in terms of the repository's files, made those of the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from pathlib import Path

CODE = re.compile(r"(^ *(`{3,}|~{3,}).*?^ *\2`*$|`[^`\n]+`)", re.M | re.S)
INLINE = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#]+)(?P<rest>#[^)\s]*)?(?P<after>(?:\s+\"[^\"]*\")?\))")
DEFINED = re.compile(r"(?P<before>^\[[^\]]+\]:\s+)(?P<target>[^\s#]+)(?P<rest>#\S*)?(?P<after>)", re.M)


class Links:
    """Where each file of the repository stands on the site.

    :param pages: pages of ``docs/``, as mkdocs names them.
    """

    def __init__(self, root: Path, pages: Iterable[str]) -> None:
        self.root = root
        self.places = {f"docs/{page}": page for page in pages}

    def place(self, path: str, page: str) -> None:
        """A file outside ``docs/`` has a page."""
        self.places[path] = page

    def origin(self, page: str) -> str:
        """The repository's file that a page shows."""
        return next((path for path, own in self.places.items() if own == page), f"docs/{page}")

    def rewrite(self, markdown: str, page: str, problems: list[str]) -> str:
        folder = posixpath.dirname(self.origin(page))

        def replaced(found: re.Match[str]) -> str:
            target = found["target"]
            if re.match(r"[a-z][a-z0-9+.-]*:", target):
                return found[0]
            path = posixpath.normpath(posixpath.join(folder, target))
            if path == "docs":
                path = "docs/README.md"
            if path in self.places:
                there = posixpath.relpath(self.places[path], posixpath.dirname(page) or ".")
                return f"{found['before']}{there}{found['rest'] or ''}{found['after']}"
            if path.startswith("docs/") or page.startswith("tutorials/"):
                return found[0]  # a picture, or nothing: mkdocs looks
            problems.append(f"the link {target!r} leads to {path}, which is not on the site")
            return found[0]

        parts = CODE.split(markdown)
        for n in range(0, len(parts), 3):
            parts[n] = DEFINED.sub(replaced, INLINE.sub(replaced, parts[n]))
        return "".join(part for n, part in enumerate(parts) if n % 3 != 2)


def inline_figures(html: str, page: str, docs: Path) -> str:
    """SVG of ``figures/`` as part of the page, so that it takes the page's colours and its text can be found."""

    def replaced(found: re.Match[str]) -> str:
        path = docs / "figures" / f"{found['name']}.svg"
        svg = path.read_text(encoding="utf-8")
        return f'<figure class="drawn">{svg[svg.index("<svg") :]}</figure>'

    return re.sub(r'<p><img [^>]*src="[^"]*figures/(?P<name>[\w-]+)\.svg"[^>]*/?></p>', replaced, html)
