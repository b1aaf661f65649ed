"""What a program observes as a function of its arguments, read from its jaxpr."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, Var

from llmppl.numpyro.network.text_arrays import TextArgument, is_concrete

Observed = Callable[[list[Any]], Mapping[str, Any]]
"""From the arguments' traced leaves to the observed values by site."""


def is_traced(value: Any) -> bool:
    """Whether an argument is one of a compiled program: it can be followed through the jaxpr, and not be changed."""
    return any(
        isinstance(leaf, TextArgument) or not is_concrete(leaf)
        for leaf in jax.tree.leaves(value, is_leaf=lambda entry: isinstance(entry, TextArgument))
    )


def sources(observed: Observed, leaves: Sequence[Any]) -> tuple[dict[str, set[int]], dict[str, int]]:
    """Which leaves each observed value depends on, and which it is.

    :returns: by site, the numbers of the leaves; and, where it is one of them, its number.
    """
    jaxpr, outputs = _jaxpr(observed, leaves)
    number = {var: n for n, var in enumerate(jaxpr.jaxpr.invars)}
    needs: dict[Any, set[int]] = {var: {n} for var, n in number.items()}
    for equation in jaxpr.jaxpr.eqns:
        # Conservative: what a primitive, or a whole inner program, makes depends on all that it is given.
        given = set().union(*(needs.get(v, set()) for v in equation.invars if isinstance(v, Var)), set())
        needs.update({var: given for var in equation.outvars})
    related, same = {}, {}
    for site, own in outputs.items():
        related[site] = set().union(*(needs.get(v, set()) for v in own if isinstance(v, Var)), set())
        if len(own) == 1 and isinstance(own[0], Var) and own[0] in number:
            same[site] = number[own[0]]
    return related, same


def recipes(observed: Observed, leaves: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    """How each observed value is made from the leaves: equal for equal programs, whatever else they compute."""
    jaxpr, outputs = _jaxpr(observed, leaves)
    return {site: tuple(_recipe(jaxpr, outputs[site])) for site in outputs}


def _jaxpr(observed: Observed, leaves: Sequence[Any]) -> tuple[ClosedJaxpr, dict[str, list[Any]]]:
    """The jaxpr of the observed values, and its output variables by site."""
    counts: dict[str, int] = {}

    def run(leaves: list[Any]) -> list[Any]:
        flat: list[Any] = []
        for site, value in observed(leaves).items():
            own = [value.verbatim] if isinstance(value, TextArgument) else jax.tree.leaves(value)
            counts[site] = len(own)
            flat += own
        return flat

    jaxpr = jax.make_jaxpr(run)(list(leaves))
    outputs, variables = {}, list(jaxpr.jaxpr.outvars)
    for site, count in counts.items():
        outputs[site], variables = variables[:count], variables[count:]
    return jaxpr, outputs


def _recipe(jaxpr: ClosedJaxpr, outputs: Sequence[Any]) -> list[Any]:
    made = {var: equation for equation in jaxpr.jaxpr.eqns for var in equation.outvars}
    given: dict[Any, Any] = {var: ("argument", n) for n, var in enumerate(jaxpr.jaxpr.invars)}
    for var, value in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
        given[var] = _constant(value)
    steps: dict[int, int] = {}
    recipe: list[Any] = []

    def reach(var: Any) -> Any:
        if isinstance(var, Literal):
            return _constant(var.val)
        if var in given:
            return given[var]
        equation = made[var]
        if id(equation) not in steps:
            inputs = tuple(reach(v) for v in equation.invars)
            recipe.append((equation.primitive.name, str(equation.params), inputs))
            steps[id(equation)] = len(recipe)
        return ("step", steps[id(equation)], equation.outvars.index(var))

    ends = [reach(var) for var in outputs]
    return [*recipe, *ends]


def _constant(value: Any) -> Any:
    if not is_concrete(value):
        return ("outside", id(value))
    array = np.asarray(value)
    return ("constant", str(array.dtype), array.shape, array.tobytes())
