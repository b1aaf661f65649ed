"""Words of a text, as a reader counts them: content words, and what can be asked for as a keyword."""

from __future__ import annotations

import re
from typing import Any

LETTERS = "A-Za-z'"
SHORTEST, LONGEST = 3, 16
"""Letters of a content word, at least and at most."""

# Function words, auxiliary verbs, and verbs and adverbs so general that they say nothing of what a sentence is about.
STOP_WORDS = frozenset(
    """
    a about above across after again against ago ah all almost along already also although always am among an
    and another any anybody anyone anything are around as ask asked at away back be became because become been
    before began begin behind being below beside between beyond both but by call called came can cannot can't
    come comes could couldn't did didn't do does doesn't doing done don't down during each either else enough
    even ever every everybody everyone everything far few finally first for from further gave get gets getting
    give given go goes going gone good got had hadn't has hasn't have haven't having he her here hers herself
    he'd he'll he's hi him himself his how however i if i'd i'll i'm in indeed inside instead into is isn't it
    its it's itself i've just keep kept kind knew know known last later least less let let's like little long
    look looked lot made make makes making many may maybe me mean might mine more most much must my myself near
    need never next no nobody none nor not nothing now of off often oh ok okay old on once one only onto or
    other others our ours ourselves out outside over own part people perhaps please put quite rather really
    right said same saw say says second see seem seemed seems seen several shall she she'd she'll she's should
    shouldn't since so some somebody somehow someone something sometimes soon still such sure take taken tell
    than that that's the their theirs them themselves then there there's these they they'd they'll they're
    they've thing things think this those though thought three through thus till time to today together told too
    took toward towards tried try turn turned two under until up upon us use used very want wanted was wasn't
    way we we'd well we'll went were we're weren't we've what what's when where whether which while who whole
    whom whose who's why will with within without won't would wouldn't yes yet you you'd you'll your you're
    yours yourself yourselves you've
    """.split()  # noqa: SIM905
)
"""Words that are no content words. Of English; contractions count as words."""

_COMPLETE = re.compile(rf"[{LETTERS}]+(?=[^{LETTERS}])")
_KEYWORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


def words(text: str) -> list[str]:
    """The words of a text in their order, in lower case.

    A word is a longest run of the letters a to z and straight apostrophes. What stands at the very end, with nothing
    behind it, may be the beginning of a longer word in a text that was cut, and does not count.
    """
    return [word.lower() for word in _COMPLETE.findall(text)]


def content_words(text: str, shortest: int = SHORTEST) -> list[str]:
    """The distinct content words of a text: those with ``shortest`` to 16 letters outside :data:`STOP_WORDS`, in the
    order in which they first occur."""
    return [
        word
        for word in dict.fromkeys(words(text))
        if shortest <= len(word) <= LONGEST and word not in STOP_WORDS and _KEYWORD.fullmatch(word)
    ]


def as_keyword(word: Any, shortest: int = SHORTEST) -> str:
    """A keyword as :func:`content_words` writes it: without the space around it, in lower case.

    :raises TypeError, ValueError: no string, empty, not one word, or no content word; says which.
    """
    if not isinstance(word, str):
        raise TypeError(f"keyword must be a string, got {type(word).__name__}. Give one word, e.g. 'garden'.")
    clean = word.strip().lower()
    if not clean:
        raise ValueError("keyword is empty. Give one word, e.g. 'garden'.")
    if len(clean.split()) > 1:
        raise ValueError(f"keyword={word!r} is {len(clean.split())} words. Give one, e.g. {clean.split()[0]!r}.")
    if not _KEYWORD.fullmatch(clean):
        raise ValueError(
            f"keyword={word!r} has characters that no word of a sentence has here: words are letters a to z, with "
            "apostrophes between them. Give one such word, e.g. 'garden'."
        )
    if clean in STOP_WORDS:
        raise ValueError(
            f"keyword={word!r} is a stop word (llmppl.text.words.STOP_WORDS), which no sentence has as its keyword. "
            "Give a content word, e.g. 'garden'."
        )
    if not shortest <= len(clean) <= LONGEST:
        raise ValueError(f"keyword={word!r} has {len(clean)} letters; content words have {shortest} to {LONGEST}.")
    return clean
