"""Docstrings are reST; the site is Markdown. A griffe extension that turns the one into the other."""

from __future__ import annotations

import logging
import re
import textwrap
from typing import Any

import griffe

log = logging.getLogger("mkdocs.plugins.llmppl")  # counted by a strict build
ROLE = re.compile(r":(?:py:)?(class|func|meth|attr|data|mod|exc|obj):`([^`]+)`")
MATH_ROLE = re.compile(r":math:`([^`]+)`")
TITLE = re.compile(r"(?<![`\w:])`([^`\n]+(?:\n[^`\n]+)?)`(?![`\w])")
MATH = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<first>.*)\n(?P<rest>(?:(?P=indent) +\S.*\n|[ ]*\n(?=(?P=indent) +\S))*)", re.M
)
LITERAL = re.compile(r"^(?P<indent> *)(?P<text>\S.*)::\n(?P<block>(?:[ ]*\n|(?P=indent) +\S.*\n)+)", re.M)
FIELD = re.compile(r"^:(param|raises|returns|type|rtype)\b")
REFERENCE = re.compile(r"^\[(\d+)\] ", re.M)


class RestDocstrings(griffe.Extension):
    """Has every docstring of a package read in this way; it is converted when a page shows it."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        names = {obj.path: obj for obj in _objects(pkg)}
        for obj in names.values():
            if obj.docstring is not None:
                obj.docstring.__class__ = RestDocstring
                obj.docstring.names = names  # type: ignore[attr-defined]


class RestDocstring(griffe.Docstring):
    """A docstring whose sections are Markdown, with what stands behind the fields as a section of its own."""

    names: dict[str, griffe.Object]

    @property
    def parsed(self) -> list[griffe.DocstringSection]:
        if "sections" not in self.__dict__:
            self.__dict__["sections"] = self._sections()
        return self.__dict__["sections"]

    def _sections(self) -> list[griffe.DocstringSection]:
        obj = self.parent
        assert obj is not None
        head, fields, tail = (markdown(part, obj, self.names) for part in split(self.value))
        fields = spread(fields)
        known = {p.name.lstrip("*") for p in getattr(obj, "parameters", [])} | set(obj.members)
        for name in re.findall(r"^:param \*{0,2}(\w+):", fields, re.M):
            if name not in known:
                log.warning("%s: :param %s: is no parameter", obj.path, name)
        text = "\n\n".join(part for part in (head, fields) if part)
        sections = griffe.Docstring(text, parent=obj).parse("sphinx", warnings=False)
        if tail:
            sections.append(griffe.DocstringSectionText(references(tail)))
        return sections


def _objects(obj: griffe.Object) -> list[griffe.Object]:
    found = [obj]
    for member in obj.members.values():
        if not member.is_alias:
            found += _objects(member)  # type: ignore[arg-type]
    return found


def split(value: str) -> tuple[str, str, str]:
    """What stands before the fields, the fields, and what stands behind or between them."""
    parts: list[list[str]] = [[], [], []]
    place = 0
    for line in value.splitlines():
        if FIELD.match(line):
            place = 1
        elif line[:1].strip() and (place == 1 or line.strip() == "References"):
            place = 2
        parts[place].append(line)
    return "\n".join(parts[0]), "\n".join(line for line in parts[1] if line.strip()), "\n".join(parts[2])


def markdown(value: str, obj: griffe.Object, names: dict[str, griffe.Object]) -> str:
    """Roles, formulas and literal blocks of one text."""
    if not value.strip():
        return ""
    value = MATH.sub(_display, value + "\n")
    value = LITERAL.sub(_code, value)
    parts = re.split(r"(^ *```python\n.*?^ *```$)", value, flags=re.M | re.S)
    for n in range(0, len(parts), 2):
        part = MATH_ROLE.sub(lambda found: rf"\({_line(found[1])}\)", parts[n])
        part = ROLE.sub(lambda found: _link(found[1], _line(found[2]), obj, names), part)
        parts[n] = TITLE.sub(_title, part)
    return "".join(parts).rstrip()


def _display(found: re.Match[str]) -> str:
    indent = found["indent"]
    formula = [line.strip() for line in (found["first"] + "\n" + found["rest"]).splitlines() if line.strip()]
    return f"\n{indent}$$\n" + "".join(f"{indent}{line}\n" for line in formula) + f"{indent}$$\n\n"


def _code(found: re.Match[str]) -> str:
    indent, block = found["indent"], textwrap.dedent(found["block"]).strip("\n")
    body = textwrap.indent(f"```python\n{block}\n```", indent)
    return f"{indent}{found['text']}:\n\n{body}\n\n"


def _title(found: re.Match[str]) -> str:
    text = _line(found[1])
    return f"*{text}*" if " " in text else f"`{text}`"


def _line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text).strip()


def _link(role: str, target: str, obj: griffe.Object, names: dict[str, griffe.Object]) -> str:
    """A link where the name has a place in the reference, code where it has none."""
    short, target = target.startswith("~"), target.lstrip("~").replace(" ", "")
    shown = (target.rpartition(".")[2] if short else target) + ("()" if role in ("func", "meth") else "")
    path = _path(target, obj, names)
    if path is None:
        log.warning("%s: :%s:`%s` names nothing of this package", obj.path, role, target)
        return f"`{shown}`"
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'


def _path(target: str, obj: griffe.Object, names: dict[str, griffe.Object]) -> str | None:
    root = obj.package
    if not target.startswith(f"{root.name}."):
        scope: griffe.Object | None = obj
        while scope is not None:
            first, _, rest = target.partition(".")
            found = scope.members.get(first)
            if found is not None:
                return _member(found, rest)
            scope = scope.parent  # type: ignore[assignment]
        last = [path for path in names if path.endswith(f".{target}")]
        twin = f"{root.name}.numpyro."
        ours = [path for path in last if path.startswith(twin) == obj.path.startswith(twin)]
        return min(ours or last, key=len, default=None)
    try:
        return _member(root, target.partition(".")[2])
    except KeyError:
        return None


def _member(found: griffe.Object | griffe.Alias, rest: str) -> str:
    for name in filter(None, rest.split(".")):
        found = found.final_target if found.is_alias else found  # type: ignore[union-attr]
        found = found.all_members[name]
    return found.final_target.path if found.is_alias else found.path  # type: ignore[union-attr]


def spread(fields: str) -> str:
    """One field a name, and one type a field: ``:param a, b:`` and ``:raises A, B:`` are more than one."""
    found = []
    for field in re.split(r"\n(?=:)", fields):
        several = re.match(r":(param|raises) (\w+(?:, \w+)+): ?(.*)", field, re.S)
        if several is None:
            found.append(field)
        elif several[1] == "raises":
            found.append(f":raises {several[2].replace(', ', '|')}: {several[3]}")
        else:
            found += [f":param {name}: {several[3]}" for name in several[2].split(", ")]
    return "\n".join(found)


def references(tail: str) -> str:
    """Numbered references as a list."""
    tail = re.sub(r"^References$", "**References**\n", tail, flags=re.M)
    return REFERENCE.sub(lambda found: f"- [{found[1]}] ", tail)
