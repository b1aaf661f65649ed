"""What a program observes, and how its arguments relate to that, by runs that cost no forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmppl.language_model import LM
from llmppl.network.random_states import randomness_kept
from llmppl.programs.plates import outside_plates
from llmppl.programs.structure import Site, is_observation
from llmppl.text.prompts import arguments_of
from llmppl.text.relations import Relation, Relations, changed_relation

Dry = Callable[[tuple[Any, ...], dict[str, Any]], Mapping[str, Site]]
"""From the arguments of a program to its sites."""


class ObservedValues:
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

    def relation(self, name: str) -> Relation:
        """Of an argument. That it carries an observation is looked at in every call."""
        found = self.found.of(name, self.arguments, self.sites, lambda: self._look(name))
        value = self.arguments[name]
        if all(self._carries(value, self.sites[site]["value"]) for site in found.carried):
            return found
        return self._look(name)

    def _look(self, name: str) -> Relation:
        value = self.arguments[name]
        # The runs draw what they draw from one seed, so that only the argument differs.
        with randomness_kept(), torch.no_grad():
            return changed_relation(value, self.lm.spelling, lambda v: self._observed(name, v), self._carries, _same)

    def _observed(self, name: str, value: Any) -> dict[str, Any]:
        bound = self.signature.bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        bound.arguments[name] = value
        with randomness_kept(0), outside_plates():
            sites = self.dry(bound.args, bound.kwargs)
        return {site: node["value"] for site, node in sites.items() if is_observation(node)}

    def _carries(self, value: Any, observed: Any) -> bool:
        """Whether an observed value is that of an argument, as it is or encoded."""
        if value is observed:
            return True
        try:
            if isinstance(value, str) or (isinstance(value, (list, tuple)) and isinstance(value[0], str)):
                return _same(self.lm.encode(value), observed)
            observed = torch.as_tensor(observed)
            dtype = observed.dtype if observed.is_floating_point() else None
            return _same(torch.as_tensor(value, dtype=dtype), observed)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False


def _same(first: Any, second: Any) -> bool:
    first, second = torch.as_tensor(first), torch.as_tensor(second)
    if first.shape != second.shape:
        return False
    second = second.to(first.device)
    return bool(((first == second) | ((first != first) & (second != second))).all())


def as_tensor(value: Any) -> Tensor:
    """An observed value as prompts get it: a number as a tensor."""
    return torch.as_tensor(value) if isinstance(value, (int, float)) else value
