"""A sentence with a keyword in it: write the next sentence of a text so that it has a given word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmppl.models.primitives import Maker
from llmppl.text.declared import declared
from llmppl.text.words import LONGEST, SHORTEST, as_keyword


@declared
def keyword(
    lm: Maker, max_tokens: int = 20, stop: Any = ".", temperature: float = 0.7, shortest: int = SHORTEST
) -> Callable[[Any, Any], Any]:
    r"""The program p(sentence | beginning) p(keyword | sentence): the keyword is one of the sentence's content words,
    each with the same probability (:class:`~llmppl.distributions.ContentWord`).

    So a sentence without the word is impossible, and one that has it among few others is more probable than one that
    has it among many. Every sentence that the language model writes is an example for each of its own words, which is
    what a guide learns from: :class:`~llmppl.guides.WordGuide`.

    Beginning and keyword are strings, or lists of strings inside a plate; or text arrays. A keyword is one word; upper
    case and space around it do not count.

    :param lm: a :class:`llmppl.LM`, or a :class:`llmppl.numpyro.LM`: the program is then one of NumPyro's.
    :param max_tokens: most tokens of the sentence.
    :param stop: what the sentence ends with.
    :param temperature: of the sentence's tokens.
    :param shortest: letters of a content word, at least.
    """

    def sentence_with(beginning: Any, keyword: Any) -> Any:
        _check_beginning(beginning)
        sentence = lm.primitives.sample(
            "sentence", lm(beginning, max_tokens=max_tokens, stop=stop, temperature=temperature)
        )
        lm.primitives.sample("keyword", lm.content_word(sentence, shortest), obs=_observed(lm, keyword, shortest))
        return sentence

    return sentence_with


def _check_beginning(beginning: Any) -> None:
    texts = [beginning] if isinstance(beginning, str) else beginning
    if isinstance(texts, (list, tuple)):
        for n, text in enumerate(texts):
            if isinstance(text, str) and not text.strip():
                where = "beginning" if isinstance(beginning, str) else f"beginning[{n}]"
                raise ValueError(f"{where}={text!r} has no text. Give at least a word to go on from.")


def _observed(lm: Maker, keyword: Any, shortest: int) -> Any:
    """The token ids of a keyword as content words are written."""

    def clean(word: Any) -> str:
        return as_keyword(word, shortest)

    if isinstance(keyword, str):
        return lm.encode(clean(keyword))
    if isinstance(keyword, (list, tuple)):
        return lm.encode([clean(word) for word in keyword])
    # Token ids already, as strings that are arguments of a compiled program are.
    return lm.map(clean, keyword, max_tokens=LONGEST)
