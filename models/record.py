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
"""JSON as Python's ``json.dumps(..., ensure_ascii=False)`` writes it."""

NONE = "null"
"""What a field is called that a text has not."""


class _Literal(str):
    """A number as a record writes it: 1.50 and 15e-1 are other texts than 1.5, and a known value is a text."""


def field(record: str, name: str) -> str:
    """The value of a field as text: ``field('{"age": 31}\\n', "age")`` is ``"31"``. Numbers are as the record writes
    them, ``"1.50"`` for one; strings are without quotation marks; of what is no record, or has no such field, it is
    ``"null"``."""
    try:
        values = json.loads(record, parse_float=_Literal, parse_int=_Literal)
        value = values.get(name) if isinstance(values, dict) else None
        return str(value) if isinstance(value, str) and value and _is_text(value) else _written(value)
    except (ValueError, RecursionError):
        return NONE


def _is_text(string: str) -> bool:
    return not any("\ud800" <= sign <= "\udfff" for sign in string)  # half a surrogate pair is no text


def _written(value: Any) -> str:
    """``json.dumps(value, ensure_ascii=False)``, with each number as it was read."""
    if isinstance(value, _Literal):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_written(key)}: {_written(own)}" for key, own in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    text = json.dumps(value, ensure_ascii=False)
    return text if _is_text(text) else json.dumps(value)


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
    prompt, and a value for each of ``fields``, in their order, as :func:`field` writes it: strings, or lists of strings
    inside a plate. Of a number ``"1.5"`` is observed as it is written, and a record with 1.50 has another value.

    :param lm: a :class:`llmppl.LM`.
    :param schema: a JSON schema. Records are written as ``json.dumps(..., ensure_ascii=False)`` writes them, properties
        in the schema's order.
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
    :raises ValueError: a schema without such a property; a value that is a number, or has one, which a schema of one
        value cannot write so: ``"100.0"`` or ``"1e2"``, for it writes 100.
    """
    properties = dict(schema.get("properties", {}))
    for name, value in values.items():
        if name not in properties:
            raise ValueError(f"values: {name!r} is none of the schema's properties {list(properties)}.")
        own = properties[name] if isinstance(properties[name], Mapping) else {}
        options = own.get("enum", [own["const"]] if "const" in own else None)
        if options is None:
            options = _readings(name, value, own.get("type", []))
        # Where the schema does not permit it nothing does: one that no weight is given to stands for it.
        properties[name] = {"enum": [option for option in options if _has(option, value)] or options}
    return {**schema, "properties": properties}


_NUMBER = {"number", "integer"}
_KINDS: dict[type, set[str]] = {
    dict: {"object"},
    list: {"array"},
    bool: {"boolean"},
    type(None): {"null"},
    int: _NUMBER,
    float: _NUMBER,
}


def _readings(name: str, value: str, types: str | Sequence[str]) -> list[Any]:
    """What a value may be where a property has these types, or any: a string, or what JSON reads it as."""
    kinds, read = {types} if isinstance(types, str) else set(types), _read(value)
    if isinstance(read, str):
        return [value] if read == value else [read, value]
    if kinds and not kinds & _KINDS[type(read)]:
        return [value] if "string" in kinds else [read]
    if field(f'{{"value": {value}}}', "value") == value and not _writes(read, value):
        raise ValueError(
            f"values: {name!r}: {value!r} is not written so by a schema of that value alone: numbers are plain "
            "decimals there, of some 15 digits, and without zeros at their end. Give another spelling, e.g. '100' for "
            "'100.0' or '1e2', or leave it out of given(...): propose by the schema as it is, masked."
        )
    return [read] if kinds and "string" not in kinds else [read, value]


def _read(value: str) -> Any:
    """What JSON reads a value as; of what is no JSON itself."""
    try:
        # Python's integers have no -0, which is a text of its own.
        return json.loads(
            value, parse_int=lambda digits: -0.0 if digits == "-0" else int(digits), parse_constant=_no_constant
        )
    except (ValueError, RecursionError):
        return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON.")


def _has(option: Any, value: str) -> bool:
    """Whether a record with this option has the value."""
    if isinstance(option, str):
        return (option if option else '""') == value
    return bool(option == _read(value)) and _writes(option, value)


def _writes(option: Any, text: str) -> bool:
    """Whether the grammar of one option writes this text, which is llguidance's to say: it writes 100.0 as 100."""
    from llguidance import LLMatcher, LLTokenizer

    tokenizer = LLTokenizer("byte")
    state = LLMatcher(tokenizer, schema_grammar({"const": option}).source, log_level=0)
    tokens = tokenizer.tokenize_str(text + END)
    return bool(state.try_consume_tokens(tokens) == len(tokens) and state.is_accepting())


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
