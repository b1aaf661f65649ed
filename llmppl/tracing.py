"""Running programs: their text sites, their particles, their log-densities per observation ``x``."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from llmppl.distributions.autoregressive import AutoregressiveText
from llmppl.distributions.choice import Choice
from llmppl.distributions.conditioned import ConditionedText
from llmppl.distributions.process import ProcessText
from llmppl.stopping import TextLaw
from llmppl.text import PAD, lengths

Program = Callable[..., Any]
Site = dict[str, Any]

PARTICLES = "_particles"
DATA = "_data"


def is_latent(site: Site) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


def is_text(site: Site) -> bool:
    return isinstance(site["fn"], ConditionedText)


# --- structure: a run that costs no forward pass -------------------------------------------------


def any_text(fn: ConditionedText) -> Tensor:
    """Some value of the support, of shape ``batch_shape + event_shape``, without asking the network."""
    if isinstance(fn, Choice):
        value = fn.options[0]
    else:
        assert isinstance(fn, ProcessText)
        value = _any_tokens(fn.law)
    return value.expand(fn.batch_shape + value.shape)


def _any_tokens(law: TextLaw) -> Tensor:
    if law.max_tokens is None:
        raise ValueError(
            "a latent text needs max_tokens: the unbounded stream cannot be sampled. "
            "Pass max_tokens to lm(...) at this site, and stop if the text may end earlier."
        )
    tokens = torch.arange(law.vocabulary, device=law.stop.device)
    if law.allowed is not None:
        tokens = tokens[law.allowed]
    stops, free = tokens[law.is_stop(tokens)], tokens[~law.is_stop(tokens)]
    value = torch.full((law.max_tokens,), PAD, dtype=torch.long, device=law.stop.device)
    count = max(law.min_tokens, 1) if len(stops) else law.max_tokens
    value[:count] = free[0] if len(free) else stops[0]
    if len(stops):
        value[count - 1] = stops[0]
    return value


class DummyTexts(Messenger):
    """Gives latent text sites some value, so that a run costs no forward pass.

    :param drawn: names of sites that are drawn all the same.
    """

    def __init__(self, drawn: Collection[str] = ()) -> None:
        super().__init__()
        self.drawn = drawn

    def _pyro_sample(self, msg: Site) -> None:
        if is_latent(msg) and is_text(msg) and not msg["done"] and msg["name"] not in self.drawn:
            try:
                msg["value"] = any_text(msg["fn"])
            except ValueError as error:
                raise ValueError(f"site {msg['name']!r}: {error}") from None
            msg["done"] = True


def structure(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> poutine.Trace:
    """A trace of the model whose latent texts hold arbitrary values: sites, plates, observations."""
    with poutine.block(), DummyTexts():
        return poutine.trace(model).get_trace(*args, **kwargs)


def is_dry() -> bool:
    """Whether the run in progress is one of :func:`structure`, which asks no network."""
    return any(isinstance(handler, DummyTexts) for handler in _PYRO_STACK)


def plate_nesting(trace: poutine.Trace) -> int:
    """How many batch dimensions the plates of a trace take."""
    dims = [
        frame.dim
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.vectorized and frame.dim is not None
    ]
    return -min(dims, default=0)


# --- particles -----------------------------------------------------------------------------------


def in_particles(program: Program, num_particles: int, nesting: int) -> Program:
    """The program inside an outermost plate of particles, left of all its own plates."""

    def vectorized(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(PARTICLES, num_particles, dim=-nesting - 1):
            return program(*args, **kwargs)

    return vectorized


def in_data_plate(program: Program) -> Program:
    """The program inside a plate over its arguments: lists, one entry an observation."""

    def rows(*args: Any, **kwargs: Any) -> Any:
        if not args or not hasattr(args[0], "__len__") or isinstance(args[0], str):
            raise TypeError(
                f"vectorize_data=True needs a list of observations for each argument, "
                f"got {args[0] if args else None!r}. Pass lists of one length, or leave vectorize_data out."
            )
        with pyro.plate(DATA, len(args[0]), dim=-1):
            return program(*args, **kwargs)

    if hasattr(program, "log_partition"):
        rows.log_partition = program.log_partition  # type: ignore[attr-defined]
    rows.exactness = getattr(program, "exactness", "marginal")  # type: ignore[attr-defined]
    rows.scores_given = getattr(program, "scores_given", False)  # type: ignore[attr-defined]
    # Prompts find arguments by the program's own names.
    rows.__signature__ = signature(program)  # type: ignore[attr-defined]
    return rows


def signature(program: Program) -> inspect.Signature:
    """The parameters of a program, be it a function or a module."""
    return inspect.signature(program.forward if isinstance(program, torch.nn.Module) else program)


class Given(Messenger):
    """Puts values in the place of latent sites, broadcast to each site's shape; scores stay to be made."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.values and is_latent(msg):
            value, fn = self.values[msg["name"]], msg["fn"]
            msg["value"] = value.expand(torch.broadcast_shapes(value.shape, fn.batch_shape + fn.event_shape))
            msg["done"] = True


class Simulated(Messenger):
    """Draws the observed sites too. An observed stream is drawn to its observed length, which leaves
    its law unchanged: the law of the first tokens of a stream is that of a text of so many tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.observations: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if not msg["is_observed"] or site_is_subsample(msg) or isinstance(msg["fn"], pyro.distributions.Delta):
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


def simulate(
    model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One draw from the program with its observed sites drawn too: latents and observations by site.

    Given the simulated observations the latents are an exact draw from the posterior. An observed
    stream has as many tokens as the one that it replaces.

    :raises ValueError: the program has a factor, which cannot be simulated.
    """
    for name, site in structure(model, args, kwargs).nodes.items():
        if site["type"] == "sample" and isinstance(site["fn"], pyro.distributions.Unit):
            raise ValueError(
                f"factor {name!r}: simulated observations are asked for, and a factor cannot be simulated. "
                "Express it as an observed site, or do without them (Evaluation(simulations=0) while training)."
            )
    with torch.no_grad(), poutine.block(), Simulated() as simulated:
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    latents = {name: site["value"] for name, site in trace.nodes.items() if is_latent(site)}
    return latents, simulated.observations


class Observed(Messenger):
    """Puts values in the place of observed ones. A site's score broadcasts them against its batch."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.values and msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]


def observing(model: Program, guide: Program, observations: dict[str, Tensor]) -> tuple[Program, Program]:
    """The program with other values at its observed sites, and the guide told so.

    :param observations: by site, as :func:`simulate` returns them.
    :raises TypeError: a guide that takes no ``observations=``.
    """
    parameters = signature(guide).parameters
    if "observations" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(
            "the guide must be told what was simulated, and this one takes no observations= argument "
            "(a dict of values by observed site). Add it."
        )

    def observed(*args: Any, **kwargs: Any) -> Any:
        with Observed(observations):
            return model(*args, **kwargs)

    def told(*args: Any, **kwargs: Any) -> Any:
        return guide(*args, observations=observations, **kwargs)

    def log_partition(*args: Any, **kwargs: Any) -> Tensor:
        return guide.log_partition(*args, observations=observations, **kwargs)  # type: ignore[attr-defined]

    if hasattr(guide, "log_partition"):
        told.log_partition = log_partition  # type: ignore[attr-defined]
    told.exactness = getattr(guide, "exactness", "marginal")  # type: ignore[attr-defined]
    told.scores_given = getattr(guide, "scores_given", False)  # type: ignore[attr-defined]
    told.__signature__ = signature(guide)  # type: ignore[attr-defined]
    observed.__signature__ = signature(model)  # type: ignore[attr-defined]
    return observed, told


def text_sites(trace: poutine.Trace) -> OrderedDict[str, Site]:
    """The latent text sites of a trace, in order."""
    return OrderedDict((n, s) for n, s in trace.nodes.items() if is_latent(s) and is_text(s))
