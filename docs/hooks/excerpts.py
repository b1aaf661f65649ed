"""Excerpts of the code by name, so that a page cannot show what is no longer there.

A line ``[code: NAME](../FILE.py)`` is a link on GitHub. On the site it is the definition of ``NAME`` (``function`` or
``Class.method``) in that file, without its docstring; ``[code: NAME](../FILE.py "FIRST … LAST")`` are its lines from
the first that contains FIRST to the next that contains LAST.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

DIRECTIVE = re.compile(r'^\[code: (?P<name>[\w.`]+)\]\((?P<path>[^)\s]+\.py)(?: "(?P<part>[^\n]*)")?\)$', re.M)
ROOT = Path(__file__).parents[2]


def insert(markdown: str, origin: Path, problems: list[str]) -> str:
    def replaced(found: re.Match[str]) -> str:
        path = (origin.parent / found["path"]).resolve()
        try:
            place, text = excerpt(path, found["name"].strip("`"), found["part"])
        except (OSError, LookupError) as error:
            problems.append(f"no excerpt {found['name']} of {found['path']}: {error}")
            return found[0]
        shown = path.relative_to(ROOT).as_posix()
        shown = f"llmppl/{shown}" if shown.startswith(("guides/", "models/")) else shown
        return f'```python title="{shown}:{place}"\n{text}\n```'

    return DIRECTIVE.sub(replaced, markdown)


def excerpt(path: Path, name: str, part: str | None) -> tuple[int, str]:
    """The first line's number, and the lines."""
    source = path.read_text(encoding="utf-8")
    node = _found(ast.parse(source), name.split("."))
    lines = source.splitlines()
    decorators = getattr(node, "decorator_list", [])
    first, last = min([node.lineno, *(d.lineno for d in decorators)]), node.end_lineno or node.lineno
    body = getattr(node, "body", [])
    text = {n: lines[n - 1] for n in range(first, last + 1)}
    if ast.get_docstring(node) is not None if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else False:
        for n in range(body[0].lineno, body[0].end_lineno + 1):
            del text[n]
    if part is not None:
        begin, found, end = part.partition(" … ")
        start = next((n for n, line in text.items() if begin.strip() in line), None)
        stop = next((n for n, line in text.items() if start is not None and n >= start and end.strip() in line), None)
        if start is None or stop is None:
            raise LookupError(f"{name} has no line with {begin if start is None else end!r}")
        text = {n: line for n, line in text.items() if start <= n <= (stop if found else start)}
    return min(text), textwrap.dedent("\n".join(text.values())).strip("\n")


def _found(node: ast.AST, path: list[str]) -> ast.stmt:
    for name in path:
        inside = [child for child in getattr(node, "body", []) if getattr(child, "name", None) == name]
        if not inside:
            raise LookupError(f"it has no {name!r}")
        node = inside[-1]  # the last of several is the one behind its overloads
    assert isinstance(node, ast.stmt)
    return node
