"""A guide that writes a text while a function says where it has come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.distributions.state_twist import Features, Start, StateTwist
from llmppl.distributions.twisted_text import TwistedText
from llmppl.guides.text_guide import Others, Prompt, _Proposer
from llmppl.guides.twisted_guide import TwistedGuide
from llmppl.language_model import LM
from llmppl.programs.structure import Program, Site
from llmppl.text.declared import declared
from llmppl.text.prompts import checked_prompts


class _Steered(_Proposer):
    """Hands what the sites are told to their twists."""

    guide: SteeredGuide

    def _proposal(self, name: str, prior: ConditionedText, msg: Site) -> ConditionedText:
        guide = self.guide
        context = self._context(name, prior, msg) if name in guide.prompt else prior.context
        if name not in guide.twist:
            return prior.with_context(context, prior.adapter)
        if not isinstance(prior, AutoregressiveText):
            raise ValueError(
                f"site {name!r} is a {type(prior).__name__}, which is not written token by token. Leave its features "
                "out."
            )
        pieces = self.telling.pieces(name, guide.told[name], self._latents(), str)
        told = self._expanded(name, prior, guide.lm.context(*pieces)[..., len(guide.lm.codec.start) :])
        twist: Any = guide.twist[name]
        return TwistedText(guide.lm.base, context, prior.law, told, twist, prior.adapter, prior._validate_args)


class SteeredGuide(TwistedGuide):
    r"""The language model's own law, twisted by features of the text so far
    (:class:`~llmppl.distributions.state_twist.StateTwist`).

    For latent texts that do something: moves that lead somewhere, a formula that fits. ``features`` says of a text that
    is half written where it has come to, and what is learned is how much that counts: some hundred numbers. The network
    that proposes is the prior itself, so that a draw costs what the prior's costs. Sites without features are proposed
    by the prior, or as ``prompt`` tells them::

        def toward(told, moves):  # what the site is told, and the text so far
            maze, goal = told.rsplit("\n", 1)
            return [distance(walk(maze, moves), int(goal)) / 4]

        guide = SteeredGuide(
            program, lm, {"plan": toward}, told={"plan": lambda maze, goal: [lm.map("{}\n{:.0f}".format, maze, goal)]}
        )

    (A twist, as of Zhao et al. 2024, whose form is known and whose size is learned.)

    :param features: by site, a deterministic function of two strings, what the site is told and the text so far, that
        returns numbers of about unit size, always as many; asked for every token that may come next, so the site needs
        a ``grammar=`` or a small ``allowed=``.
    :param told: by site, a function that returns the pieces of the first string, with parameters by name as of
        ``prompt``.
    :param hidden: width of each twist's hidden layer.
    :param seed: of its initial weights; drawn from torch's generator by default.
    :param start: by site, what a feature counts before any training, nats: two sequences of a number a feature, of
        texts that go on and of texts that end. Zeros by default: the prior. Where a feature is nats of a likelihood, or
        of the best that may come, −1 makes a proposal that needs little training.
    :raises ValueError: a site with features and nothing told, or told something without features; more than 256 tokens
        that may come next.

    Other parameters as in :class:`TextGuide`.
    """

    proposer = _Steered

    @declared
    def __init__(
        self,
        model: Program,
        lm: LM,
        features: Mapping[str, Features],
        told: Mapping[str, Prompt],
        prompt: Mapping[str, Prompt] | None = None,
        others: Others | None = None,
        hidden: int = 32,
        seed: int | None = None,
        start: Mapping[str, Start] | None = None,
    ) -> None:
        if not features or set(features) != set(told):
            raise ValueError(
                f"features are of the sites {sorted(features)} and told of {sorted(told)}. Give both for each site."
            )

        starts = dict(start or {})
        if unknown := set(starts) - set(features):
            raise ValueError(f"start= names {sorted(unknown)}, but features are of the sites {sorted(features)}.")

        def twists() -> nn.Module:
            return nn.ModuleDict({name: StateTwist(own, hidden, starts.get(name)) for name, own in features.items()})

        super().__init__(model, lm, prompt, others, hidden, seed, twists)
        self.told = checked_prompts(told)

    def settings(self) -> dict[str, object]:
        sizes = {name: (twist.count, twist.hidden) for name, twist in self.twist.items()}
        return {**super().settings(), "features": repr(sorted(sizes.items()))}

    def _told_in_repr(self) -> str:
        return f"features of {sorted(self.twist)}"
