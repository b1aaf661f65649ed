"""Strings to token ids and back, verbatim.

Tokenizers of the sentencepiece family put a space before every string and take one away when they
decode. Texts here are pieces of a longer text, so both are switched off, on a copy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Codec:
    """Encodes and decodes pieces of text with a ``transformers`` tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TypeError(
                f"tokenizer is a {type(tokenizer).__name__} without a fast backend. "
                "Load it with AutoTokenizer.from_pretrained(..., use_fast=True)."
            )
        self._first = Tokenizer.from_str(backend.to_str())
        self._verbatim = _verbatim(backend)
        for copy in (self._first, self._verbatim):
            copy.no_padding()
            copy.no_truncation()
        # In a text the signs of a control token are signs: a row of data shall not be able to end a turn.
        self._first.encode_special_tokens = self._verbatim.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.vocabulary = len(tokenizer)
        self.bos: int | None = tokenizer.bos_token_id
        self.unknown: int | None = getattr(tokenizer, "unk_token_id", None)
        """Stands for what the vocabulary has no token for."""
        plain = self._first.encode("a", add_special_tokens=False).ids
        full = self._first.encode("a", add_special_tokens=True).ids
        found = next((n for n in range(len(full)) if full[n : n + len(plain)] == plain), 0) if plain else 0
        self.start: list[int] = full[:found]
        """What the tokenizer itself puts before every text."""
        added = backend.get_added_tokens_decoder()
        self.control: dict[int, str] = {
            n: token.content
            for n, token in added.items()
            if token.special and n != self.unknown and len(token.content) > 1
        }
        """Tokens that no text has: they end turns, begin documents and the like. (A single sign is one of the text's,
        whatever a tokenizer uses it for.)"""

    def encode(self, text: str, first: bool = False, special: bool = False) -> list[int]:
        """Token ids of a piece; ``first``: it begins a text, as the tokenizer treats beginnings.

        :param special: read the names of control tokens as these tokens. Otherwise they are text.
        """
        tokenizer = self._reads_control if special else self._first if first else self._verbatim
        return tokenizer.encode(text, add_special_tokens=False).ids if text else []

    @cached_property
    def _reads_control(self) -> Tokenizer:
        """The verbatim tokenizer, which reads the names of control tokens as these tokens."""
        return Tokenizer.from_str(self._verbatim.to_str())

    def __reduce__(self) -> tuple[Any, ...]:
        # How control tokens are read is no part of a tokenizer's state: a copy is made anew.
        return type(self), (self._tokenizer,)

    @property
    def chat_template(self) -> Callable[[list[dict[str, Any]], bool], str] | None:
        """Messages, and whether an answer begins behind them, to text; ``None`` of a tokenizer without template."""
        if not getattr(self._tokenizer, "chat_template", None):
            return None

        def render(messages: list[dict[str, Any]], answers: bool) -> str:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answers)
            assert isinstance(text, str)
            return text

        return render

    def decode(self, ids: list[int]) -> str:
        return self._verbatim.decode(ids, skip_special_tokens=False)

    @cached_property
    def end(self) -> str:
        """How the end token is written; empty where there is none."""
        token = self._tokenizer.eos_token_id
        return "" if token is None else self.decode([int(token)])

    @cached_property
    def token_texts(self) -> list[str]:
        """The text of each token on its own."""
        return self._verbatim.decode_batch([[n] for n in range(self.vocabulary)], skip_special_tokens=False)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What each token writes. A token of a byte-level vocabulary may hold a part of a character only."""
        state = json.loads(self._verbatim.to_str())
        kinds = {step["type"] for step in _steps(state["decoder"], "decoders")}
        added = self._verbatim.get_added_tokens_decoder()
        found = []
        for n, text in enumerate(self.token_texts):
            name = self._verbatim.id_to_token(n)
            if name is None or n in added:
                found.append(text.encode())
            elif "ByteLevel" in kinds:
                found.append(bytes(_BYTES[sign] for sign in name if sign in _BYTES))
            elif "ByteFallback" in kinds and _BYTE_TOKEN.fullmatch(name):
                found.append(bytes([int(name[3:5], 16)]))
            else:
                found.append(text.encode())
        return found

    @cached_property
    def grammar_tokenizer(self) -> Any:
        """The vocabulary as llguidance reads it; building it takes about a second."""
        from llguidance import LLTokenizer

        backend = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        return LLTokenizer(backend.to_str(), eos_token=self._tokenizer.eos_token_id)


def _signs_of_bytes() -> dict[str, int]:
    """The sign that byte-level vocabularies write for each byte: its own where it is a visible character of Latin-1,
    the characters from 256 on for the others, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _signs_of_bytes()
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, a pre-tokenizer or a decoder."""
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def _verbatim(backend: Tokenizer) -> Tokenizer:
    state = json.loads(backend.to_str())

    normalizers = [s for s in _steps(state["normalizer"], "normalizers") if s["type"] != "Prepend"]
    state["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    for part in (*_steps(state["pre_tokenizer"], "pretokenizers"), *_steps(state["decoder"], "decoders")):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        if part["type"] == "ByteLevel" and "add_prefix_space" in part:
            part["add_prefix_space"] = False
    decoders = [s for s in _steps(state["decoder"], "decoders") if s["type"] != "Strip"]
    if state["decoder"] is not None and state["decoder"]["type"] == "Sequence":
        state["decoder"]["decoders"] = decoders
    return Tokenizer.from_str(json.dumps(state))
