"""A program cut at its latent sites, as sequential Monte Carlo walks through it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from jax import Array, random
from numpyro import handlers

from llmppl.numpyro.distributions.autoregressive_text import AutoregressiveText
from llmppl.numpyro.inference.gathering import check_unmasked, check_unscaled
from llmppl.numpyro.programs.particles import Layout, Particle, layout, score_particle
from llmppl.numpyro.programs.tracing import DummyTexts, Program, Site, Trace, Values, is_latent, signature, structure


class Stages:
    """The latent sites of a program in the order in which its guide proposes them.

    Made from the arguments that a run is to have, or others of the same shapes.

    :param guide: a guide, or ``None`` to propose from the program itself.
    :raises ValueError: the guide misses a latent site, or has one that the model has not; a scaled site.
    """

    def __init__(self, model: Program, guide: Program | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.guide = model, latents_of(model) if guide is None else guide
        self.guided = guide is not None
        self.where: Layout = layout(model, self.guide, args, kwargs)
        self.sites, self.proposed = structure(model, args, kwargs), structure(self.guide, args, kwargs)
        for trace in (self.sites, self.proposed):
            check_unscaled(trace)
            check_unmasked(trace, "smc")
        self.texts = {name for name, site in self.proposed.items() if is_latent(site) and _by_tokens(site)}
        self.segments: list[list[str]] = []
        """Names of sites that are proposed together: a text token by token alone, others side by side."""
        alone = True
        for name, site in self.proposed.items():
            if is_latent(site):
                if alone or _by_tokens(site):
                    self.segments.append([name])
                else:
                    self.segments[-1].append(name)
                alone = _by_tokens(site)


class Walk:
    """One particle's runs of the program, with what a compiled run is given."""

    def __init__(self, stages: Stages, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stages, self.params, self.args, self.kwargs = stages, params, args, kwargs

    def run(self, program: Program, values: Values, drawn: Collection[str] = (), key: Array | None = None) -> Trace:
        """A run with some latents given; of the others texts not in ``drawn`` are dummies."""
        with handlers.block(), handlers.trace() as trace, _Dummies(drawn):
            seeded = handlers.seed(program, random.key(0) if key is None else key)
            handlers.substitute(seeded, data={**self.params, **values})(*self.args, **self.kwargs)
        return dict(trace)

    def law(self, program: Program, values: Values, name: str) -> AutoregressiveText:
        """The distribution of a text, given what stands before it."""
        return self.run(program, values)[name]["fn"]

    def score(self, values: Values) -> Particle:
        """Log-density of what stands in the program before its first latent that is not given, observed sites
        included."""
        known: dict[str, Site] = {}
        for name, site in self.run(self.stages.model, values).items():
            if is_latent(site) and name not in values:
                break
            known[name] = site
        return score_particle(self.stages.where, known, {})

    def propose(self, values: Values, names: list[str], key: Array) -> tuple[Values, Array]:
        """Latents that are not written token by token, whole, and their log-density under the guide."""
        trace = self.run(self.stages.guide, values, names, key)
        own = {name: trace[name] for name in names}
        drawn = {name: jnp.asarray(site["value"]) for name, site in own.items()}
        return drawn, score_particle(self.stages.where, {}, own).log_q


class _Dummies(DummyTexts):
    """Gives latent texts some value, but for those that are to be drawn."""

    def __init__(self, drawn: Collection[str]) -> None:
        super().__init__()
        self.drawn = drawn

    def process_message(self, msg: Site) -> None:
        if msg.get("name") not in self.drawn:
            super().process_message(msg)


def latents_of(model: Program) -> Program:
    """The program without its observed sites and factors: a proposal from the prior."""

    def prior(*args: Any, **kwargs: Any) -> Any:
        with handlers.block(hide_fn=lambda site: site["type"] == "sample" and not is_latent(site)):
            return model(*args, **kwargs)

    prior.__signature__ = signature(model)  # type: ignore[attr-defined]
    return prior


def _by_tokens(site: Site) -> bool:
    return isinstance(site["fn"], AutoregressiveText)
