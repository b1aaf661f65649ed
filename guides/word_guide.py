"""A guide that writes a text with a given word in it."""

from __future__ import annotations

from collections.abc import Mapping

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.distributions.twisted_text import TwistedText, WordTwist
from llmppl.guides.text_guide import Others, Prompt, _Proposer, _rows_of
from llmppl.guides.twisted_guide import TwistedGuide
from llmppl.language_model import LM
from llmppl.programs.structure import Program, Site
from llmppl.text.declared import declared


class _ToldTheWord(_Proposer):
    """Hands the observed word to the proposals."""

    guide: WordGuide

    def _proposal(self, name: str, prior: ConditionedText, msg: Site) -> ConditionedText:
        if self.guide.word not in self.observed:
            raise ValueError(
                f"word={self.guide.word!r} is no observed text site of the program; those are {sorted(self.observed)}. "
                "Name the site of the word."
            )
        if not isinstance(prior, AutoregressiveText):
            raise ValueError(
                f"site {name!r} is a {type(prior).__name__}, which is not written token by token. Pass a guide for it "
                "as others=."
            )
        words = _rows_of(*self.observed[self.guide.word], msg)
        context = self._context(name, prior, msg) if name in self.guide.prompt else prior.context
        return TwistedText(
            self.guide.lm.base, context, prior.law, words, self.guide.twist, prior.adapter, prior._validate_args
        )


class WordGuide(TwistedGuide):
    r"""The language model's own law, twisted towards an observed word (:class:`~llmppl.distributions.TwistedText`).

    For programs whose latent text shall have a word, such as :func:`llmppl.models.keyword`. The network that proposes
    is the prior itself, told its own context: what is learned, from a few hundred sentences, is how much to favour the
    tokens that lead to the word, given how probable the model finds them and how much room is left. By default the text
    is told its prior's own context; ``prompt={"sentence": lambda beginning, keyword: [...]}`` replaces it.

    :param word: the observed site of the word.
    :param hidden: width of the twist's hidden layers.
    :param seed: of its initial weights; drawn from torch's generator by default.
    :raises ValueError: a program without the site, or whose latent text is not one of ``lm(...)``.

    Other parameters as in :class:`TextGuide`.
    """

    proposer = _ToldTheWord

    @declared
    def __init__(
        self,
        model: Program,
        lm: LM,
        word: str = "keyword",
        prompt: Mapping[str, Prompt] | None = None,
        others: Others | None = None,
        hidden: int = 64,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, lm, prompt, others, hidden, seed, lambda: WordTwist(hidden))
        self.word = word

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "hidden": self.twist.hidden}

    def _told_in_repr(self) -> str:
        return f"word={self.word!r}"
