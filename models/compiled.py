"""What Python settles about code before any of it runs: its errors, and which names are a function's own."""

from __future__ import annotations

import ast

from llmppl.models.interpreted import Refused

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def check(module: ast.Module, source: str, call: str) -> None:
    """The errors that Python finds before it runs anything, such as a ``break`` outside of a loop.

    They are the compiler's to tell: it executes nothing, and what it makes is thrown away.
    """
    # It writes each ``finally`` twice, so those within one another take time without bound.
    if any(isinstance(node, (ast.Try, ast.TryStar)) and node.finalbody for node in ast.walk(module)):
        raise Refused("a finally")
    compile(source, "source", "exec", dont_inherit=True)
    compile(call, "call", "eval", dont_inherit=True)


def own_names(function: ast.FunctionDef) -> set[str]:
    """The names that are the function's own, wherever in it they are assigned to."""
    waiting: list[ast.AST] = [*function.body]
    found = {given.arg for given in function.args.args}
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif not isinstance(node, (ast.Lambda, *COMPREHENSIONS)):
            waiting += ast.iter_child_nodes(node)
    return found


def generates(function: ast.FunctionDef) -> bool:
    """Whether a call of a function makes a generator, as it does even if the ``yield`` in it is never reached."""
    return any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in ast.walk(function))
