"""What the distributions over text given a context have in common."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from llmppl.network.adapters import Adapters
from llmppl.network.embedded import EmbeddedArrays
from llmppl.network.scoring import Request

if TYPE_CHECKING:
    from llmppl.network.vllm_engine import VLLM


class LanguageModel(Protocol):
    """What a distribution asks of the language model that it was made by; :class:`llmppl.LM` says what each is."""

    transformer: Any
    vocabulary: int
    adapters: Adapters
    arrays: EmbeddedArrays
    drawn: OrderedDict[Any, Tensor]
    engine: VLLM | None

    @property
    def max_length(self) -> int | None: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def score(self, requests: Sequence[Request], adapter: str | None = None) -> list[Tensor]: ...
    def using(self, adapter: str | None) -> AbstractContextManager[None]: ...
    def drawing(self, adapter: str | None, dtype: torch.dtype | None) -> AbstractContextManager[Any]: ...
    def trains(self, adapter: str | None) -> bool: ...
    def version(self, adapter: str | None) -> int: ...
    def weights_version(self) -> int: ...
    def encode(self, text: str | Sequence[str]) -> Tensor: ...
    def decode(self, value: Any) -> Any: ...


@dataclass
class Memo:
    """The last value that a distribution has drawn or scored, with its token log-probabilities.

    Keyed by value, for Pyro passes views and copies; by the adapter's version, for it trains.
    """

    value: Tensor | None = None
    scores: Tensor | None = None
    version: int = 0

    def holds(self, value: Tensor, shape: torch.Size, version: int, gradient: bool) -> bool:
        """Whether scores of batch shape ``shape`` are there, with a gradient if one is wanted."""
        return (
            self.value is not None
            and self.scores is not None
            and self.version == version
            and self.value.shape == value.shape
            and self.scores.shape[:-1] == shape
            and (self.scores.requires_grad or not gradient)
            and torch.equal(self.value, value)
        )

    def take(self, gradient: bool) -> Tensor:
        scores = self.scores
        assert scores is not None
        if gradient:
            self.scores = None  # a graph serves one backward pass
            return scores
        return scores.detach()

    def detached(self) -> Memo:
        return Memo(self.value, None if self.scores is None else self.scores.detach(), self.version)


@dataclass(frozen=True)
class Pending:
    """What a distribution needs scored, and how it takes the scores."""

    request: Request
    finish: Callable[[Tensor], None]


def score_together(waiting: Iterable[tuple[ConditionedText, Pending | None]]) -> None:
    """Score what several distributions need in one pass over its distinct prefixes.

    Their ``log_prob`` of these values then costs nothing, once where gradients flow.
    """
    groups: dict[tuple[int, str | None], tuple[LanguageModel, list[Pending]]] = {}
    for fn, pending in waiting:
        if pending is not None:
            groups.setdefault((id(fn.lm), fn.adapter), (fn.lm, []))[1].append(pending)
    for (_, adapter), (lm, group) in groups.items():
        for pending, scores in zip(group, lm.score([p.request for p in group], adapter), strict=True):
            pending.finish(scores)


class ConditionedText:
    """A distribution over text tensors given a context, made by an :class:`~llmppl.LM`."""

    lm: LanguageModel
    context: Tensor  # batch_shape + (L,), with padding anywhere
    adapter: str | None
    batch_shape: torch.Size
    site: str | None = None
    """Name of the site that a guide proposes with this, for error messages."""

    def with_context(self, context: Tensor, adapter: str | None) -> ConditionedText:
        raise NotImplementedError

    def pending(self, value: Tensor) -> Pending | None:
        """What ``log_prob(value)`` asks of the network; ``None`` where it is known already."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs of what was scored: a copy is scored anew where gradients are wanted."""
        return {key: _without_graph(value) for key, value in self.__dict__.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy on the same language model, or on the model's copy where that is being copied, too."""
        for part in (self.lm, getattr(self, "model", None)):
            memo.setdefault(id(part), part)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        return twin

    @property
    def _trains(self) -> bool:
        """Whether a parameter that can get gradients is read: the adapter's, or that of an array's encoder."""
        return self.lm.trains(self.adapter) or self.lm.arrays.train(self.context)

    @property
    def _wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and self._trains

    def _version(self) -> int:
        """A number that grows whenever such a parameter changes in place."""
        return self.lm.version(self.adapter) + self.lm.arrays.version(self.context)

    def _broadcast(self, value: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
        """``(N, T)`` values and ``(N, L)`` contexts row by row, and the batch shape they come from."""
        try:
            shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"value of batch shape {tuple(value.shape[:-1])} does not broadcast with the "
                f"distribution's batch shape {tuple(self.batch_shape)}. Give the observed text and the "
                "pieces of its context the same number of rows."
            ) from None
        flat = value.expand(shape + value.shape[-1:]).reshape(-1, value.shape[-1])
        context = self.context.expand(shape + self.context.shape[-1:])
        return flat, context.reshape(-1, context.shape[-1]), shape


def _without_graph(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.is_leaf:
        return value.detach()
    return value.detached() if hasattr(value, "detached") else value
