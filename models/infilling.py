"""Story infilling: a missing sentence between a beginning and an ending."""

from __future__ import annotations

from collections.abc import Callable

import pyro
from torch import Tensor

from llmppl.language_model import LM
from llmppl.text import Piece


def infilling(lm: LM, max_tokens: int = 16, stop: str = ".") -> Callable[[str, str], Tensor]:
    """The program p(middle | beginning) p(ending | beginning, middle).

    Beginning and ending are strings, or lists of strings inside a plate. An ending begins with its
    space: ``" He came home."``.

    :param max_tokens: most tokens of the middle.
    :param stop: what the middle ends with.
    """

    def story(beginning: str, ending: str) -> Tensor:
        middle = pyro.sample("middle", lm(beginning, max_tokens=max_tokens, stop=stop))
        pyro.sample("ending", lm(beginning, middle), obs=lm.encode(ending))
        return middle

    return story


def ending_first(beginning: Piece, ending: Piece) -> list[Piece]:
    """A prompt for the middle that tells the ending first; pass as ``prompt={"middle": ending_first}``."""
    return ["A short story that ends like this:", ending, "\n\n", beginning]
