"""A guide that writes a text while a function says where it has come to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.distributions.parameter_store import register_module
from llmppl.distributions.state_twist import Features, StateTwist
from llmppl.distributions.twisted_text import TwistedText
from llmppl.guides.saved_guide import SavedGuide
from llmppl.guides.text_guide import Prompt, _expanded, _Proposer, program_name
from llmppl.language_model import LM
from llmppl.programs.structure import Program, Site
from llmppl.text.prompts import checked_prompts

_numbers = itertools.count()


class SteeredGuide(SavedGuide):
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
    :raises ValueError: a site with features and nothing told, or told something without features; more than 256 tokens
        that may come next.

    Other parameters as in :class:`TextGuide`.
    """

    def __init__(
        self,
        model: Program,
        lm: LM,
        features: Mapping[str, Features],
        told: Mapping[str, Prompt],
        prompt: Mapping[str, Prompt] | None = None,
        others: Program | None = None,
        hidden: int = 32,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, lm, prompt, others)
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}.")
        if not features or set(features) != set(told):
            raise ValueError(
                f"features are of the sites {sorted(features)} and told of {sorted(told)}. Give both for each site."
            )
        self.told = checked_prompts(told)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            dtype = torch.promote_types(lm.dtype, torch.float32)
            twists = {name: StateTwist(own, hidden) for name, own in features.items()}
            self.twists = nn.ModuleDict(twists).to(device=lm.device, dtype=dtype)
        self._number = next(_numbers)

    def forward(self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Any]:
        self.register()
        given = self._draw_others(args, kwargs)
        return self._propose(_Steered, given, args, kwargs, observations or {})

    def became_a_copy(self, names: Mapping[str, str]) -> None:
        self._number = next(_numbers)

    def register(self) -> None:
        register_module(f"SteeredGuide_{self._number}", self.twists)

    def reset_parameters(self) -> None:
        """Start anew, with other random numbers from torch's generator. Parameters of ``others`` stay."""
        for twist in self.twists.values():
            assert isinstance(twist, StateTwist)
            twist.reset_parameters()

    def settings(self) -> dict[str, object]:
        sizes = {name: (twist.count, twist.hidden) for name, twist in self.twists.items()}
        return {**super().settings(), "features": repr(sorted(sizes.items()))}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.twists.named_parameters())

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.twists.parameters())
        return (
            f"SteeredGuide({program_name(self.model)}, {self.lm.name.rsplit('/', 1)[-1]}, "
            f"features of {sorted(self.twists)}, {count:,} parameters)"
        )


class _Steered(_Proposer):
    """Hands what the sites are told to their twists."""

    guide: SteeredGuide

    def _proposal(self, name: str, prior: ConditionedText, msg: Site) -> ConditionedText:
        guide = self.guide
        context = self._context(name, prior, msg) if name in guide.prompt else prior.context
        if name not in guide.twists:
            return prior.with_context(context, prior.adapter)
        if not isinstance(prior, AutoregressiveText):
            raise ValueError(
                f"site {name!r} is a {type(prior).__name__}, which is not written token by token. Leave its features "
                "out."
            )
        latents = {**self.computed, **self.given, **self.proposed}
        pieces = self.telling.pieces(name, guide.told[name], latents, str)
        told = _expanded(name, prior, guide.lm.context(*pieces)[..., len(guide.lm.codec.start) :])
        twist: Any = guide.twists[name]
        return TwistedText(guide.lm.base, context, prior.law, told, twist, prior.adapter, prior._validate_args)
