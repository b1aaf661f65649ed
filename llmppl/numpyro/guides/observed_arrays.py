"""What a program observes, and how its arguments relate to that: by its jaxpr, or by runs without a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmppl.numpyro.language_model import LM
from llmppl.numpyro.network.text_arrays import TextArgument, is_concrete
from llmppl.numpyro.programs.dependence import is_traced, recipes, sources
from llmppl.numpyro.programs.tracing import Site, Trace, is_observation
from llmppl.text.prompts import arguments_of
from llmppl.text.relations import Relation, Relations, changed_relation

Dry = Callable[[tuple[Any, ...], dict[str, Any]], Trace]
"""From the arguments of a program to its sites."""


class ObservedArrays:
    """How the arguments of one call of a program relate to its observed sites.

    :param lm: encodes strings.
    :param sites: of this call.
    :param signature, args, kwargs: of this call.
    :param dry: the program, run without a network.
    :param found: relations that were seen in earlier calls.
    """

    def __init__(
        self, lm: LM, sites: Mapping[str, Site], signature: Any, args: Any, kwargs: Any, dry: Dry, found: Relations
    ) -> None:
        self.lm, self.sites, self.dry, self.found = lm, sites, dry, found
        self.signature, self.args, self.kwargs = signature, args, kwargs
        self.arguments = arguments_of(signature, args, kwargs)
        self.traced = [name for name, value in self.arguments.items() if is_traced(value)]

    def relation(self, name: str) -> Relation:
        """Of an argument. That a known one carries an observation is looked at in every call."""
        found = self.found.of(name, self.arguments, self.sites, lambda: self._look(name))
        value = self.arguments[name]
        if name in self.traced or all(self._carries(value, self.sites[site]["value"]) for site in found.carried):
            return found
        return self._look(name)

    def _look(self, name: str) -> Relation:
        value = self.arguments[name]
        if name not in self.traced:
            return changed_relation(value, self.lm.spelling, lambda v: self._observed(name, v), self._carries, _same)
        own, tree = jax.tree.flatten(value)
        related, is_leaf = sources(lambda leaves: self._values({name: jax.tree.unflatten(tree, leaves)}), own)
        # A text argument is its verbatim reading, the second of its two leaves, wherever it is observed.
        whole = {len(own) - 1} if len(own) == 1 or isinstance(value, TextArgument) else set()
        carried = {site for site, number in is_leaf.items() if number in whole}
        return Relation(
            tuple(sorted(carried)), tuple(sorted(site for site in related if related[site] and site not in carried))
        )

    def _observed(self, name: str, value: Any) -> dict[str, Any]:
        """The observed values with another value of an argument; while compiling, how they are made."""
        values = self._values({name: value})
        if all(is_concrete(leaf) for leaf in jax.tree.leaves(values)):
            return values
        moving = {other: self.arguments[other] for other in self.traced}
        leaves, tree = jax.tree.flatten(moving)
        made = recipes(lambda leaves: self._values({name: value, **jax.tree.unflatten(tree, leaves)}), leaves)
        return {site: own if _known(own) else made[site] for site, own in values.items()}

    def _values(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        bound = self.signature.bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        bound.arguments.update(changes)
        sites = self.dry(bound.args, bound.kwargs)
        return {site: node["value"] for site, node in sites.items() if is_observation(node)}

    def _carries(self, value: Any, observed: Any) -> bool:
        """Whether an observed value is that of an argument, as it is or encoded."""
        if value is observed:
            return True
        if isinstance(observed, tuple) or not _known(observed):
            return False
        try:
            if isinstance(value, str) or (isinstance(value, (list, tuple)) and isinstance(value[0], str)):
                return _same(self.lm.encode(value), observed)
            floating = jnp.issubdtype(jnp.result_type(observed), jnp.floating)
            return _same(np.asarray(value, jnp.result_type(observed) if floating else None), observed)
        except (TypeError, ValueError, IndexError):
            return False


def _known(value: Any) -> bool:
    return all(is_concrete(leaf) for leaf in jax.tree.leaves(value))


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, tuple) or isinstance(second, tuple):
        return type(first) is type(second) and bool(first == second)
    if not (_known(first) and _known(second)):
        return first is second
    first, second = np.asarray(first), np.asarray(second)
    return first.shape == second.shape and bool(((first == second) | ((first != first) & (second != second))).all())


def as_array(value: Any) -> Any:
    """An observed value as prompts get it: a number as an array."""
    return jnp.asarray(value) if isinstance(value, (int, float)) else value
