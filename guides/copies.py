"""Copies of guides: independent ones, on the same language model, with adapters of their own."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pyro.nn import PyroModule

from llmppl.language_model import LM
from llmppl.network.digests import weights_digest
from llmppl.network.pickling import packed, unpacked
from llmppl.programs.structure import Program

_numbers = itertools.count(1)

SHARED = ("lm", "transformer", "adapters", "model")
"""What a copy has in common with its original: names in a pickle."""


class Copied(Protocol):
    """A guide, as far as its copying goes."""

    @property
    def lm(self) -> LM: ...
    @property
    def model(self) -> Program: ...
    def own_adapters(self) -> tuple[str, ...]: ...
    def became_a_copy(self, names: Mapping[str, str]) -> None: ...


def independent(guide: Copied, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy`` of a guide: same program and language model, and an adapter of its own with the same values.

    Where the language model itself is being copied, and was so before the guide, the copy belongs to that copy.
    """
    lm: LM = guide.lm
    carried = id(lm) in memo
    other: LM = memo.get(id(lm), lm)
    for part, its in zip(_parts(lm), _parts(other), strict=True):
        memo[id(part)] = its
    memo.setdefault(id(guide.model), guide.model)
    names = {name: name if carried else lm.adapters.duplicate(name) for name in guide.own_adapters()}
    for name, new in names.items():
        theirs = other.adapters.parameters(new)
        memo.update({id(p): theirs[key] for key, p in lm.adapters.parameters(name).items()})
    twin = type(guide).__new__(type(guide))
    memo[id(guide)] = twin
    twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in _state(guide).items()})
    twin.became_a_copy(names)
    _named_anew(twin)
    return twin


def _named_anew(twin: Any) -> None:
    """Give the Pyro modules in a copy (an AutoGuide for other sites) names of their own: Pyro's store keeps parameters
    by these names, and would put the original's in place of the copy's."""
    number = next(_numbers)
    for module in twin.modules():
        if isinstance(module, PyroModule):
            module.__dict__["_pyro_name"] = f"copy{number}.{module.__dict__['_pyro_name']}"


def reduced(guide: Copied) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """How pickle writes a guide: the program by its name; the language model by the way that leads from the program to
    it, where there is one, so that in another process the guide belongs to that program's model; its own tensors."""
    lm, names = guide.lm, guide.own_adapters()
    shared: dict[int, Any] = {id(part): name for part, name in zip((*_parts(lm), guide.model), SHARED, strict=True)}
    for name in names:
        shared |= {id(p): ("parameter", name, key) for key, p in lm.adapters.parameters(name).items()}
    way = _way(guide.model, lm)
    tensors = None if way is None else {name: lm.adapters.state(name) for name in names}
    state = packed(_state(guide), shared)
    known = lm if way is None else _identity(lm)
    return _restored, (type(guide), guide.model, way, known, lm.adapter, tensors, state)


def _restored(
    kind: Any,
    model: Program,
    way: tuple[str, str] | None,
    lm: Any,
    lm_adapter: str | None,
    tensors: Mapping[str, Any] | None,
    state: bytes,
) -> Any:
    if way is not None:
        found = _follow(model, way)
        if not isinstance(found, LM) or _identity(found) != lm:
            raise ValueError(
                f"this guide belongs to the language model of {lm}, and {way[1]!r} of its program is now {found!r}. "
                "Load the model that the guide was trained on."
            )
        lm = found if lm_adapter == found.adapter else found.base
    names = {name: lm.adapters.restore(name, its) for name, its in (tensors or {}).items()}
    shared: dict[Any, Any] = dict(zip(SHARED, (*_parts(lm), model), strict=True))
    guide = kind.__new__(kind)
    for name in [*names] if tensors is not None else lm.adapters.names:
        parameters = lm.adapters.parameters(names.get(name, name))
        shared |= {("parameter", name, key): p for key, p in parameters.items()}
    guide.__dict__.update(unpacked(state, shared))
    guide.became_a_copy(names)
    return guide


def _identity(lm: LM) -> dict[str, Any]:
    return {**lm.fingerprint(), "weights": weights_digest(lm.transformer)}


def _parts(lm: LM) -> tuple[Any, ...]:
    return lm, lm.transformer, lm.adapters


def _state(guide: Any) -> dict[str, Any]:
    return {key: None if key in guide.transient else value for key, value in guide.__dict__.items()}


def _way(program: Program, lm: LM) -> tuple[str, str] | None:
    """By which name the program itself knows a language model: its attribute, or a global of its module."""
    if inspect.isfunction(program):
        found = ((("global", n), v) for n, v in inspect.getclosurevars(program).globals.items())
    else:
        found = ((("attribute", n), v) for n, v in getattr(program, "__dict__", {}).items())
    return next((way for way, value in found if isinstance(value, LM) and value.base is lm.base), None)


def _follow(program: Any, way: tuple[str, str]) -> Any:
    kind, name = way
    return program.__globals__.get(name) if kind == "global" else getattr(program, name, None)
