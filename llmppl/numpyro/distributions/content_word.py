"""One of the content words of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, random

from llmppl.numpyro.distributions.autoregressive_text import expanded
from llmppl.numpyro.distributions.conditioning import LanguageModel
from llmppl.numpyro.distributions.derived_text import DerivedText
from llmppl.numpyro.distributions.discreteness import refuse_pathwise
from llmppl.numpyro.network.host_call import host_call
from llmppl.numpyro.network.text_arrays import check_batch, check_text, pad_rows
from llmppl.text import PAD
from llmppl.text.row_function import text_column
from llmppl.text.words import LONGEST, SHORTEST, content_words

Word = tuple[int, ...]


class ContentWord(DerivedText):
    r"""A content word of a text, each of its distinct ones with the same probability.

    .. math:: p(k \mid z) = \frac{1[k \in \mathrm{words}(z)]}{|\mathrm{words}(z)|}

    Words are those of :func:`llmppl.text.words.content_words`: whole words, not tokens, in lower case, outside a stop
    list. A value is the word's own token ids, as ``lm.encode("garden")`` gives them, padded to 16; of any other value
    the probability is zero. A text without a content word has the empty value, all padding, with probability one. Made
    by :meth:`llmppl.numpyro.LM.content_word`.

    Words are found in Python, once for each distinct text: compiled code calls out for all rows together.

    :param lm: the language model whose tokens these are.
    :param text: text array of shape ``batch_shape + (T,)``.
    :param shortest: letters of a content word, at least.
    """

    what = "a content word is a word of its own text"
    pytree_aux_fields = ("lm", "shortest")

    def __init__(
        self,
        lm: LanguageModel,
        text: Array,
        shortest: int = SHORTEST,
        batch_shape: tuple[int, ...] | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.shortest = shortest
        super().__init__(lm, text, LONGEST, batch_shape, validate_args)

    def expand(self, batch_shape: Sequence[int]) -> ContentWord:
        """The text is not repeated.

        :raises ValueError: a shape that the batch shape does not broadcast to.
        """
        shape = tuple(batch_shape)
        if shape == self.batch_shape:
            return self
        validate = self.__dict__.get("_validate_args")
        return ContentWord(self.lm, self.text, self.shortest, expanded(self.batch_shape, shape), validate_args=validate)

    def options(self) -> list[list[Word]]:
        """The words of each text of the flattened batch, as token ids; the empty word where there is none. Outside of
        compiled code only."""
        own, index = self._words(np.asarray(self._texts(self.batch_shape)))
        return [own[n] for n in index.reshape(-1)]

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Words of shape ``sample_shape + batch_shape + (16,)``. Each is drawn by a whole number of 32 bits, which
        meets a probability to 2⁻³²."""
        refuse_pathwise(self)
        shape = tuple(sample_shape) + self.batch_shape
        bits = random.bits(key, shape, jnp.uint32)
        return host_call(self._drawn, (*shape, LONGEST), jnp.int32, bits, self._texts(shape))

    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        """Log-probability in nats, of shape ``broadcast(value.shape[:-1], batch_shape)``; −inf where the value is none
        of the text's content words.

        :raises TypeError, ValueError: no well-formed text array; one whose rows do not broadcast.
        """
        value = check_text(value, "value", self.lm.vocabulary)
        check_batch(value, self.batch_shape)
        shape = jnp.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value = jnp.broadcast_to(value, (*shape, value.shape[-1]))
        count = host_call(self._count, shape, jnp.int32, value, self._texts(shape))
        chances = jnp.maximum(count, 1).astype(jnp.promote_types(self.lm.dtype, jnp.float32))
        return jnp.where(count > 0, -jnp.log(chances), -jnp.inf)

    def _texts(self, shape: tuple[int, ...]) -> Array:
        return jnp.broadcast_to(self.text, (*shape, self.text.shape[-1]))

    # --- on the host -------------------------------------------------------------------------------

    def _words(self, text: np.ndarray) -> tuple[list[list[Word]], np.ndarray]:
        """The words of each distinct text, and which of them each row has."""
        spelling = self.lm.spelling
        column = text_column(text, spelling.codec.decode)
        found = [content_words(str(own), self.shortest) for own in column.values]
        return [[tuple(spelling.ids(word)) for word in own] or [()] for own in found], column.index

    def _drawn(self, bits: np.ndarray, text: np.ndarray) -> np.ndarray:
        own, index = self._words(text)
        rows = (own[n] for n in index.reshape(-1))
        # The integer part of bits / 2³² times the number of words.
        chosen = [words[int(at) * len(words) >> 32] for words, at in zip(rows, bits.reshape(-1), strict=True)]
        return pad_rows(chosen, LONGEST).reshape(*bits.shape, LONGEST)

    def _count(self, value: np.ndarray, text: np.ndarray) -> np.ndarray:
        """How many words the text has; 0 where the value is none of them."""
        own, index = self._words(text)
        rows = (tuple(token for token in row if token != PAD) for row in value.reshape(-1, value.shape[-1]).tolist())
        found = [len(own[n]) if word in own[n] else 0 for n, word in zip(index.reshape(-1).tolist(), rows, strict=True)]
        return np.array(found, np.int32).reshape(index.shape)

    def __repr__(self) -> str:
        return f"ContentWord(batch_shape={self.batch_shape})"
