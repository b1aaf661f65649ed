"""Simulating a program: its latents together with its observations."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.network.text_law import TextLaw
from llmppl.network.text_tensors import lengths
from llmppl.programs.structure import Program, Site, is_deterministic, is_latent, structure
from llmppl.text import PAD


def simulate(
    model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One draw from the program with its observed sites drawn too: latents and observations by site.

    Given the simulated observations the latents are an exact draw from the posterior. An observed
    stream has as many tokens as the one that it replaces.

    :raises ValueError: the program has a factor, which cannot be simulated.
    """
    check_simulable(structure(model, args, kwargs))
    with torch.no_grad(), poutine.block(), Simulated() as simulated:
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    latents = {name: site["value"] for name, site in trace.nodes.items() if is_latent(site)}
    return latents, simulated.observations


class Simulated(Messenger):
    """Draws the observed sites too. An observed stream is drawn to its observed length, which leaves
    its law unchanged: the law of the first tokens of a stream is that of a text of so many tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.observations: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if not msg["is_observed"] or site_is_subsample(msg) or isinstance(msg["fn"], pyro.distributions.Delta):
            return
        if is_deterministic(msg):
            return
        if isinstance(msg["fn"], pyro.distributions.Unit):
            raise ValueError(
                f"factor {msg['name']!r}: the sleep phase simulates the program, and a factor cannot be "
                "simulated. Use WakeSleep(insomnia=1.0), or another objective."
            )
        fn, observed = msg["fn"], msg["value"]
        if isinstance(fn, AutoregressiveText) and fn.law.max_tokens is None:
            law = TextLaw(
                fn.law.vocabulary,
                max(int(lengths(observed).max()), 1),
                0,
                fn.law.stop,
                fn.law.allowed,
                fn.law.temperature,
            )
            drawn = AutoregressiveText(fn.lm, fn.context, law, fn.adapter).sample()
            places = torch.arange(drawn.shape[-1], device=drawn.device)
            value = drawn.masked_fill(places >= lengths(observed)[..., None], PAD)
        else:
            value = fn.sample()
        msg["value"] = value
        self.observations[msg["name"]] = value


def check_simulable(sites: poutine.Trace) -> None:
    """Refuse a program with a factor.

    :raises ValueError: naming it.
    """
    for name, site in sites.nodes.items():
        if site["type"] == "sample" and isinstance(site["fn"], pyro.distributions.Unit):
            raise ValueError(
                f"factor {name!r}: simulated observations are asked for, and a factor cannot be simulated. "
                "Express it as an observed site, or do without them (while training, Evaluation(simulations=0) and "
                "Regularisation(simulated=0))."
            )
