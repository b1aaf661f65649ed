"""What a distribution over text asks of the language model that it was made by."""

from __future__ import annotations

from typing import Any, Protocol

from jax import Array

from llmppl.numpyro.network.architecture import Architecture
from llmppl.numpyro.network.decoder import Weights
from llmppl.text.spelling import Spelling


class LanguageModel(Protocol):
    """:class:`llmppl.numpyro.LM` says what each of these is."""

    vocabulary: int
    architecture: Architecture
    spelling: Spelling

    @property
    def weights(self) -> Weights: ...
    @property
    def dtype(self) -> Any: ...
    def check_length(self, context: int, tokens: int) -> None: ...
    def encode(self, text: Any, width: int | None = None) -> Array: ...
    def decode(self, value: Any) -> Any: ...
