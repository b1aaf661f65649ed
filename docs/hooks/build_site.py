"""What the site does beside mkdocs: pages from outside docs/, excerpts of the code, formulas, and its own checks."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import excerpts
import formulas
import notebooks
import public_names
import repository

log = get_plugin_logger("llmppl")
ROOT = Path(__file__).parents[2]
# Site addresses that are not those of the files: GitHub shows docs/README.md first, the site docs/start.md.
MOVED = {"start.md": "index.html", "README.md": "contents.html"}
RAW_REST = re.compile(r":(?:class|func|meth|attr|data|mod|math|exc|obj):|\.\. (?:math|code-block|note)::|\$\$")
SHIM = "https://unpkg.com/iframe-worker/shim"  # the theme's one script from the net; ours is a copy
FETCHED = re.compile(r'<(?:script|img|iframe|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)"')
STORED = re.compile(r'<div class="stored" data-output="([^"]+)"></div>')

_links: repository.Links
_embedded: dict[str, str] = {}
_anchors: set[str] = set()


def on_config(config: Any) -> None:
    _embedded.clear()
    _anchors.clear()


def on_files(files: Files, config: Any) -> Files:
    """Tutorials and the repository's own pages join the site; the two entrances get their addresses."""
    global _links
    _links = repository.Links(ROOT, [file.src_uri for file in files.documentation_pages()])
    for path in sorted((ROOT / "tutorials").glob("*.ipynb")):
        page = notebooks.convert(path)
        src = f"tutorials/{path.stem}.md"
        files.append(File.generated(config, src, content=page.markdown))
        _links.place(f"tutorials/{path.name}", src)
        for name, content in page.pictures.items():
            files.append(File.generated(config, f"tutorials/{path.stem}/{name}", content=content))
        _embedded.update({f"{path.stem}/{key}": html for key, html in page.embedded.items()})
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "llmppl/demo/adapters/README.md"):
        files.append(File.generated(config, f"repository/{name}", content=(ROOT / name).read_text(encoding="utf-8")))
        _links.place(name, f"repository/{name}")
    for src, address in MOVED.items():
        file = files.get_file_from_path(src)
        assert file is not None
        file.dest_uri = file.url = address
        file.abs_dest_path = str(Path(config.site_dir) / address)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    problems: list[str] = []
    markdown = excerpts.insert(markdown, ROOT / _links.origin(page.file.src_uri), problems)
    markdown = _links.rewrite(markdown, page.file.src_uri, problems)
    for problem in problems:
        log.warning(f"{page.file.src_uri}: {problem}")
    return markdown


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    html, problems = formulas.render(html)
    for problem in problems:
        log.warning(f"{page.file.src_uri}: {problem}")
    html = repository.inline_figures(html, page.file.src_uri, ROOT / "docs")
    for found in sorted(set(RAW_REST.findall(re.sub(r"<(pre|annotation)\b.*?</\1>", "", html, flags=re.S)))):
        log.warning(f"{page.file.src_uri}: {found!r} is left on the rendered page")
    if page.file.src_uri.startswith("api/"):
        _anchors.update(re.findall(r'id="(llmppl[^"]*)"', html))
    return html


def on_post_page(output: str, page: Any, config: Any) -> str:
    """HTML that notebooks have stored, each in a shadow tree of its own; and no script of the theme's from the net."""
    own = posixpath.relpath("assets/iframe-worker-shim.js", posixpath.dirname(page.file.dest_uri) or ".")
    output = output.replace(SHIM, own)
    for address in FETCHED.findall(output):
        log.warning(f"{page.file.src_uri}: {address} would be fetched from the net")
    return STORED.sub(lambda found: notebooks.shadow(_embedded[found[1]]), output)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    return output_content.replace(SHIM, "/assets/iframe-worker-shim.js")


def on_post_build(config: Any) -> None:
    for problem in public_names.problems(ROOT, _anchors):
        log.warning(problem)
