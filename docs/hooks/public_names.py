"""Every public name has a docstring and a place in the reference."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import griffe


def problems(root: Path, anchors: set[str]) -> Iterator[str]:
    """What is wrong with the names of every ``__all__``.

    :param anchors: identifiers on the reference's pages.
    """
    package = griffe.load("llmppl", search_paths=[str(root)])
    shown = {_defined(package, anchor) for anchor in anchors if "." in anchor}
    for module, names in sorted(exports(root).items()):
        for name in names:
            path = f"{module}.{name}"
            defined = _defined(package, path)
            if defined is None:
                yield f"{path} is in __all__ and nowhere else"
            elif not package[defined.partition(".")[2]].has_docstring:
                yield f"{path} has no docstring"
            elif defined not in shown:
                yield f"{path} is on no page of the reference (docs/api/)"


def _defined(package: griffe.Object, path: str) -> str | None:
    """Where a name comes from."""
    try:
        found = package[path.partition(".")[2]]
        if found.is_module:  # a function of the name of its module
            found = found[path.rpartition(".")[2]]
        return found.final_target.path if found.is_alias else found.path
    except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
        return None


def exports(root: Path) -> dict[str, list[str]]:
    """The names of every ``__all__`` that is written as a list, by module."""
    found = {}
    for package, folder in (("llmppl", "llmppl"), ("llmppl.guides", "guides"), ("llmppl.models", "models")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            if path.is_relative_to(root / "llmppl" / "guides") or path.is_relative_to(root / "llmppl" / "models"):
                continue
            module = ".".join([package, *(part for part in parts if part != "__init__")])
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
                    found[module] = ast.literal_eval(node.value)
    return found
