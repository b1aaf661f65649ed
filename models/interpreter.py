"""A small part of Python, interpreted in process by its syntax tree, for programs whose text is code.

What a language model writes is never executed. Its syntax tree is walked here: every node counts as a step, every value
is measured, and what is not named below does not exist. There are no imports, no attributes, no builtins of Python's.
The values, and the functions that there are of them, are in ``interpreted``; what Python settles before it runs
anything is in ``compiled``.
"""

from __future__ import annotations

import ast
import warnings
from collections import ChainMap
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any

from llmppl.models.compiled import COMPREHENSIONS, check, generates, own_names
from llmppl.models.interpreted import (
    BINARY,
    BITS,
    COMPARISONS,
    GATHERING,
    IN_PLACE,
    KINDS,
    ORDERED,
    OWN,
    SIZE,
    UNARY,
    OnePass,
    Refused,
    in_order,
    shown,
    weight,
)
from llmppl.text.declared import declared

FAILED = "error"
"""What :func:`run` says of code that cannot be run, or does not finish."""

LONGEST = 4000
"""Characters of a source, at most."""

DEPTH = 40
"""Calls within calls, and blocks within blocks, at most."""

UNBOUND = object()
"""What a name stands for in the function or comprehension that it belongs to, before it is assigned to."""

Names = MutableMapping[str, Any]


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
    ``while``, ``return``, ``break``, ``continue``, ``pass``; numbers, strings, lists, tuples, dicts, sets, slices,
    comprehensions and generator expressions; arithmetic, comparisons, ``and``, ``or``, ``not``; and calls of the
    source's own functions and of
    ``abs all any bool enumerate float int len list max min range reversed round set sorted str sum tuple zip``.
    Whatever it runs has the value that it has in Python. So the order of a set of strings, which Python draws anew in
    each process, is not told: to loop over one of several elements, or to show it, is an error.

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
            check(module, source, call)
        machine = _Machine(steps)
        machine.define(module)
        return shown(machine.value(asked, {}))
    # Whatever goes wrong inside is the code's fault: Python's own errors of its operations, and the limits.
    except (Refused, ArithmeticError, LookupError, TypeError, ValueError, SyntaxError):
        return FAILED
    # Of a dict that changes while it is walked, of a generator that walks itself, and of too deep a recursion.
    except (RuntimeError, MemoryError):
        return FAILED


class _Machine:
    """The functions of a source, and what is left of the limits."""

    def __init__(self, steps: int) -> None:
        self.left, self.depth = steps, 0
        self.functions: dict[str, ast.FunctionDef] = {}
        self.own_names: dict[str, set[str]] = {}
        self.generates: dict[str, bool] = {}

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
            self.own_names[node.name] = own_names(node)
            self.generates[node.name] = generates(node)

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
            self.step(weight(value) // 16)
        return value

    # --- statements ------------------------------------------------------------------------------

    def block(self, body: Iterable[ast.stmt], names: Names) -> None:
        self.depth += 1
        if self.depth > DEPTH:
            raise Refused("too deep")
        for node in body:
            self.step()
            self.statement(node, names)
        self.depth -= 1

    def statement(self, node: ast.stmt, names: Names) -> None:
        if isinstance(node, ast.Return):
            raise _Return(None if node.value is None else self.value(node.value, names))
        if isinstance(node, ast.Assign):
            value = self.value(node.value, names)
            for target in node.targets:
                self.assign(target, value, names)
        elif isinstance(node, ast.AugAssign):
            self.augment(node, names)
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

    def loop(self, node: ast.For | ast.While, names: Names) -> None:
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

    def turns(self, node: ast.For | ast.While, names: Names) -> Iterator[Any]:
        if isinstance(node, ast.For):
            yield from self.items(self.value(node.iter, names))
            return
        while self.value(node.test, names):
            self.step()
            yield None

    def items(self, value: Any) -> Iterator[Any]:
        """What a loop walks, as it then is: the code may change a list meanwhile. Refused at once if it is nothing."""
        if isinstance(value, OnePass):
            return self.drawn(value)
        if not isinstance(value, (str, list, tuple, dict, set, range)):
            raise Refused(f"a loop over a {type(value).__name__}")
        return self.each(iter(in_order(value)))

    def each(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.step()
            yield item

    def drawn(self, value: OnePass) -> Iterator[Any]:
        """What is left of a value that is walked once. Not by ``yield from``, which would end it with the loop."""
        while True:
            self.step()
            self.depth += 1  # for to draw may be to draw from another
            if self.depth > DEPTH:
                raise Refused("too deep")
            item = next(value.left, UNBOUND)
            self.depth -= 1
            if item is UNBOUND:
                return
            yield self.checked(item)

    def assign(self, target: ast.expr, value: Any, names: Names) -> None:
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
            self.store(container, self.value(target.slice, names), value)
        else:
            raise Refused(type(target).__name__)

    def store(self, container: Any, place: Any, value: Any) -> None:
        if not isinstance(container, (list, dict)):
            raise Refused("an assignment to no element")
        container[place] = self.checked(value)
        self.checked(container)

    def augment(self, node: ast.AugAssign, names: Names) -> None:
        """``a += b``: lists and sets change where they are, and what the target says is evaluated once."""
        target = node.target
        if isinstance(target, ast.Name):
            value = self.value(ast.Name(target.id, ast.Load()), names)
            self.assign(target, self.in_place(node.op, value, self.value(node.value, names)), names)
        elif isinstance(target, ast.Subscript):
            container, place = self.value(target.value, names), self.value(target.slice, names)
            value = self.checked(container[place])
            self.step()
            self.store(container, place, self.in_place(node.op, value, self.value(node.value, names)))
        else:
            raise Refused(type(target).__name__)

    def in_place(self, op: ast.operator, left: Any, right: Any) -> Any:
        if not (isinstance(op, ast.Add) and isinstance(left, list)):
            return self.binary(op, left, right, IN_PLACE)
        for item in self.items(list(right) if isinstance(right, list) else right):  # it may be the list itself
            left.append(item)
            if len(left) > SIZE:
                raise Refused("a value too large")
        return left

    # --- expressions -----------------------------------------------------------------------------

    def value(self, node: ast.expr, names: Names) -> Any:
        self.step()
        return self.checked(self._value(node, names))

    def _value(self, node: ast.expr, names: Names) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            found = names.get(node.id, UNBOUND)
            if found is UNBOUND:
                raise Refused(f"no {node.id}")
            return found
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
            parts = [self.value(part, names) for part in node.elts]
            return {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)](parts)
        if isinstance(node, ast.Dict):
            if None in node.keys:
                raise Refused("an unpacked dict")
            return {
                self.value(k, names): self.value(v, names) for k, v in zip(node.keys, node.values, strict=True) if k
            }
        if isinstance(node, ast.Subscript):
            return self.element(node, names)
        if isinstance(node, COMPREHENSIONS):
            found = self.comprehended(node, names)
            if isinstance(node, ast.GeneratorExp):
                return OnePass(found)
            kind = {ast.ListComp: list, ast.SetComp: set, ast.DictComp: dict}[type(node)]
            return kind(found)
        if isinstance(node, ast.Call):
            return self.call(node, names)
        raise Refused(type(node).__name__)

    def binary(self, op: ast.operator, left: Any, right: Any, table: Any = BINARY) -> Any:
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
        return table[type(op)](left, right)

    def boolean(self, node: ast.BoolOp, names: Names) -> Any:
        value: Any = None
        for part in node.values:
            value = self.value(part, names)
            if bool(value) != isinstance(node.op, ast.And):
                break
        return value

    def comparison(self, node: ast.Compare, names: Names) -> bool:
        left = self.value(node.left, names)
        for op, right in zip(node.ops, node.comparators, strict=True):
            other = self.value(right, names)
            searched = other
            if isinstance(op, (ast.In, ast.NotIn)):
                if isinstance(other, range) and not isinstance(left, int):
                    self.step(len(other))  # a number that is whole is found without a search
                if isinstance(other, OnePass):
                    searched = self.drawn(other)  # up to what is sought
            if not COMPARISONS[type(op)](left, searched):
                return False
            left = other
        return True

    def element(self, node: ast.Subscript, names: Names) -> Any:
        value = self.value(node.value, names)
        if not isinstance(node.slice, ast.Slice):
            return value[self.value(node.slice, names)]
        places = (node.slice.lower, node.slice.upper, node.slice.step)
        return value[slice(*(None if part is None else self.value(part, names) for part in places))]

    def comprehended(self, node: Any, names: Names) -> Iterator[Any]:
        """The elements, made as they are asked for; what the first loop walks is evaluated at once, and outside."""
        loops = node.generators
        parts = [part for loop in loops for part in ast.walk(loop.target) if isinstance(part, ast.Name)]
        targets = [part.id for part in parts if isinstance(part.ctx, ast.Store)]
        # Of other names it sees what they stand for when an element is made, hence no copy.
        inside = ChainMap({name: UNBOUND for name in targets}, names)
        return self.elements(node, loops, self.items(self.value(loops[0].iter, names)), inside)

    def elements(
        self, node: Any, loops: Sequence[ast.comprehension], items: Iterator[Any], names: Names
    ) -> Iterator[Any]:
        first, *rest = loops
        for item in items:
            self.assign(first.target, item, names)
            if not all(self.value(test, names) for test in first.ifs):
                continue
            if rest:
                yield from self.elements(node, rest, self.items(self.value(rest[0].iter, names)), names)
            elif isinstance(node, ast.DictComp):
                yield self.value(node.key, names), self.value(node.value, names)
            else:
                yield self.value(node.elt, names)

    def call(self, node: ast.Call, names: Names) -> Any:
        if not isinstance(node.func, ast.Name) or node.keywords:
            raise Refused("a call of no plain function")
        if any(isinstance(part, ast.Starred) for part in node.args):
            raise Refused("unpacked arguments")
        name = node.func.id
        if name in names:
            raise Refused(f"a call of a value, {name}")  # of a variable: no function is a value
        values = [self.value(part, names) for part in node.args]
        if name in self.functions:
            return self.called(name, values)
        if name not in OWN:
            raise Refused(f"no {name}")
        return self.own(name, values)

    def own(self, name: str, values: list[Any]) -> Any:
        """What a function of Python's gives; what is to be walked is walked by steps of ours."""
        for value in values[:-1]:
            self.checked(value)  # again, for the arguments after it may have changed it
        if name in ORDERED and values:
            in_order(values[0])
        if name == "zip":
            values = [self.items(value) for value in values]
        elif name == "enumerate":
            values[:1] = [self.items(value) for value in values[:1]]
        elif name in ("all", "any"):
            values = [self.items(value) if isinstance(value, (OnePass, range)) else value for value in values]
        elif name != "reversed":
            self.step(sum(len(value) for value in values if isinstance(value, range)))
            # The least of one value is that of its elements, the least of two is one of the two.
            walks = name in GATHERING and (len(values) == 1 or name == "sum")
            if walks and values and isinstance(values[0], OnePass):
                values[0] = self.checked(list(self.drawn(values[0])))
        return OWN[name](*values)

    def called(self, name: str, values: list[Any]) -> Any:
        function = self.functions[name]
        parameters = [given.arg for given in function.args.args]
        if len(parameters) != len(values):
            raise Refused("other arguments")
        if self.generates[name]:
            raise Refused("a generator")
        depth = self.depth
        names = dict.fromkeys(self.own_names[name], UNBOUND) | dict(zip(parameters, values, strict=True))
        try:
            self.block(function.body, names)
        except _Return as returned:
            return returned.value
        finally:
            self.depth = depth
        return None
