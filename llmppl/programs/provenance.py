"""Text tensors that remember where their tokens come from, through whatever a program does with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NOWHERE = -1

_MOVES = frozenset(
    [
        "__getitem__",
        "broadcast_to",
        "chunk",
        "clone",
        "contiguous",
        "cpu",
        "cuda",
        "detach",
        "expand",
        "expand_as",
        "flatten",
        "flip",
        "gather",
        "index_select",
        "long",
        "masked_fill",
        "movedim",
        "narrow",
        "pad",
        "permute",
        "repeat",
        "repeat_interleave",
        "reshape",
        "roll",
        "select",
        "split",
        "squeeze",
        "to",
        "transpose",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
        "view_as",
    ]
)
"""Functions that put the entries of their first argument elsewhere."""

_JOINS = frozenset(["cat", "concat", "concatenate", "hstack", "stack", "where"])
"""Functions that put entries of several arguments together."""


class Tracked(Tensor):
    """A tensor of tokens, each with a number that says which latent token it is.

    Slices, copies, joins and the like keep the numbers; tokens from elsewhere have :data:`NOWHERE`. Any other
    function sees, and returns, a plain tensor: what a program computes from a text is no text.
    """

    origin: Tensor
    """Shaped as the tokens."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            name = getattr(func, "__name__", "")
            if name in _JOINS:
                origin = func(*map(_origins, args), **{k: _origins(v) for k, v in kwargs.items()})
            elif name in _MOVES and args and isinstance(args[0], Tracked):
                # A number is what fills up: padding, from nowhere.
                filled = name in ("masked_fill", "pad")
                rest = [NOWHERE if filled and _is_number(a) else a for a in args[1:]]
                named = {k: NOWHERE if filled and _is_number(v) else v for k, v in kwargs.items()}
                origin = func(args[0].origin, *rest, **named)
            else:
                return result
            return _tracked(result, origin)


def track(tokens: Tensor, origin: Tensor) -> Tracked:
    """Tokens with their numbers, both of one shape; padding's is forgotten."""
    tracked: Tracked = tokens.detach().as_subclass(Tracked)
    tracked.origin = origin
    return tracked


def origins(tokens: Tensor) -> Tensor:
    """The number of every token, :data:`NOWHERE` for all of a plain tensor's."""
    if isinstance(tokens, Tracked):
        return tokens.origin
    return torch.full(tokens.shape, NOWHERE, dtype=torch.long, device=tokens.device)


def plain(tokens: Tensor) -> Tensor:
    """The tokens alone."""
    return tokens.as_subclass(Tensor)


def _tracked(result: Any, origin: Any) -> Any:
    if isinstance(result, (tuple, list)):
        return type(result)(_tracked(r, o) for r, o in zip(result, origin, strict=True))
    if result.dtype.is_floating_point or result.dtype == torch.bool:
        return result
    return track(result, origin.long())


def _origins(argument: Any) -> Any:
    """The argument of a join, with numbers in place of tokens."""
    if isinstance(argument, (tuple, list)):
        return type(argument)(_origins(a) for a in argument)
    if isinstance(argument, Tensor) and argument.dtype != torch.bool:
        return origins(argument)
    return argument


def _is_number(argument: Any) -> bool:
    return isinstance(argument, (int, float)) and not isinstance(argument, bool)
