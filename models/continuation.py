"""Tempered continuation: the next sentence, at a temperature of the whole sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmppl.models.primitives import Maker
from llmppl.text.declared import declared


@declared
def continuation(lm: Maker, temperature: float = 0.8, max_tokens: int = 24, stop: str = ".") -> Callable[[Any], Any]:
    r"""The program with posterior :math:`p(\text{sentence}|\text{prompt})^{1/T}`, normalised.

    Tempering the sentence is not tempering its tokens: below 1 it favours sentences that are probable
    as a whole, where local tempering walks into probable first words (Hu et al. 2024, sec. 4.1). The
    prompt is a string, or a list of strings inside a plate.

    :param lm: a :class:`llmppl.LM`, or a :class:`llmppl.numpyro.LM`: the program is then one of NumPyro's.
    :param temperature: ``T``.
    :param max_tokens: most tokens of the sentence.
    :param stop: what the sentence ends with.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")

    def next_sentence(prompt: Any) -> Any:
        prior = lm(prompt, max_tokens=max_tokens, stop=stop)
        sentence = lm.primitives.sample("sentence", prior)
        lm.primitives.factor("tempering", (1 / temperature - 1) * prior.log_prob(sentence))
        return sentence

    return next_sentence
