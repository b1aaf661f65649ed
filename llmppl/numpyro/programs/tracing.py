"""Running programs: their text sites, their plates, simulated and given values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, random
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.primitives import _PYRO_STACK, Messenger

from llmppl.numpyro.distributions.autoregressive_text import AutoregressiveText
from llmppl.numpyro.distributions.choice import Choice
from llmppl.numpyro.distributions.derived_text import DerivedText
from llmppl.numpyro.network.text_arrays import lengths
from llmppl.numpyro.network.text_law import TextLaw
from llmppl.text import PAD
from llmppl.text.arguments import check_arguments

Program = Callable[..., Any]
Site = dict[str, Any]
Trace = Mapping[str, Site]
Values = dict[str, Array]

DATA = "_data"


def is_latent(site: Site) -> bool:
    return bool(site["type"] == "sample" and not site["is_observed"])


def is_deterministic(site: Site) -> bool:
    return bool(site["type"] == "deterministic")


def own_law(fn: dist.Distribution) -> dist.Distribution:
    """The law itself of one that is masked (``handlers.mask``)."""
    while isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def is_text(site: Site) -> bool:
    return isinstance(site["fn"], (AutoregressiveText, Choice, DerivedText))


def is_observation(site: Site) -> bool:
    """Whether the site observes data, and is no factor."""
    return bool(site["type"] == "sample" and site["is_observed"] and not isinstance(site["fn"], dist.Unit))


# --- structure: a run that costs no forward pass ---------------------------------------------------


def any_text(fn: AutoregressiveText | Choice | DerivedText) -> Array:
    """Some value of a text's shape, without asking the network."""
    if isinstance(fn, Choice):
        value = jnp.asarray(fn.options[0])
    elif isinstance(fn, DerivedText):
        value = jnp.full(fn.event_shape, PAD)
    elif fn.law.max_tokens is None:
        raise ValueError(
            "a latent text needs max_tokens: the unbounded stream cannot be sampled. "
            "Pass max_tokens to lm(...) at this site, and stop if the text may end earlier."
        )
    else:
        value = jnp.zeros(fn.law.max_tokens, jnp.int32)
    return jnp.broadcast_to(value, fn.batch_shape + value.shape)


class DummyTexts(Messenger):
    """Gives latent text sites some value, so that a run costs no forward pass."""

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "sample" and not msg["is_observed"] and is_text(msg) and msg["value"] is None:
            try:
                msg["value"] = any_text(msg["fn"])
            except ValueError as error:
                raise ValueError(f"site {msg['name']!r}: {error}") from None


def structure(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any], key: Array | None = None) -> Trace:
    """A trace of the model whose latent texts hold arbitrary values: sites, plates, observations.

    :param key: of what else is drawn; always the same by default.
    :raises TypeError: arguments that the model does not take.
    """
    check_arguments(model, args, kwargs)
    with (
        handlers.block(),
        handlers.trace() as trace,
        DummyTexts(),
        handlers.seed(rng_seed=random.key(0) if key is None else key),
    ):
        try:
            model(*args, **kwargs)
        except Exception as error:
            if not hasattr(error, "__notes__"):
                where = f"behind site {next(reversed(trace))!r}" if trace else "before its first site"
                error.add_note(f"Raised by the program, or at one of its sites, {where}.")
            raise
    return dict(trace)


def text_sites(trace: Trace) -> dict[str, Site]:
    """The latent text sites of a trace, in order."""
    return {name: site for name, site in trace.items() if is_latent(site) and is_text(site)}


def plate_sizes(*traces: Trace) -> dict[int, int]:
    """Size of each plate of the traces, by its (negative) dimension."""
    return {
        frame.dim: frame.size
        for trace in traces
        for site in trace.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
    }


def subsampled(trace: Trace) -> Values:
    """The rows of each plate that takes some of them alone, by its name."""
    return {
        name: site["value"]
        for name, site in trace.items()
        if site["type"] == "plate" and site["args"][1] not in (None, site["args"][0])
    }


def plate_nesting(trace: Trace) -> int:
    """How many batch dimensions the plates of a trace take."""
    return -min(plate_sizes(trace), default=0)


def common_axes(*traces: Trace) -> tuple[int, ...]:
    """The dimensions (negative) of the plates that contain every site of every trace.

    Given the program's arguments their rows are independent: each is an observation of its own.
    """
    common: set[tuple[int, int]] | None = None
    for trace in traces:
        stacks = [
            {(frame.name, frame.dim, frame.size) for frame in site["cond_indep_stack"]}
            for site in trace.values()
            if site["type"] == "sample"
        ]
        if stacks:  # two plates of one size are no plate; a guide may call the program's by another name
            own = {(dim, size) for _, dim, size in set.intersection(*stacks)}
            common = own if common is None else common & own
    return tuple(sorted(dim for dim, _ in common or ()))


# --- programs from programs -----------------------------------------------------------------------


def signature(program: Program) -> inspect.Signature:
    """The parameters of a program, be it a function or a guide."""
    return inspect.signature(program)


def open_plates() -> set[int]:
    """The dimensions of the plates that are open now, negative."""
    return {handler.dim for handler in _PYRO_STACK if isinstance(handler, numpyro.plate)}


def in_data_plate(program: Program) -> Program:
    """The program inside a plate over its arguments: one row of each an observation."""

    def rows(*args: Any, **kwargs: Any) -> Any:
        with numpyro.plate(DATA, _number_of_rows(args), dim=-1):
            return program(*args, **kwargs)

    if hasattr(program, "log_partition"):
        rows.log_partition = program.log_partition  # type: ignore[attr-defined]
    # Prompts find arguments by the program's own names.
    rows.__signature__ = signature(program)  # type: ignore[attr-defined]
    return rows


def _number_of_rows(args: tuple[Any, ...]) -> int:
    from llmppl.numpyro.network.text_arrays import TextArgument

    first = args[0] if args else None
    if isinstance(first, TextArgument):
        first = first.verbatim
    if first is None or isinstance(first, str) or not hasattr(first, "__len__") or not np.ndim(first):
        raise TypeError(
            f"vectorize_data=True needs a list of observations for each argument, got {first!r}. "
            "Pass lists of one length, or leave vectorize_data out."
        )
    return len(first)


class Simulated(Messenger):
    """Draws the observed sites too. An observed stream is drawn to its observed length, which leaves its law
    unchanged: the law of the first tokens of a stream is that of a text of so many tokens."""

    def __init__(self, key: Array) -> None:
        super().__init__()
        self.key = key
        self.observations: Values = {}

    def process_message(self, msg: Site) -> None:
        if msg["type"] != "sample" or not msg["is_observed"]:
            return
        if isinstance(msg["fn"], dist.Unit):
            raise ValueError(
                f"factor {msg['name']!r}: simulated observations are asked for, and a factor cannot be simulated. "
                "Express it as an observed site, or do without them."
            )
        self.key, own = random.split(self.key)
        fn, observed = own_law(msg["fn"]), msg["value"]
        if isinstance(fn, AutoregressiveText) and fn.law.max_tokens is None:
            width = observed.shape[-1]
            law = TextLaw(fn.law.vocabulary, width, 0, None, fn.law.allowed, fn.law.temperature)
            drawn, _ = AutoregressiveText(fn.lm, fn.context, law, fn.lora, fn.batch_shape).draw(own)
            value = jnp.where(jnp.arange(width) < lengths(jnp.asarray(observed))[..., None], drawn, PAD)
        else:
            value = fn.sample(own)
        msg["value"] = value
        self.observations[msg["name"]] = value


def simulate(key: Array, model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Values, Values]:
    """One draw from the program with its observed sites drawn too: latents and observations by site.

    Given the simulated observations the latents are an exact draw from the posterior. An observed stream has as many
    tokens as the one that it replaces.

    :raises ValueError: the program has a factor, which cannot be simulated.
    """
    latent_key, observed_key = random.split(key)
    simulated = Simulated(observed_key)
    with ExitStack() as stack:
        stack.enter_context(handlers.block())
        trace = stack.enter_context(handlers.trace())
        stack.enter_context(simulated)
        stack.enter_context(handlers.seed(rng_seed=latent_key))
        model(*args, **kwargs)
    return {name: site["value"] for name, site in trace.items() if is_latent(site)}, simulated.observations


class Observed(Messenger):
    """Puts values in the place of observed ones."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "sample" and msg["name"] in self.values and msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]


def observing(model: Program, guide: Program, observations: Values) -> tuple[Program, Program]:
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
        return guide(*args, **{"observations": observations, **kwargs})

    if hasattr(guide, "log_partition"):
        told.log_partition = lambda *args, **kwargs: guide.log_partition(  # type: ignore[attr-defined]
            *args, **{"observations": observations, **kwargs}
        )
    told.__signature__ = signature(guide)  # type: ignore[attr-defined]
    observed.__signature__ = signature(model)  # type: ignore[attr-defined]
    return observed, told
