"""What strings a language model takes, as token ids: observed texts, pieces, stops, vocabularies, options.

The checks and their sentences are the same whatever framework holds the ids.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from llmppl.text.stop_automaton import StopAutomaton, build
from llmppl.text.tokenization import Codec

ALLOWED = "allowed= must be a list of token ids or a boolean mask over the vocabulary."


class Spelling:
    """The tokens of one language model.

    :param codec: strings to ids and back.
    :param vocabulary: ids from 0 to this less one are tokens that the model knows.
    """

    def __init__(self, codec: Codec, vocabulary: int) -> None:
        self.codec, self.vocabulary = codec, vocabulary
        self._automata: dict[tuple[tuple[str, ...], tuple[int, ...]], StopAutomaton] = {}

    @property
    def end(self) -> str:
        """How the end token is written, with which texts under a grammar end; empty where there is none."""
        return self.codec.end

    def ids(self, text: str, first: bool = False, special: bool = False) -> list[int]:
        """Of a piece; ``first``: it begins a text.

        :param special: read the names of control tokens as these tokens.
        :raises ValueError: a token that the model has no embedding for; half a character; the name of a control token
            that the vocabulary cannot spell otherwise.
        """
        alone = next((n for n, sign in enumerate(text) if "\ud800" <= sign <= "\udfff"), None)
        if alone is not None:
            raise ValueError(
                f"the text {text!a} has a lone surrogate, {text[alone]!a}, at place {alone}: half of a "
                "character, as from a file that was read with errors='surrogateescape' or cut in the middle. Give "
                "whole characters."
            )
        ids = self.codec.encode(text, first=first, special=special)
        control = None if special else next((n for n in ids if n in self.codec.control), None)
        if control is not None:
            raise ValueError(
                f"{describe(text)} holds the name of the control token {self.codec.control[control]!r}, which this "
                "vocabulary cannot spell as text. Take it out, or mean the token: lm.encode(text, special=True)."
            )
        wrong = next((n for n in ids if n >= self.vocabulary), None)
        if wrong is not None:
            raise ValueError(
                f"{describe(text)} holds the token id {wrong}, for which the model has no embedding: it knows "
                f"{self.vocabulary} tokens. Load the tokenizer that belongs to the model."
            )
        return ids

    def rows(self, text: Any, special: bool = False) -> list[list[int]]:
        """Of an observed text, or of several.

        :param special: read the names of control tokens as these tokens.
        :raises TypeError: neither a string nor a list of strings.
        :raises ValueError: no text, or one without tokens.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"text must be a string or a list of strings, got {describe(text)}.")
        if not texts:
            raise ValueError("text is an empty list. Pass at least one string.")
        rows = [self.ids(t, special=special) for t in texts]
        self._warn_of_unknown(texts, rows)
        for n, row in enumerate(rows):
            if not row:
                where = "text" if isinstance(text, str) else f"text[{n}]"
                raise ValueError(
                    f"{where}={texts[n]!r} has no tokens, and an observed text needs at least one. "
                    "Pass a non-empty string, or leave the site out."
                )
        return rows

    def _warn_of_unknown(self, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
        """Say which characters of observed texts the vocabulary lacks: another text is observed in their place."""
        if self.codec.unknown is None:
            return
        name = self.codec.decode([self.codec.unknown])
        for text, row in zip(texts, rows, strict=True):
            if self.codec.unknown in row and not (name and name in text):
                lost = sorted({sign for sign in text if self.codec.unknown in self.codec.encode(sign)})
                warnings.warn(
                    f"the observed text {describe(text)} has {', '.join(map(repr, lost)) or 'signs'}, which this "
                    f"tokenizer does not know: {name!r} is observed in their place.",
                    stacklevel=4,
                )

    def piece(self, piece: Any, number: int, tensor: str, literal: str, name: str = "") -> list[list[int]]:
        """Of a piece that is no tensor: a string, or several.

        :param number: of the piece, from 0; the first is read as beginnings of texts are.
        :param tensor: what the framework calls a text that is ids already.
        :param literal: how it makes one.
        :param name: of the piece in messages, by default its number.
        :raises TypeError: neither a string nor a non-empty list of strings.
        """
        texts = [piece] if isinstance(piece, str) else piece
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) for t in texts):
            raise TypeError(
                f"{name or f'piece {number}'} must be a string, a non-empty list of strings or a text {tensor}, got "
                f"{piece!r}. Token ids go in as {literal}."
            )
        return [self.ids(text, first=number == 0) for text in texts]

    def stops(self, stop: Any, also: Sequence[int] = ()) -> tuple[list[int], StopAutomaton | None]:
        """What ends a text: strings, written as one token or as several, or token ids.

        :param also: further ids, such as a grammar's end.
        :returns: the tokens that end a text whatever stands before them; and the automaton of stop strings that tokens
            write together, ``None`` where there is no such. Made once for each ``stop`` and kept.
        :raises TypeError: neither strings nor ids.
        :raises ValueError: a string that no tokens write; ids outside the vocabulary; none at all.
        """
        if stop is None:
            return sorted({*also}), None
        if not isinstance(stop, (int, str)) and (not hasattr(stop, "__iter__") or getattr(stop, "shape", None) == ()):
            raise TypeError(f"stop={stop!r} must be a string, a list of strings, or token ids.")
        parts = [stop] if isinstance(stop, (int, str)) else list(stop)
        if not parts:
            raise ValueError("stop= is empty. Pass stop token ids or a string, or leave it out.")
        strings = tuple(part for part in parts if isinstance(part, str))
        try:
            ids = [int(part) for part in parts if not isinstance(part, str)]
        except (TypeError, ValueError):
            raise TypeError(f"stop={stop!r} must be a string, a list of strings, or token ids.") from None
        ids = sorted({*self.known(ids, "stop"), *also})
        if not strings:
            return ids, None
        key = strings, tuple(ids)
        if key not in self._automata:
            found = build(strings, self.codec.token_bytes[: self.vocabulary])
            self._automata[key] = found.with_tokens(ids) if ids else found
        automaton = self._automata[key]
        return automaton.everywhere, automaton if automaton.size > 1 else None

    def known(self, ids: Iterable[int], name: str) -> list[int]:
        """Ids of the vocabulary.

        :raises ValueError: one is none, naming it.
        """
        ids = list(ids)
        wrong = next((n for n in ids if not 0 <= n < self.vocabulary), None)
        if wrong is not None:
            raise ValueError(
                f"{name}= holds the token id {wrong}, outside the vocabulary of {self.vocabulary} "
                f"tokens. Ids go from 0 to {self.vocabulary - 1}."
            )
        return ids

    def check_allowed(self, shape: tuple[int, ...], boolean: bool, integer: bool) -> None:
        """Refuse what is neither a mask over the vocabulary nor a list of ids.

        :raises TypeError, ValueError: with the shape.
        """
        if boolean:
            if shape != (self.vocabulary,):
                raise ValueError(
                    f"allowed= is a mask of shape {shape}; it needs one entry for each of "
                    f"the {self.vocabulary} tokens. Token ids work too."
                )
        elif len(shape) != 1 or not integer:
            raise TypeError(ALLOWED)

    def options(self, options: Any) -> list[list[int]]:
        """Of the options of a choice.

        :raises TypeError, ValueError: no list of strings; fewer than two, equal ones, one the prefix of another.
        """
        if not isinstance(options, (list, tuple)):
            raise TypeError(f"options must be a list of strings, got {describe(options)}.")
        options = list(options)
        if len(options) < 2:
            raise ValueError(f"options={options!r}: a choice needs at least two options.")
        rows = self.rows(options)
        for i, first in enumerate(rows):
            for j, second in enumerate(rows):
                if i != j and second[: len(first)] == first:
                    raise ValueError(
                        f"option {options[i]!r} is a prefix of option {options[j]!r}. An option's weight "
                        "is the probability that the text begins with it, so the first would also count "
                        "the second. End every option alike, e.g. with a full stop."
                    )
        return rows


def log_probabilities(probs: Sequence[float], options: Sequence[str]) -> list[float]:
    """Of the options of a choice, normalised, from probabilities or weights.

    :raises ValueError: not one for each option, or not positive.
    """
    weights = [float(weight) for weight in probs]
    if len(weights) != len(options) or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"probs={probs!r} must be a positive number for each of the {len(options)} options.")
    total = math.fsum(weights)
    return [math.log(weight / total) for weight in weights]


def check_tilt(shape: tuple[int, ...], finite: bool, options: Sequence[str], rows: tuple[int, ...]) -> None:
    """Refuse what cannot be added to the log-probabilities of options.

    :param finite: whether it is floating point numbers, none infinite.
    :param rows: batch shape of the context.
    :raises ValueError: naming the shape that it should have.
    """
    fits = bool(shape) and shape[-1] == len(options)
    fits = fits and all(a == b or 1 in (a, b) for a, b in zip(shape[-2::-1], rows[::-1], strict=False))
    if not fits:
        asked = f"{(*rows, len(options))}, or {(len(options),)}"
        raise ValueError(f"tilt= has shape {shape}. It has a number for each option in its last dimension: {asked}.")
    if not finite:
        raise ValueError("tilt= holds what is no finite floating point number. Check the network that it comes from.")


def describe(piece: object) -> str:
    """A piece as an error message names it."""
    if isinstance(piece, str):
        return repr(piece if len(piece) <= 40 else piece[:37] + "...")
    if isinstance(piece, (list, tuple)):
        return f"a list of {len(piece)} strings"
    if hasattr(piece, "shape"):
        return f"a text {'tensor' if hasattr(piece, 'requires_grad') else 'array'} of shape {tuple(piece.shape)}"
    return f"a {type(piece).__name__}"


def unbroadcastable(pieces: Sequence[object], shapes: Sequence[tuple[int, ...]], m: int, n: int) -> ValueError:
    """Pieces ``m`` and ``n`` have batch shapes that do not broadcast."""
    return ValueError(
        f"pieces {m} and {n} do not broadcast: piece {m} is {describe(pieces[m])} "
        f"with batch shape {tuple(shapes[m])}, piece {n} is "
        f"{describe(pieces[n])} with batch shape {tuple(shapes[n])}. Give both the "
        "same number of rows, or one of them a single text."
    )


def empty_context(row: tuple[int, ...]) -> ValueError:
    """A context without tokens, where no token stands for the beginning of a text."""
    where = f" in row {row}" if row else ""
    return ValueError(
        f"the context is empty{where}, and this model has no token for the beginning of a text "
        "(its tokenizer has no bos_token). Give a non-empty first piece."
    )


def too_long(context: int, tokens: int, longest: int) -> ValueError:
    """A prompt and a text that the model cannot read whole."""
    return ValueError(
        f"the prompt of {context} tokens and a text of up to {tokens} tokens do not fit the model's "
        f"context of {longest} tokens. Shorten the prompt or lower max_tokens."
    )
