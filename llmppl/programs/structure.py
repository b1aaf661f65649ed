"""What a program consists of, by a run that costs no forward pass: its text sites, plates and observations."""

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

from llmppl.distributions.choice import Choice
from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.distributions.process_text import ProcessText
from llmppl.network.text_law import TextLaw
from llmppl.network.text_tensors import pad_rows
from llmppl.text.arguments import check_arguments
from llmppl.text.text_support import shortest_row

Program = Callable[..., Any]
Site = dict[str, Any]


def is_latent(site: Site) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


def is_deterministic(site: Site) -> bool:
    """Whether a site is what ``pyro.deterministic`` makes: computed from others, though Pyro calls it observed."""
    return site["type"] == "sample" and bool(site["infer"].get("_deterministic"))


def is_text(site: Site) -> bool:
    return isinstance(site["fn"], ConditionedText)


def is_observation(site: Site) -> bool:
    """Whether the site observes data: no factor, and no value that the program has computed."""
    return (
        site["type"] == "sample"
        and site["is_observed"]
        and not site_is_subsample(site)
        and not isinstance(site["fn"], pyro.distributions.Unit)
        and not is_deterministic(site)
    )


def structure(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> poutine.Trace:
    """A trace of the model whose latent texts hold arbitrary values: sites, plates, observations.

    :raises TypeError: arguments that the model does not take.
    """
    check_arguments(model, args, kwargs)
    with poutine.block(), SitesNoted(), DummyTexts():
        return poutine.trace(model).get_trace(*args, **kwargs)


def is_dry() -> bool:
    """Whether the run in progress is one of :func:`structure`, which asks no network."""
    return any(isinstance(handler, DummyTexts) for handler in _PYRO_STACK)


def text_sites(trace: poutine.Trace) -> OrderedDict[str, Site]:
    """The latent text sites of a trace, in order."""
    return OrderedDict((n, s) for n, s in trace.nodes.items() if is_latent(s) and is_text(s))


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


def learns(trace: poutine.Trace) -> bool:
    """Whether the program of a trace has parameters that are being learned: those of ``lm.adapt``, or Pyro's."""
    return any(site["value"].unconstrained().requires_grad for site in trace.nodes.values() if site["type"] == "param")


def signature(program: Program) -> inspect.Signature:
    """The parameters of a program, be it a function or a module."""
    return inspect.signature(program.forward if isinstance(program, torch.nn.Module) else program)


def any_text(fn: ConditionedText) -> Tensor:
    """Some value of the support, of shape ``batch_shape + event_shape``, without asking the network."""
    if isinstance(fn, Choice):
        value = fn.options[0]
    elif isinstance(fn, ProcessText):
        value = _any_tokens(fn.law)
    else:
        return fn.sample()  # type: ignore[attr-defined]
    return value.expand(fn.batch_shape + value.shape)


def _any_tokens(law: TextLaw) -> Tensor:
    if law.max_tokens is None:
        raise ValueError(
            "a latent text needs max_tokens: the unbounded stream cannot be sampled. "
            "Pass max_tokens to lm(...) at this site, and stop if the text may end earlier."
        )
    row = shortest_row(*law.alphabet(), law.min_tokens, law.max_tokens)
    return pad_rows([row], law.max_tokens, law.stop.device)[0]


class SitesNoted(Messenger):
    """Has an error of a program say behind which of its sites it was raised."""

    def __init__(self) -> None:
        super().__init__()
        self.last: str | None = None

    def _pyro_post_sample(self, msg: Site) -> None:
        if not site_is_subsample(msg) and not msg["name"].startswith("_"):
            self.last = msg["name"]

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, Exception) and not hasattr(error, "__notes__"):
            where = "before its first site" if self.last is None else f"behind site {self.last!r}"
            error.add_note(f"Raised by the program, or at one of its sites, {where}.")
        super().__exit__(kind, error, traceback)


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
