"""Grammars as part of the law of a text: regular expressions, JSON schemas, context-free grammars.

llguidance says which tokens may follow a prefix. A masked law is still a law of its own (it sums to
one over the texts it can produce), but it is not the model conditioned on the grammar: for that use
it as a proposal, and let the importance weights tell the difference. One module serves both backends:
masks are numpy arrays.
"""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any, Protocol

import numpy as np

from llmppl.text.declared import declared
from llmppl.text.tokenization import Codec

CACHED_STATES = 4096

LONGEST = 120
"""Characters of a grammar that are shown."""


class Spelling(Protocol):
    """What a grammar asks of a language model: its tokens."""

    tokenizer: Any
    codec: Codec
    vocabulary: int


class Grammar:
    """What the continuations of a context may be; pass as ``lm(..., grammar=...)``.

    The text ends with the tokenizer's end token, which is permitted exactly where the grammar is
    complete. A text that reaches ``max_tokens`` first is cut, complete or not: the law still sums to
    one. Make one with :meth:`regex`, :meth:`json_schema` or :meth:`lark`.

    :param source: a grammar in llguidance's own form.
    :param description: what the repr shows.
    :raises ValueError: when it is used, if llguidance cannot compile it.
    """

    @declared
    def __init__(self, source: str, description: str) -> None:
        self.source, self.description = source, description
        self._bound: dict[int, BoundGrammar] = {}

    @classmethod
    @declared
    def regex(cls, pattern: str) -> Grammar:
        """Texts that match a regular expression as a whole (Rust syntax, no look-around)."""
        from llguidance import LLMatcher

        return cls(LLMatcher.grammar_from_regex(pattern), f"regex {pattern!r}")

    @classmethod
    def json_schema(cls, schema: dict[str, Any] | str) -> Grammar:
        """JSON texts that satisfy a schema.

        :raises TypeError: a schema that is no JSON.
        """
        from llguidance import LLMatcher

        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
        except (TypeError, ValueError) as error:
            raise TypeError(f"schema={schema!r} is no JSON: {error}. Give a dict, or a string of JSON.") from None
        try:
            source = LLMatcher.grammar_from_json_schema(text)
        except ValueError as error:
            raise ValueError(f"schema={schema!a} is no JSON schema: {error}. Write a dict of plain values.") from None
        return cls(source, f"JSON schema {text[:40]}")

    @classmethod
    @declared
    def lark(cls, rules: str) -> Grammar:
        """Texts of a context-free grammar in Lark syntax."""
        from llguidance import LLMatcher

        return cls(LLMatcher.grammar_from_lark(rules), f"Lark grammar of {len(rules.splitlines())} lines")

    def bind(self, lm: Spelling) -> BoundGrammar:
        """The grammar over the tokens of a model.

        :raises ValueError: a tokenizer without an end token; a grammar that cannot be compiled.
        """
        if id(lm) not in self._bound:
            self._bound[id(lm)] = BoundGrammar(self, lm)
        return self._bound[id(lm)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": {}}

    def __repr__(self) -> str:
        said = self.description
        return f"Grammar({said if len(said) <= LONGEST else said[:LONGEST] + f'… ({len(said)} characters)'})"


class BoundGrammar:
    """A grammar over the tokens of one model, with a bounded cache of parser states."""

    def __init__(self, grammar: Grammar, lm: Spelling) -> None:
        from llguidance import LLMatcher

        self.grammar, self.lm, self.vocabulary = grammar, lm, lm.vocabulary
        end = lm.tokenizer.eos_token_id
        if end is None or end >= lm.vocabulary:
            raise ValueError(
                "grammar= ends a text with the end token, and this tokenizer has none. Set tokenizer.eos_token, or "
                "eos_token in the folder's tokenizer_config.json to one of the vocabulary's tokens."
            )
        self.end = int(end)
        tokenizer = lm.codec.grammar_tokenizer
        error = LLMatcher.validate_grammar(grammar.source, tokenizer)
        if error and not error.startswith("WARNING"):
            raise ValueError(f"grammar={grammar!r} cannot be compiled: {error.strip()}")
        self._root = LLMatcher(tokenizer, grammar.source, log_level=0)
        self._states: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._warned: set[int] = set()
        self._lock = Lock()

    def permitted(self, prefixes: Sequence[Sequence[int]]) -> np.ndarray:
        """Which tokens may follow each prefix, ``(P, V)``; all of them after an impossible prefix,
        whose probability is zero already, and after the end."""
        with self._lock:  # JAX may ask from several threads
            return np.stack([self._mask(tuple(prefix)) for prefix in prefixes])

    def accepts(self, text: str) -> bool:
        """Whether a string, without the end token, is a whole text of the grammar."""
        tokens = self.lm.codec.encode(text)
        state = self._root.deep_copy()
        return state.try_consume_tokens(tokens) == len(tokens) and state.is_accepting()

    def warn_of_cut(self, texts: Sequence[Sequence[int]], max_tokens: int) -> None:
        """Say so, once, where ``max_tokens`` has ended texts in the middle of the grammar.

        :param texts: that have no end.
        """
        if max_tokens in self._warned:
            return
        with self._lock:
            states = [self._state(tuple(text)) for text in texts]
        cut = [n for n, state in enumerate(states) if state is not None and not state.is_accepting()]
        if cut:
            self._warned.add(max_tokens)
            warnings.warn(
                f"max_tokens={max_tokens} cuts texts off before {self.grammar!r} is complete, such as "
                f"{self.lm.codec.decode(list(texts[cut[0]]))!r}. Raise max_tokens, or bound the grammar's parts.",
                stacklevel=2,
            )

    def _state(self, prefix: tuple[int, ...]) -> Any:
        if prefix in self._states:
            self._states.move_to_end(prefix)
            return self._states[prefix]
        if not prefix:
            state = self._root.deep_copy()
        else:
            before = self._state(prefix[:-1])
            state = None if before is None else before.deep_copy()
            if state is not None and not state.try_consume_tokens([prefix[-1]]):
                state = None
        self._states[prefix] = state
        while len(self._states) > CACHED_STATES:
            self._states.popitem(last=False)
        return state

    def _mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        state = None if self.end in prefix else self._state(prefix)
        if state is None:
            return np.ones(self.vocabulary, dtype=bool)
        bits = np.frombuffer(state.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[: self.vocabulary].astype(bool)
        if not state.is_accepting():
            mask[self.end] = False  # llguidance ends a text that it cannot continue
        if not mask.any():
            text = self.lm.codec.decode(list(prefix))
            raise ValueError(
                f"grammar={self.grammar!r} permits no token after {text!r}: no token of this vocabulary continues it. "
                "Choose a grammar that the tokenizer can spell."
            )
        return mask

    def __reduce__(self) -> Any:
        return Grammar.bind, (self.grammar, self.lm)

    def __eq__(self, other: object) -> bool:
        """The same grammar over the tokens of the same model, so that it need not be compiled anew."""
        return isinstance(other, BoundGrammar) and (self.grammar.source, self.lm) == (other.grammar.source, other.lm)

    def __hash__(self) -> int:
        return hash((self.grammar.source, id(self.lm)))

    def __repr__(self) -> str:
        return repr(self.grammar)
