"""Tempered continuation: the next sentence, at a temperature of the whole sentence."""

from __future__ import annotations

from collections.abc import Callable

import pyro
from torch import Tensor

from llmppl.language_model import LM


def continuation(lm: LM, temperature: float = 0.8, max_tokens: int = 24, stop: str = ".") -> Callable[[str], Tensor]:
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

    def next_sentence(prompt: str) -> Tensor:
        prior = lm(prompt, max_tokens=max_tokens, stop=stop)
        sentence = pyro.sample("sentence", prior)
        pyro.factor("tempering", (1 / temperature - 1) * prior.log_prob(sentence))
        return sentence

    return next_sentence
