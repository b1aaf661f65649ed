"""One of the content words of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmppl.distributions.conditioned_text import LanguageModel
from llmppl.distributions.derived_text import DerivedText
from llmppl.network.text_tensors import check_text, pad_rows, unpad_rows
from llmppl.text.words import LONGEST, SHORTEST, content_words


class ContentWord(DerivedText):
    r"""A content word of a text, each of its distinct ones with the same probability.

    .. math:: p(k \mid z) = \frac{1[k \in \mathrm{words}(z)]}{|\mathrm{words}(z)|}

    Words are those of :func:`llmppl.text.words.content_words`: whole words, not tokens, in lower case, outside a stop
    list. A value is the word's own token ids, as ``lm.encode("garden")`` gives them; of any other value the
    probability is zero. A text without a content word has the empty value, all padding, with probability one. Made by
    :meth:`llmppl.LM.content_word`.

    :param lm: the language model whose tokens these are.
    :param text: text tensor of shape ``batch_shape + (T,)``.
    :param shortest: letters of a content word, at least.
    """

    what = "a content word is a word of its own text"

    def __init__(
        self, lm: LanguageModel, text: Tensor, shortest: int = SHORTEST, validate_args: bool | None = None
    ) -> None:
        self.shortest = shortest
        self._found: list[list[tuple[int, ...]]] | None = None
        super().__init__(lm, text, LONGEST, validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> ContentWord:
        shape = torch.Size(batch_shape)
        expanded = ContentWord(
            self.lm, self.context.expand(shape + self.context.shape[-1:]), self.shortest, self._validate_args
        )
        expanded.site = self.site
        return expanded

    def options(self) -> list[list[tuple[int, ...]]]:
        """The words of each text of the flattened batch, as token ids; the empty word where there is none."""
        if self._found is None:
            known: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
            self._found = []
            for row in unpad_rows(self.context.reshape(-1, self.context.shape[-1])):
                text = tuple(row)
                if text not in known:
                    own = content_words(self.lm.decode(torch.tensor(row)), self.shortest) if row else []
                    known[text] = [tuple(self.lm.encode(word).tolist()) for word in own] or [()]
                self._found.append(known[text])
        return self._found

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Words of shape ``sample_shape + batch_shape + (16,)``."""
        rows = self.options()
        count = torch.Size(sample_shape).numel()
        chosen = torch.rand(count, len(rows)).tolist()
        drawn = [own[int(at * len(own))] for draw in chosen for own, at in zip(rows, draw, strict=True)]
        return self._stacked(drawn).reshape(torch.Size(sample_shape) + self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability in nats, of shape ``broadcast(value.shape[:-1], batch_shape)``; −inf where the value is none
        of the text's content words.

        :raises TypeError, ValueError: no well-formed text tensor.
        """
        value = check_text(value, "value", self.lm.vocabulary)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        number = torch.arange(len(self.options())).reshape(self.batch_shape).expand(shape).reshape(-1).tolist()
        flat = unpad_rows(value.expand(shape + value.shape[-1:]).reshape(-1, value.shape[-1]))
        found = [
            1.0 / len(self.options()[n]) if tuple(word) in self.options()[n] else 0.0
            for n, word in zip(number, flat, strict=True)
        ]
        return torch.tensor(found, dtype=torch.float64, device=value.device).log().reshape(shape).to(self._dtype)

    def _stacked(self, words: Sequence[Sequence[int]]) -> Tensor:
        return pad_rows(words, LONGEST, self.context.device)

    def __repr__(self) -> str:
        return f"ContentWord(batch_shape={tuple(self.batch_shape)})"
