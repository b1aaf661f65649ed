"""A guide that writes a text with a given word in it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.distributions.parameter_store import register_module
from llmppl.distributions.twisted_text import TwistedText, WordTwist
from llmppl.guides.saved_guide import SavedGuide
from llmppl.guides.text_guide import Prompt, _Proposer, _rows_of, program_name
from llmppl.language_model import LM
from llmppl.programs.structure import Program, Site

_numbers = itertools.count()


class WordGuide(SavedGuide):
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

    def __init__(
        self,
        model: Program,
        lm: LM,
        word: str = "keyword",
        prompt: Mapping[str, Prompt] | None = None,
        others: Program | None = None,
        hidden: int = 64,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, lm, prompt, others)
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}.")
        self.word = word
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            dtype = torch.promote_types(lm.dtype, torch.float32)
            self.twist = WordTwist(hidden).to(device=lm.device, dtype=dtype)
        self._number = next(_numbers)

    def forward(self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Any]:
        self.register()
        given = self._draw_others(args, kwargs)
        return self._propose(_ToldTheWord, given, args, kwargs, observations or {})

    def became_a_copy(self, names: Mapping[str, str]) -> None:
        self._number = next(_numbers)

    def register(self) -> None:
        register_module(f"WordGuide_{self._number}", self.twist)

    def reset_parameters(self) -> None:
        """Start anew, with other random numbers from torch's generator. Parameters of ``others`` stay."""
        self.twist.reset_parameters()

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "hidden": self.twist.hidden}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.twist.named_parameters())

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.twist.parameters())
        prompts = f", prompt for {sorted(self.prompt)}" if self.prompt else ""
        return (
            f"WordGuide({program_name(self.model)}, {self.lm.name.rsplit('/', 1)[-1]}, word={self.word!r}, "
            f"{count:,} parameters{prompts})"
        )


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
