"""A record in a format: JSON that fits a schema, some of whose fields are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any

from llmppl.models.primitives import Maker
from llmppl.text.declared import declared
from llmppl.text.grammar import Grammar

END = "\n"
WRITTEN = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""JSON as Python's ``json.dumps`` writes it."""

NONE = "null"
"""What a field is called that a text has not."""


def field(record: str, name: str) -> str:
    """The value of a field as text: ``field('{"age": 31}\\n', "age")`` is ``"31"``. Strings are without quotation
    marks; of what is no record, or has no such field, it is ``"null"``."""
    try:
        values = json.loads(record)
    except (ValueError, RecursionError):
        return NONE
    value = values.get(name) if isinstance(values, dict) else None
    if isinstance(value, str) and value and not any("\ud800" <= sign <= "\udfff" for sign in value):
        return value
    return json.dumps(value)  # half a surrogate pair is no text


def schema_grammar(schema: Mapping[str, Any] | bool) -> Grammar:
    """The JSON texts of a schema on one line, spaced as ``json.dumps`` does, with the line's end."""
    own = {**schema, "x-guidance": WRITTEN} if isinstance(schema, Mapping) else {"x-guidance": WRITTEN}
    if schema is False:
        raise ValueError("schema=False is satisfied by nothing. Give another one.")
    return Grammar.lark(f'start: record "\\n"\nrecord: %json {json.dumps(own)}')


@declared
def record(
    lm: Maker,
    schema: Mapping[str, Any] | bool,
    fields: Sequence[str] = (),
    prose_tokens: int = 0,
    max_tokens: int = 40,
    masked: bool = False,
) -> Callable[..., Any]:
    r"""The program that writes a record, conditioned on a schema and on fields that are known:

    .. math:: t \sim \text{lm}(\text{prompt}), \quad r \sim \text{lm}(\text{prompt}, t), \quad
              r \in L(\text{schema}), \quad r_f = v_f

    The posterior is over the other fields and over the prose ``t`` before. Sites: latent ``prose`` (where
    ``prose_tokens`` is positive) and ``record``, each a line; observed ``valid`` and each of ``fields``.

    ``masked=True`` is the same program with the schema as the law of ``record``, by which each token is drawn among
    those that the schema permits. That is no conditioning: it forgets how improbable the way was that the mask
    left open. As the model of a guide it proposes, and the importance weights make up for the rest. Where a value is
    known, :func:`given` makes a schema of it, whose mask permits that value alone::

        guide = AutoregressiveGuide(record(lm, schema, masked=True), lm)
        posterior = importance(record(lm, schema), guide, 64)(prompt)

    (Park et al. 2024, *Grammar-aligned decoding*, sec. 2 and 3; Loula et al. 2025.) The program's arguments are the
    prompt, and a value for each of ``fields``, in their order: strings, or lists of strings inside a plate.

    :param lm: a :class:`llmppl.LM`.
    :param schema: a JSON schema. Records are written as ``json.dumps`` writes them, properties in the schema's order.
    :param fields: names of properties that are observed.
    :param prose_tokens: most tokens of a line before the record; without it there is none.
    :param max_tokens: most tokens of the record. A record that is cut off is not valid, and drawing one warns.
    :param masked: see above.
    :raises ValueError: a schema that is no schema, or has no such fields.
    """
    if isinstance(fields, str):
        raise TypeError(f"fields={fields!r} is a string. Give a list of names.")
    known = schema.get("properties", {}) if isinstance(schema, Mapping) else {}
    for name in fields:
        if name not in known:
            raise ValueError(f"fields={list(fields)}: {name!r} is none of the schema's properties {list(known)}.")
        if name in ("prose", "record", "valid"):
            raise ValueError(f"fields={list(fields)}: {name!r} is a site of the program's own. Rename the property.")
    grammar = schema_grammar(schema)
    speller: Any = lm
    accepts = grammar.bind(speller).accepts
    widest = 8 * max_tokens  # written out, a value has more tokens than in a record without spaces
    law = {"max_tokens": max_tokens, "stop": END, **({"grammar": grammar} if masked else {})}
    sample, distributions = lm.primitives.sample, lm.primitives.distributions

    def known_value(name: str) -> Callable[[str], str]:
        return lambda text: field(text, name)

    def write(prompt: Any, *values: Any) -> Any:
        if len(values) != len(fields):
            raise ValueError(f"there are {len(values)} values of fields={list(fields)}. Give one for each, in order.")
        written = [prompt]
        if prose_tokens:
            written.append(sample("prose", lm(prompt, max_tokens=prose_tokens, stop=END)))
        text = sample("record", lm(*written, **law))
        valid = lm.map(lambda line: float(accepts(line)), text, returns=float)
        sample("valid", distributions.Delta(valid), obs=1.0 + 0 * valid)
        for name, value in zip(fields, values, strict=True):
            own = lm.map(known_value(name), text, max_tokens=widest, returns=str)
            told = lm.map(str, value, max_tokens=widest, returns=str)
            sample(name, distributions.Delta(own, event_dim=1), obs=told)
        return text

    return write


def given(schema: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """A schema of the records that have these values: ``given(schema, {"city": "Rome"})``.

    Of the guide's model, for a proposal that has what is known: ``record(lm, given(schema, {"city": "Rome"}),
    ["city"], masked=True)``.

    :param values: by property, written as :func:`field` gives them.
    :raises ValueError: a schema without such a property.
    """
    properties = dict(schema.get("properties", {}))
    for name, value in values.items():
        if name not in properties:
            raise ValueError(f"values: {name!r} is none of the schema's properties {list(properties)}.")
        own = properties[name] if isinstance(properties[name], Mapping) else {}
        options = own.get("enum", [own["const"]] if "const" in own else None)
        if options is None and own.get("type") == "string":
            options = [value]
        if options is None:
            try:
                options = [json.loads(value), value]
            except (ValueError, RecursionError):
                options = [value]
        # Where the schema does not permit it nothing does: one that no weight is given to stands for it.
        properties[name] = {"enum": [o for o in options if field(json.dumps({name: o}), name) == value] or options}
    return {**schema, "properties": properties}


def fields_told(fields: Sequence[str], prose: bool = False) -> dict[str, Callable[..., list[Any]]]:
    """What a guide is told, as its ``prompt=``: the known fields, one a line, then the program's own context.

    :param prose: whether the program writes prose, too.
    """

    def told(*own: str) -> Callable[..., list[Any]]:
        def pieces(**given: Any) -> list[Any]:
            lines = [piece for name in fields for piece in (f"{name}: ", given[name], "\n")]
            return [*lines, *(given[name] for name in own)]

        # Prompts are told by the names of their parameters, which here are the schema's.
        names = [Parameter(name, Parameter.KEYWORD_ONLY) for name in (*own, *fields)]
        pieces.__signature__ = Signature(names)  # type: ignore[attr-defined]
        return pieces

    return {"record": told("prompt", "prose"), "prose": told("prompt")} if prose else {"record": told("prompt")}
