"""How a program's arguments relate to its observations: what a guide may be told where observations are simulated.

A prompt that asks for an argument gets what the caller passed. Where the observations are simulated, an argument that
carries one of them must not be that: it would put one datum's observation beside another's text.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmppl.text.spelling import Spelling


@dataclass(frozen=True)
class Relation:
    """Of an argument, to the sites that the program observes.

    :param carried: sites whose observed value is the argument.
    :param derived: sites whose observed value is made from it.
    :param unseen: why the relation cannot be seen, for a sentence; ``None`` where it was.
    """

    carried: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    unseen: str | None = None


class Relations:
    """Relations that a guide has looked at: once for each kind of call, whatever the values."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Relation] = {}

    def of(
        self, name: str, arguments: Mapping[str, Any], sites: Iterable[str], look: Callable[[], Relation]
    ) -> Relation:
        """The relation of argument ``name`` in a call.

        :param sites: that the call observes.
        :param look: finds it where no call of this kind was seen.
        """
        key = (name, frozenset(sites), tuple((other, kind(value)) for other, value in arguments.items()))
        if key not in self._found:
            self._found[key] = look()
        return self._found[key]


def kind(value: Any) -> Hashable:
    """What two values have in common whose calls are of one kind: types, and the flags that steer a program."""
    if value is None or isinstance(value, bool):
        return value
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return type(value).__name__, str(value.dtype), len(value.shape)
    if isinstance(value, Mapping):
        return tuple((str(key), kind(entry)) for key, entry in value.items())
    if isinstance(value, tuple):
        return tuple(kind(entry) for entry in value)
    if isinstance(value, list):
        return type(value).__name__, frozenset(kind(entry) for entry in value)
    return type(value).__name__


def changed_relation(
    value: Any,
    spelling: Spelling,
    observed: Callable[[Any], Mapping[str, Any]],
    carries: Callable[[Any, Any], bool],
    same: Callable[[Any, Any], bool],
) -> Relation:
    """The relation of an argument, by runs of the program with other values in its place.

    :param value: the argument's.
    :param observed: the program's observed values by site, given a value of the argument.
    :param carries: whether an observed value is the argument's, as it was given or encoded.
    :param same: whether two observed values are.
    """
    if value is None:
        return Relation()
    others = other_values(value, spelling)
    if not others:
        return Relation(unseen=f"of {_described(value)} no other values are known to try")
    base = observed(value)
    carried = {site for site, own in base.items() if carries(value, own)}
    changed: set[str] = set()
    ran, error = False, None
    for other in others:
        try:
            found = observed(other)
        except Exception as failure:  # whatever a program does with values that it was not written for
            error = failure
            continue
        ran = True
        for site in base.keys() & found.keys():
            if not same(base[site], found[site]):
                changed.add(site)
            if not carries(other, found[site]):
                carried.discard(site)
    if not ran:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return Relation(unseen=f"the program fails with each of the other values that were tried ({said})")
    return Relation(tuple(sorted(carried)), tuple(sorted(changed - carried)))


def told(prompt: str, name: str, value: Any, relation: Relation, simulated: Mapping[str, Any]) -> Any:
    """An argument as a prompt is told it beside simulated observations.

    :param prompt: the site that the prompt is of.
    :param name: of the argument.
    :param simulated: values by observed site.
    :raises ValueError: an argument from which an observation is made otherwise than by ``obs=`` itself, or whose
        relation to the observations cannot be seen.
    """
    asks = (
        f"prompt[{prompt!r}] asks for {name!r}, an argument of the program, where observations are simulated or "
        "noised, and"
    )
    if relation.unseen is not None:
        raise ValueError(
            f"{asks} whether an observation is made from it cannot be seen: {relation.unseen}. {_mend(simulated)}; "
            "or, if it has nothing to do with them, close over its value."
        )
    sites = [site for site in (*relation.carried, *relation.derived) if site in simulated]
    if not sites:
        return value
    if len(sites) > 1 or sites[0] in relation.derived:
        many = f"sites {sites} are" if len(sites) > 1 else f"site {sites[0]!r} is"
        raise ValueError(
            f"{asks} the observation of {many} made from it: it would be told as it is in the data, whatever text "
            f"stands beside it. {_mend(sites)}."
        )
    return simulated[sites[0]]


def _mend(sites: Iterable[str]) -> str:
    names = list(sites)
    which = f"the site {names[0]!r}" if len(names) == 1 else f"the sites among {names}"
    return f"Ask for {which} instead: lambda ..., {names[0]}: [...]"


def other_values(value: Any, spelling: Spelling) -> list[Any]:
    """Values to try in the place of an argument, of its type and, of arrays, its shape; none for what is unknown here.

    Several for each, lest a program that looks at the beginning, the length or the sign alone should see no change.
    """
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, 2 * value + 1, -value - 1, 4 * value + 7]
    if isinstance(value, float):
        return [value + 1, value - 1, 1.5 * value + 0.25, -value - 1, 10 * value + 10]
    if isinstance(value, str):
        return _other_texts(value, spelling)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return _other_arrays(value, spelling.vocabulary)
    if isinstance(value, Mapping):
        rows = _entrywise(list(value.values()), spelling)
        return [dict(zip(value, row, strict=True)) for row in rows]
    if isinstance(value, (list, tuple)):
        rows = _entrywise(list(value), spelling)
        return [replaced_entries(value, row) for row in rows]
    return []


def _described(value: Any) -> str:
    return f"{value!r}" if isinstance(value, str) else f"a value of type {type(value).__name__}"


def replaced_entries(value: list[Any] | tuple[Any, ...], entries: list[Any]) -> Any:
    """A list or a tuple of the same type with other entries."""
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def _entrywise(values: list[Any], spelling: Spelling) -> list[list[Any]]:
    """All entries changed at a time; none where one cannot be."""
    others = [[None] if value is None else other_values(value, spelling) for value in values]
    if not all(others) or all(value is None for value in values):
        return []
    return [[own[n % len(own)] for own in others] for n in range(max(map(len, others)))]


def _other_texts(text: str, spelling: Spelling) -> list[str]:
    vocabulary, tried = spelling.vocabulary, [text + text, text[::-1], text[: len(text) // 2], text[len(text) // 2 :]]
    try:
        ids = spelling.ids(text)
        tried += [spelling.codec.decode([(n + shift) % vocabulary for n in ids]) for shift in (1, 2)]
    except ValueError:
        pass
    tried += [spelling.codec.decode([vocabulary // 2]), f" {text} "]
    # Other numbers in the same places, for programs that read them.
    tried.append("".join(str((int(c) + 1) % 10) if c in "0123456789" else c for c in text))
    return [other for n, other in enumerate(tried) if other.strip() and other != text and other not in tried[:n]]


def _other_arrays(value: Any, vocabulary: int) -> list[Any]:
    """By operators alone, which tensors and arrays of any framework have."""
    kind_of = str(value.dtype)
    if "bool" in kind_of:
        tried = [~value]
    elif "int" in kind_of:
        # The first are texts, too: other tokens, and padding where it was.
        moved = [value + (value >= 0) * ((value + shift) % vocabulary - value) for shift in (1, 2)]
        tried = [*moved, value + 1, value - 1, 2 * value + 1, -value - 1]
    elif "float" in kind_of:
        tried = [value + 1, value - 1, 1.5 * value + 0.25, -value - 1, 10 * value + 10]
    else:
        return []
    return [other for other in tried if bool((other != value).any())]
