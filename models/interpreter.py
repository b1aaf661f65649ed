"""A small part of Python, interpreted in process by its syntax tree, for programs whose text is code.

What a language model writes is never executed. Its syntax tree is walked here: every node counts as a step, every value
is measured, and what is not named below does not exist. There are no imports, no attributes, no builtins of Python's.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from llmppl.text.declared import declared

FAILED = "error"
"""What :func:`run` says of code that cannot be run, or does not finish."""

LONGEST = 4000
"""Characters of a source, at most."""

SIZE = 1000
"""Elements and characters of a value, at most, those of the values in it included."""

BITS = 256
"""Of an integer, at most."""

DEPTH = 40
"""Calls within calls, and blocks within blocks, at most."""

BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}
KINDS = (int, float, str, bool, type(None), list, tuple, dict, set, range)
"""Of values; nothing else can arise."""


class Refused(Exception):
    """Code that is not of the subset, or that goes beyond a limit."""


class _Return(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


@declared
def run(source: str, call: str, steps: int = 5000) -> str:
    """What a call returns, given the functions of a source: ``run("def f(x):\\n    return x + 1", "f(2)")`` is ``"3"``.

    The subset: functions with plain parameters; assignments to names, elements and tuples of them; ``if``, ``for``,
    ``while``, ``return``, ``break``, ``continue``, ``pass``; numbers, strings, lists, tuples, dicts, sets, slices and
    comprehensions; arithmetic, comparisons, ``and``, ``or``, ``not``; and calls of the source's own functions and of
    ``abs all any bool enumerate float int len list max min range reversed round set sorted str sum tuple zip``.

    :param source: the code; at most 4000 characters.
    :param call: an expression of the same subset.
    :param steps: nodes that are visited, at most.
    :returns: the value's ``repr``; ``"error"`` for whatever is not of the subset, fails, or goes beyond a limit.
    """
    if len(source) + len(call) > LONGEST:
        return FAILED
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about the code's style
            module, asked = ast.parse(source), ast.parse(call, mode="eval").body
        machine = _Machine(steps)
        machine.define(module)
        return repr(machine.value(asked, {}))
    # Whatever goes wrong inside is the code's fault: Python's own errors of its operations, and the limits.
    except (Refused, _Return, _Break, _Continue, ArithmeticError, LookupError, TypeError, ValueError, SyntaxError):
        return FAILED
    except (RecursionError, MemoryError):
        return FAILED


class _Machine:
    """The functions of a source, and what is left of the limits."""

    def __init__(self, steps: int) -> None:
        self.left, self.depth = steps, 0
        self.functions: dict[str, ast.FunctionDef] = {}

    def define(self, module: ast.Module) -> None:
        for node in module.body:
            if not isinstance(node, ast.FunctionDef):
                raise Refused(f"{type(node).__name__} outside a function")
            given = node.args
            if given.posonlyargs or given.kwonlyargs or given.vararg or given.kwarg or given.defaults:
                raise Refused("parameters that are not plain")
            if node.decorator_list or node.name in OWN or getattr(node, "type_params", None):
                raise Refused("a decorated or renamed function")
            self.functions[node.name] = node

    # --- limits ----------------------------------------------------------------------------------

    def step(self, count: int = 1) -> None:
        self.left -= count
        if self.left < 0:
            raise Refused("too many steps")

    def checked(self, value: Any) -> Any:
        """A value of an allowed kind and size."""
        if type(value) not in KINDS:
            raise Refused(f"a {type(value).__name__}")
        if isinstance(value, int) and value.bit_length() > BITS:
            raise Refused("a number too large")
        if isinstance(value, (str, list, tuple, dict, set)):
            self.step(_weight(value) // 16)
        return value

    # --- statements ------------------------------------------------------------------------------

    def block(self, body: Iterable[ast.stmt], names: dict[str, Any]) -> None:
        self.depth += 1
        if self.depth > DEPTH:
            raise Refused("too deep")
        for node in body:
            self.step()
            self.statement(node, names)
        self.depth -= 1

    def statement(self, node: ast.stmt, names: dict[str, Any]) -> None:
        if isinstance(node, ast.Return):
            raise _Return(None if node.value is None else self.value(node.value, names))
        if isinstance(node, ast.Assign):
            value = self.value(node.value, names)
            for target in node.targets:
                self.assign(target, value, names)
        elif isinstance(node, ast.AugAssign):
            load = ast.copy_location(_loaded(node.target), node.target)
            self.assign(
                node.target, self.binary(node.op, self.value(load, names), self.value(node.value, names)), names
            )
        elif isinstance(node, ast.If):
            self.block(node.body if self.value(node.test, names) else node.orelse, names)
        elif isinstance(node, (ast.For, ast.While)):
            self.loop(node, names)
        elif isinstance(node, ast.Expr):
            self.value(node.value, names)
        elif isinstance(node, ast.Break):
            raise _Break
        elif isinstance(node, ast.Continue):
            raise _Continue
        elif not isinstance(node, ast.Pass):
            raise Refused(type(node).__name__)

    def loop(self, node: ast.For | ast.While, names: dict[str, Any]) -> None:
        depth = self.depth
        for item in self.turns(node, names):
            if isinstance(node, ast.For):
                self.assign(node.target, item, names)
            try:
                self.block(node.body, names)
            except _Break:
                self.depth = depth
                return
            except _Continue:
                self.depth = depth
        self.block(node.orelse, names)

    def turns(self, node: ast.For | ast.While, names: dict[str, Any]) -> Iterator[Any]:
        if isinstance(node, ast.For):
            yield from self.items(self.value(node.iter, names))
            return
        while self.value(node.test, names):
            self.step()
            yield None

    def items(self, value: Any) -> Iterator[Any]:
        if not isinstance(value, (str, list, tuple, dict, set, range)):
            raise Refused(f"a loop over a {type(value).__name__}")
        for item in list(value) if not isinstance(value, range) else value:
            self.step()
            yield item

    def assign(self, target: ast.expr, value: Any, names: dict[str, Any]) -> None:
        self.step()
        if isinstance(target, ast.Name):
            if target.id in OWN or target.id in self.functions:
                raise Refused(f"another {target.id}")
            names[target.id] = self.checked(value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            values = list(self.items(value))
            if len(values) != len(target.elts):
                raise Refused("an unpacking of another length")
            for part, own in zip(target.elts, values, strict=True):
                self.assign(part, own, names)
        elif isinstance(target, ast.Subscript):
            container = self.value(target.value, names)
            if not isinstance(container, (list, dict)) or isinstance(target.slice, ast.Slice):
                raise Refused("an assignment to no element")
            container[self.value(target.slice, names)] = self.checked(value)
            self.checked(container)
        else:
            raise Refused(type(target).__name__)

    # --- expressions -----------------------------------------------------------------------------

    def value(self, node: ast.expr, names: dict[str, Any]) -> Any:
        self.step()
        return self.checked(self._value(node, names))

    def _value(self, node: ast.expr, names: dict[str, Any]) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            if node.id not in names:
                raise Refused(f"no {node.id}")
            return names[node.id]
        if isinstance(node, ast.BinOp):
            return self.binary(node.op, self.value(node.left, names), self.value(node.right, names))
        if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
            return UNARY[type(node.op)](self.value(node.operand, names))
        if isinstance(node, ast.BoolOp):
            return self.boolean(node, names)
        if isinstance(node, ast.Compare):
            return self.comparison(node, names)
        if isinstance(node, ast.IfExp):
            return self.value(node.body if self.value(node.test, names) else node.orelse, names)
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
            return kind([self.value(part, names) for part in node.elts])
        if isinstance(node, ast.Dict):
            if None in node.keys:
                raise Refused("an unpacked dict")
            return {
                self.value(k, names): self.value(v, names) for k, v in zip(node.keys, node.values, strict=True) if k
            }
        if isinstance(node, ast.Subscript):
            return self.element(node, names)
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp)):
            found = list(self.comprehension(node.generators, node.elt, dict(names)))
            return set(found) if isinstance(node, ast.SetComp) else found
        if isinstance(node, ast.Call):
            return self.call(node, names)
        raise Refused(type(node).__name__)

    def binary(self, op: ast.operator, left: Any, right: Any) -> Any:
        if type(op) not in BINARY:
            raise Refused(type(op).__name__)
        if isinstance(op, ast.Pow):
            small = all(isinstance(v, (int, float)) for v in (left, right)) and abs(right) <= BITS
            if not small or (isinstance(left, int) and left.bit_length() * max(abs(right), 1) > 4 * BITS):
                raise Refused("a power too large")
        if isinstance(op, ast.Mult):
            for count, other in ((left, right), (right, left)):
                if isinstance(other, (str, list, tuple)) and isinstance(count, int) and len(other) * count > SIZE:
                    raise Refused("a repetition too long")
        if isinstance(op, ast.Mod) and isinstance(left, str):
            raise Refused("a format")
        return BINARY[type(op)](left, right)

    def boolean(self, node: ast.BoolOp, names: dict[str, Any]) -> Any:
        value: Any = None
        for part in node.values:
            value = self.value(part, names)
            if bool(value) != isinstance(node.op, ast.And):
                break
        return value

    def comparison(self, node: ast.Compare, names: dict[str, Any]) -> bool:
        left = self.value(node.left, names)
        for op, right in zip(node.ops, node.comparators, strict=True):
            other = self.value(right, names)
            if isinstance(other, range) and not isinstance(left, int):
                raise Refused("a search through a range")
            if not COMPARISONS[type(op)](left, other):
                return False
            left = other
        return True

    def element(self, node: ast.Subscript, names: dict[str, Any]) -> Any:
        value = self.value(node.value, names)
        if not isinstance(node.slice, ast.Slice):
            return value[self.value(node.slice, names)]
        places = (node.slice.lower, node.slice.upper, node.slice.step)
        return value[slice(*(None if part is None else self.value(part, names) for part in places))]

    def comprehension(
        self, generators: Sequence[ast.comprehension], element: ast.expr, names: dict[str, Any]
    ) -> Iterator[Any]:
        first, *rest = generators
        if first.is_async:
            raise Refused("async")
        for item in self.items(self.value(first.iter, names)):
            self.assign(first.target, item, names)
            if all(self.value(test, names) for test in first.ifs):
                if rest:
                    yield from self.comprehension(rest, element, names)
                else:
                    yield self.value(element, names)

    def call(self, node: ast.Call, names: dict[str, Any]) -> Any:
        if not isinstance(node.func, ast.Name) or node.keywords:
            raise Refused("a call of no plain function")
        if any(isinstance(part, ast.Starred) for part in node.args):
            raise Refused("unpacked arguments")
        values = [self.value(part, names) for part in node.args]
        name = node.func.id
        if name in self.functions:
            return self.called(self.functions[name], values)
        if name not in OWN:
            raise Refused(f"no {name}")
        for value in values:
            if isinstance(value, range):
                self.step(len(value))
        return OWN[name](*values)

    def called(self, function: ast.FunctionDef, values: list[Any]) -> Any:
        parameters = [given.arg for given in function.args.args]
        if len(parameters) != len(values):
            raise Refused("other arguments")
        depth = self.depth
        try:
            self.block(function.body, dict(zip(parameters, values, strict=True)))
        except _Return as found:
            return found.value
        finally:
            self.depth = depth
        return None


def _loaded(target: ast.expr) -> ast.expr:
    """The target of an assignment as an expression."""
    if isinstance(target, ast.Name):
        return ast.Name(target.id, ast.Load())
    if isinstance(target, ast.Subscript):
        return ast.Subscript(target.value, target.slice, ast.Load())
    raise Refused(type(target).__name__)


def _weight(value: Any) -> int:
    """How many elements and characters there are in a value, however often one stands in it."""
    waiting, count = [value], 0
    while waiting:
        item = waiting.pop()
        count += len(item) if isinstance(item, str) else 1
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        if count + len(waiting) > SIZE + 1:
            raise Refused("a value too large")
    return count


def _rounded(value: Any, digits: int = 0) -> Any:
    """``round``, but to few digits only: of an integer it computes that power of ten."""
    if not isinstance(value, (int, float)) or not isinstance(digits, int) or abs(digits) > 20:
        raise Refused("digits too many")
    return round(value, digits) if digits else round(value)


def _whole(value: Any) -> int:
    """``int``, but of short strings only: a long one takes quadratic time."""
    if isinstance(value, str) and len(value) > 20:
        raise Refused("a number too long")
    return int(value)


OWN: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "all": all,
    "any": any,
    "bool": bool,
    "enumerate": lambda values: list(enumerate(values)),
    "float": float,
    "int": _whole,
    "len": len,
    "list": list,
    "max": max,
    "min": min,
    "range": range,
    "reversed": lambda values: list(reversed(values)),
    "round": _rounded,
    "set": set,
    "sorted": sorted,
    "str": str,
    "sum": sum,
    "tuple": tuple,
    "zip": lambda *values: list(zip(*values, strict=False)),
}
"""The functions that there are, each bounded by the size of what it is given."""
