"""Prompt functions of guides: what they may ask for, by name, and what they may return."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llmppl.text.arguments import check_programs
from llmppl.text.relations import Relation, told

Site = Mapping[str, Any]


@dataclass(frozen=True)
class Framework:
    """How a framework's sites are told apart, and what it calls them.

    :param is_latent, is_text, is_enumerated: of a site; the last is summed out by the objective, and not the guide's.
    :param is_observation: whether a site observes data: no factor, and nothing computed.
    :param handlers, sample: names, for error messages.
    """

    is_latent: Callable[[Any], bool]
    is_text: Callable[[Any], bool]
    is_enumerated: Callable[[Any], bool]
    is_observation: Callable[[Any], bool]
    handlers: str
    sample: str

    def observed_sites(
        self, sites: Mapping[str, Any], given: Iterable[str], prompts: Iterable[str], proposed: Iterable[str] = ()
    ) -> dict[str, dict[str, Any]]:
        """The observed sites of a program that a guide can propose the latents of.

        :param sites: of a run of the program.
        :param given: latents that another guide proposes.
        :param prompts: sites that have one.
        :param proposed: latents that have a proposal of their own, by :func:`checked_others`.
        :raises ValueError: no latent text, a latent that nobody proposes, a prompt or a proposal without its site.
        """
        samples = {name: site for name, site in sites.items() if site["type"] == "sample"}
        own = {n: s for n, s in samples.items() if n not in given and self.is_latent(s) and not self.is_enumerated(s)}
        free = [name for name, site in own.items() if not self.is_text(site)]
        if unknown := set(proposed) - set(free):
            raise ValueError(f"others= names {sorted(unknown)}, but the model's latent sites without text are {free}.")
        own = {name: site for name, site in own.items() if name not in set(proposed)}
        for name, site in own.items():
            if not self.is_text(site):
                raise no_guide_for(name, type(site["fn"]).__name__, self.handlers)
        check_text_sites(list(own), samples, prompts, self.sample)
        return {name: site for name, site in samples.items() if self.is_observation(site)}


@dataclass(frozen=True)
class Telling:
    """What the prompts of a guide are told in one run.

    :param arguments: of the program, by name.
    :param observed: values of the observed sites, simulated ones where there are.
    :param simulated: those of them that are not the program's own.
    :param relation: of an argument to the program's observations.
    """

    arguments: Mapping[str, Any]
    observed: Mapping[str, Any]
    simulated: Mapping[str, Any]
    relation: Callable[[str], Relation]

    def pieces(
        self, site: str, function: Callable[..., Any], latents: Mapping[str, Any], shown: Callable[[Any], str | None]
    ) -> list[Any]:
        """What the prompt of a site returns.

        :param latents: values sampled before, by site.
        :param shown: how a value looks inside a string, or ``None`` where it may stand there.
        """
        label = f"prompt[{site!r}]"
        values = called_by_name(label, function, self._known(site, function, latents))
        with noted(label, values):
            found = function(**values)
        return checked_pieces(label, found, values, shown)

    def proposal(self, site: str, function: Callable[..., Any], latents: Mapping[str, Any]) -> Any:
        """What a proposal of :func:`checked_others` returns for its site."""
        label = f"others[{site!r}]"
        values = called_by_name(label, function, self._known(site, function, latents))
        with noted(label, values):
            return function(**values)

    def _known(self, site: str, function: Callable[..., Any], latents: Mapping[str, Any]) -> dict[str, Any]:
        asked = set(inspect.signature(function).parameters)
        known = {**self.observed, **latents}
        for name, value in self.arguments.items():
            if name in self.simulated:
                continue
            # A string that the program was given reads better in a prompt than its tokens.
            known[name] = value
            if self.simulated and name in asked:
                known[name] = told(site, name, value, self.relation(name), self.simulated)
        return known


@contextmanager
def noted(label: str, values: Mapping[str, Any]) -> Iterator[None]:
    """Has an error of a user's function say which function it is, and what it was given."""
    try:
        yield
    except Exception as error:
        of_shape = "a {} of shape {}".format
        given = ", ".join(
            f"{name}={of_shape(type(v).__name__, tuple(v.shape)) if hasattr(v, 'shape') else repr(v)}"
            for name, v in values.items()
        )
        error.add_note(f"Raised by {label}, called with {given[:300] or 'nothing'}.")
        raise


def checked_prompts(prompt: Mapping[str, Callable[..., Any]] | None) -> dict[str, Callable[..., Any]]:
    """Prompt functions by site.

    :raises TypeError: one that is no function.
    """
    for name, function in (prompt or {}).items():
        if not callable(function):
            raise TypeError(
                f"prompt[{name!r}] must be a function that returns a list of pieces, got {function!r}. "
                "Write e.g. lambda beginning, ending: [ending, beginning]."
            )
    return dict(prompt or {})


def checked_others(others: Any) -> dict[str, Callable[..., Any]]:
    """The proposals of single sites in ``others=``, functions that return a distribution; none of a guide.

    :raises TypeError: one that is no function; neither a guide nor a mapping.
    """
    if not isinstance(others, Mapping):
        if others is not None:
            check_programs(others=others)
        return {}
    for name, function in others.items():
        if not callable(function):
            raise TypeError(
                f"others[{name!r}] must be a function that returns a distribution, got {function!r}. "
                "Write e.g. lambda y, formula: LogNormal(...)."
            )
    return dict(others)


_NUMBERED = re.compile(r"(.*\D)\d+")


def check_text_sites(texts: list[str], sites: Iterable[str], prompts: Iterable[str], sample: str) -> None:
    """Refuse a program without a latent text, and prompts of sites that it has not. Of numbered sites, as a loop has
    them, prompts may name more than there are.

    :param texts: the latent text sites.
    :param sites: all sites.
    :param sample: how the framework writes a site.
    :raises ValueError: naming the sites.
    """
    if not texts:
        raise ValueError(
            f"the model has no latent text site; its sites are {list(sites)}. A text guide needs a "
            f"{sample}(name, lm(...)) without obs=."
        )
    # A loop of the program may have fewer turns for some arguments, and hence fewer of its numbered sites.
    loops = {match[1] for name in texts if (match := _NUMBERED.fullmatch(name))}
    unknown = {
        name for name in set(prompts) - set(texts) if not ((own := _NUMBERED.fullmatch(name)) and own[1] in loops)
    }
    if unknown:
        raise ValueError(f"prompt= names {sorted(unknown)}, but the model's latent text sites are {texts}.")


def no_guide_for(name: str, kind: str, handlers: str) -> ValueError:
    """A latent site that is no text, and that no other guide proposes."""
    return ValueError(
        f"latent site {name!r} ({kind}) is not text, and no guide is "
        f"given for it. Pass one as others=, e.g. others=AutoNormal({handlers}.block(model, "
        f"expose=[{name!r}]))."
    )


def arguments_of(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A program's arguments by name."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def called_by_name(label: str, function: Callable[..., Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """What a function is called with: what it asks for, by name.

    :param label: of the function, for the error message.
    :param known: what it may ask for.
    :raises ValueError: it asks for something else.
    """
    values = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in known:
            values[parameter.name] = known[parameter.name]
        elif parameter.default is inspect.Parameter.empty:
            raise ValueError(
                f"{label} asks for {parameter.name!r}, which is neither an argument of the program "
                f"nor an observed site or an earlier latent one; those are {sorted(known)}."
            )
    return values


def checked_pieces(label: str, pieces: Any, values: Mapping[str, Any], shown: Callable[[Any], str | None]) -> list[Any]:
    """The pieces that a prompt function has returned.

    :param values: that it was called with.
    :param shown: how a value looks inside a string, or ``None`` where it may stand there.
    :raises TypeError: no list of pieces, or a tensor is written into a string.
    """
    if not isinstance(pieces, (list, tuple)) or not pieces:
        raise TypeError(f"{label} must return a non-empty list of pieces, got {pieces!r}.")
    for argument, value in values.items():
        text = shown(value)
        if text and any(isinstance(piece, str) and piece is not value and text in piece for piece in pieces):
            numbers = "float" in str(getattr(value, "dtype", "")) or getattr(value, "shape", (1,)) == ()
            mend = (
                f"Write its rows one by one: lm.encode([str(row) for row in {argument}.reshape(-1).tolist()])."
                f"reshape(*{argument}.shape, -1)."
                if numbers
                else f"Return it as a piece of its own: ['...', {argument}, '...']."
            )
            raise TypeError(f"{label} writes {argument!r}, which is {type(value).__name__} here, into a string. {mend}")
    return list(pieces)


def wrong_batch(name: str, prompt: tuple[int, ...], site: tuple[int, ...]) -> ValueError:
    """A prompt whose batch shape is not that of its site."""
    return ValueError(
        f"the prompt of site {name!r} has batch shape {prompt}, the site itself "
        f"{site}. Give the prompt one text, or one a row of the site."
    )


def check_plates(
    name: str, prompt: tuple[int, ...], site: tuple[int, ...], nesting: int, dims: Collection[int]
) -> None:
    """Refuse a prompt that has rows along a plate of the program that its site is not in: the site's text would be
    drawn once a row, and count as often.

    :param nesting: how many dimensions the program's plates take. Those to the left are of particles and data.
    :param dims: of the plates that are open at the site, negative.
    """
    for dim in range(-min(nesting, len(prompt)), 0):
        if prompt[dim] > 1 and dim not in dims and (len(site) < -dim or site[dim] == 1):
            raise ValueError(
                f"the prompt of site {name!r} has batch shape {prompt}, with {prompt[dim]} rows in dimension {dim}, "
                f"where the site is in no plate. Tell it all rows in one text, and keep the dimension: y[..., :1] in "
                "place of y[..., 0]."
            )


def check_virtual_tokens(number: Any, longest: int | None) -> None:
    """Refuse numbers of virtual tokens of a soft prompt.

    :param longest: the model's context, tokens.
    :raises TypeError, ValueError: naming the argument and the mend.
    """
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"num_virtual_tokens must be a whole number of tokens, got {number!r}.")
    if number < 1:
        raise ValueError(
            f"num_virtual_tokens must be at least 1, got {number}. PromptGuide is the guide without virtual tokens."
        )
    if longest is not None and number > longest - 2:
        raise ValueError(
            f"num_virtual_tokens={number} leaves no room in the model's context of {longest} tokens for a prompt and "
            "a text. Use fewer; 5 to 100 are usual."
        )


def initial_ids(text: Any, encode: Callable[[str], list[int]]) -> list[int]:
    """The tokens that a soft prompt starts from.

    :raises TypeError, ValueError: no string, or one without tokens.
    """
    if not isinstance(text, str):
        raise TypeError(f"initial_text must be a string, got {type(text).__name__}.")
    tokens = encode(text)
    if not tokens:
        raise ValueError(f"initial_text={text!r} has no tokens to start from. Pass a non-empty text, or leave it out.")
    return tokens
