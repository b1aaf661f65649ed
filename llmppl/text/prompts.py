"""Prompt functions of guides: what they may ask for, by name, and what they may return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


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


def check_text_sites(texts: list[str], sites: Iterable[str], prompts: Iterable[str], sample: str) -> None:
    """Refuse a program without a latent text, and prompts of sites that it has not.

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
    unknown = set(prompts) - set(texts)
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


def call_prompt(
    name: str, function: Callable[..., Any], known: Mapping[str, Any], shown: Callable[[Any], str | None]
) -> list[Any]:
    """The pieces that a prompt function returns.

    :param name: of its site.
    :param known: what it may ask for, by name.
    :param shown: how a value looks inside a string, or ``None`` where it may stand there.
    :raises ValueError: it asks for something else.
    :raises TypeError: it returns no list of pieces, or has written a tensor into a string.
    """
    values = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in known:
            values[parameter.name] = known[parameter.name]
        elif parameter.default is inspect.Parameter.empty:
            raise ValueError(
                f"prompt[{name!r}] asks for {parameter.name!r}, which is neither an argument of the program "
                f"nor an observed or earlier text site; those are {sorted(known)}."
            )
    pieces = function(**values)
    if not isinstance(pieces, (list, tuple)) or not pieces:
        raise TypeError(f"prompt[{name!r}] must return a non-empty list of pieces, got {pieces!r}.")
    for argument, value in values.items():
        text = shown(value)
        if text and any(isinstance(piece, str) and text in piece for piece in pieces):
            raise TypeError(
                f"prompt[{name!r}] writes {argument!r}, which is {type(value).__name__} here, into a string. "
                f"Return it as a piece of its own: ['...', {argument}, '...']."
            )
    return list(pieces)


def wrong_batch(name: str, prompt: tuple[int, ...], site: tuple[int, ...]) -> ValueError:
    """A prompt whose batch shape is not that of its site."""
    return ValueError(
        f"the prompt of site {name!r} has batch shape {prompt}, the site itself "
        f"{site}. Give the prompt one text, or one a row of the site."
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
