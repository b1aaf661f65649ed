"""A program with other values at its sites than those that it has itself, and a guide that is told so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from llmppl.network.text_tensors import widen
from llmppl.programs.structure import Program, Site, is_latent, is_text, signature


def observing(model: Program, guide: Program, observations: dict[str, Tensor]) -> tuple[Program, Program]:
    """The program with other values at its observed sites, and the guide told so.

    What is returned can be given yet other observations in the same way, which then count.

    :param observations: by site, as :func:`simulate` returns them.
    :raises TypeError: a guide that takes no ``observations=``.
    """
    check_takes_observations(guide)

    def observed(*args: Any, **kwargs: Any) -> Any:
        with Observed(observations):
            return model(*args, **kwargs)

    def told(*args: Any, **kwargs: Any) -> Any:
        return guide(*args, **{"observations": observations, **kwargs})

    def log_partition(*args: Any, **kwargs: Any) -> Tensor:
        return guide.log_partition(*args, **{"observations": observations, **kwargs})  # type: ignore[attr-defined]

    if hasattr(guide, "log_partition"):
        told.log_partition = log_partition  # type: ignore[attr-defined]
    told.exactness = getattr(guide, "exactness", "marginal")  # type: ignore[attr-defined]
    told.scores_given = getattr(guide, "scores_given", False)  # type: ignore[attr-defined]
    told.__signature__ = signature(guide)  # type: ignore[attr-defined]
    observed.__signature__ = signature(model)  # type: ignore[attr-defined]
    observed.observes_instead_of = model  # type: ignore[attr-defined]
    return observed, told


def has_other_observations(model: Program) -> bool:
    """Whether :func:`observing` made a program, so that its arguments do not say what it observes."""
    return hasattr(model, "observes_instead_of")


def original(model: Program) -> Program:
    """The program that :func:`observing` was given."""
    while has_other_observations(model):
        model = model.observes_instead_of  # type: ignore[attr-defined]
    return model


def check_takes_observations(guide: Program) -> None:
    """Refuse a guide that cannot be told other observations than the program's.

    :raises TypeError: it takes no ``observations=``.
    """
    parameters = signature(guide).parameters
    if "observations" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(
            "the guide must be told what was simulated or noised, and this one takes no observations= argument "
            "(a dict of values by observed site). Add it."
        )


class Observed(Messenger):
    """Puts values in the place of observed ones. A site's score broadcasts them against its batch."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.values and msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]


class Given(Messenger):
    """Puts values in the place of latent sites, broadcast to each site's shape; scores stay to be made."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.values and is_latent(msg):
            value, fn = self.values[msg["name"]], msg["fn"]
            if is_text(msg) and value.shape[-1] < fn.event_shape[0]:
                value = widen(value, fn.event_shape[0])
            msg["value"] = value.expand(torch.broadcast_shapes(value.shape, fn.batch_shape + fn.event_shape))
            msg["done"] = True


class Unconstrained(Messenger):
    """Gives Pyro's AutoGuides the values of latent sites in the place where they draw them: on the real line, under the
    site's name with ``_unconstrained`` behind it. The site itself is then a point mass at the value.

    :param values: of latent sites.
    :param sites: of the program.
    :raises ValueError: an AutoGuide that draws several sites as one.
    """

    def __init__(self, values: Mapping[str, Tensor], sites: Mapping[str, Site]) -> None:
        super().__init__()
        self.values, self.sites, self.given, self.joint = values, sites, set[str](), ""

    def __enter__(self) -> Any:
        self.given.clear()
        self.joint = ""
        return super().__enter__()

    def _pyro_sample(self, msg: Site) -> None:
        name, fn = msg["name"], msg["fn"]
        if name in self.values and isinstance(fn, pyro.distributions.Delta):
            if name in self.given:
                msg["value"], msg["done"] = fn.v, True  # the value itself, but for rounding
            elif self.joint:
                raise ValueError(
                    f"the AutoGuide of site {name!r} draws all its sites as one, {self.joint!r}, which cannot be given "
                    "values of the program's. Use AutoNormal, or a guide function."
                )
            return
        own = name.removesuffix("_unconstrained")
        if not msg["infer"].get("is_auxiliary") or own not in self.values:
            self.joint = name if msg["infer"].get("is_auxiliary") else self.joint
            return
        with torch.no_grad():
            value = biject_to(self.sites[own]["fn"].support).inv(self.values[own])
        shape = torch.broadcast_shapes(value.shape, fn.batch_shape + fn.event_shape)
        msg["value"], msg["done"] = value.expand(shape), True
        self.given.add(own)
