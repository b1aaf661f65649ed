"""Story infilling: a missing sentence between a beginning and an ending."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmppl.models.primitives import Maker
from llmppl.text.declared import declared


@declared
def infilling(lm: Maker, max_tokens: int = 16, stop: str = ".") -> Callable[[Any, Any], Any]:
    """The program p(middle | beginning) p(ending | beginning, middle).

    Beginning and ending are strings, or lists of strings inside a plate. An ending begins with its
    space: ``" He came home."``.

    :param lm: a :class:`llmppl.LM`, or a :class:`llmppl.numpyro.LM`: the program is then one of NumPyro's.
    :param max_tokens: most tokens of the middle.
    :param stop: what the middle ends with.
    """

    def story(beginning: Any, ending: Any) -> Any:
        middle = lm.primitives.sample("middle", lm(beginning, max_tokens=max_tokens, stop=stop))
        lm.primitives.sample("ending", lm(beginning, middle), obs=lm.encode(ending))
        return middle

    return story


def ending_first(beginning: Any, ending: Any) -> list[Any]:
    """A prompt for the middle that tells the ending first; pass as ``prompt={"middle": ending_first}``."""
    return ["A short story that ends like this:", ending, "\n\n", beginning]
