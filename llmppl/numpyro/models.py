"""Ready generative programs for NumPyro, as :mod:`llmppl.models` has them for Pyro."""

from __future__ import annotations

from collections.abc import Callable

import numpyro
from jax import Array

from llmppl.numpyro.language_model import LM
from llmppl.numpyro.text import Piece


def infilling(lm: LM, max_tokens: int = 16, stop: str = ".") -> Callable[[Piece, Piece], Array]:
    """The program p(middle | beginning) p(ending | beginning, middle).

    Beginning and ending are strings, or lists of strings inside a plate. An ending begins with its
    space: ``" He came home."``.

    :param max_tokens: most tokens of the middle.
    :param stop: what the middle ends with.
    """

    def story(beginning: Piece, ending: Piece) -> Array:
        middle = numpyro.sample("middle", lm(beginning, max_tokens=max_tokens, stop=stop))
        numpyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))
        return middle

    return story


def ending_first(beginning: Piece, ending: Piece) -> list[Piece]:
    """A prompt for the middle that tells the ending first; pass as ``prompt={"middle": ending_first}``."""
    return ["A short story that ends like this:", ending, "\n\n", beginning]


def continuation(lm: LM, temperature: float = 0.8, max_tokens: int = 24, stop: str = ".") -> Callable[[Piece], Array]:
    r"""The program with posterior :math:`p(\text{sentence}|\text{prompt})^{1/T}`, normalised.

    Tempering the sentence is not tempering its tokens: below 1 it favours sentences that are probable
    as a whole, where local tempering walks into probable first words (Hu et al. 2024, sec. 4.1). The
    prompt is a string, or a list of strings inside a plate.

    :param temperature: ``T``.
    :param max_tokens: most tokens of the sentence.
    :param stop: what the sentence ends with.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")

    def next_sentence(prompt: Piece) -> Array:
        prior = lm(prompt, max_tokens=max_tokens, stop=stop)
        sentence = numpyro.sample("sentence", prior)
        numpyro.factor("tempering", (1 / temperature - 1) * prior.log_prob(sentence))
        return sentence

    return next_sentence
