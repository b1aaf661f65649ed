"""What a ready program asks of its language model, so that it stands once for Pyro and NumPyro."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

from llmppl.text.echoes import LONGEST_MISTAKE, MISTAKE


class Maker(Protocol):
    """A language model of either framework: :class:`llmppl.LM` or :class:`llmppl.numpyro.LM`."""

    primitives: Any
    """``pyro`` or ``numpyro``: the ``sample``, ``factor`` and ``deterministic`` of its programs."""

    spelling: Any
    """The tokens; ``spelling.end`` is what a text under a grammar ends with."""

    def __call__(self, *pieces: Any, **law: Any) -> Any: ...
    def content_word(self, text: Any, shortest: int = 3) -> Any: ...
    def echo(self, text: Any, mistake: float = MISTAKE, max_tokens: int = LONGEST_MISTAKE) -> Any: ...
    def encode(self, text: Any, special: bool = False) -> Any: ...
    def map(self, function: Any, *values: Any, max_tokens: int | None = None, returns: type | None = None) -> Any: ...
    def chat(self, messages: Any, answers: bool = True) -> list[Any]: ...
    def choice(self, *pieces: Any, options: Any, probs: Any = None) -> Any: ...


def kept(lm: Maker, name: str, value: Any) -> Any:
    """A text that the program has computed, as a deterministic site."""
    return _kept(lm, name, value, 1)


def kept_number(lm: Maker, name: str, value: Any) -> Any:
    """Numbers that the program has computed, one a row, as a deterministic site."""
    return _kept(lm, name, value, 0)


def _kept(lm: Maker, name: str, value: Any, event_dim: int) -> Any:
    events = {"event_dim": event_dim} if lm.primitives.__name__ == "pyro" else {}
    return lm.primitives.deterministic(name, value, **events)


def stacked(lm: Maker, columns: Sequence[Any]) -> Any:
    """Numbers of the framework, each ``batch_shape``, as one array ``batch_shape + (len(columns),)``."""
    arrays = {"pyro": "torch", "numpyro": "jax.numpy"}[lm.primitives.__name__]
    return importlib.import_module(arrays).stack(list(columns), -1)
