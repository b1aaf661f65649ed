"""Which keys a layer attends to beyond the order of tokens: sliding windows and chunks, layer type by layer type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FULL = "full_attention"


@dataclass(frozen=True)
class Windows:
    """What the layer types of a transformer see.

    :param limits: by layer type, its kind (``"full"``, ``"window"``, ``"chunk"``) and size in tokens.
    """

    limits: dict[str, tuple[str, int]]

    @classmethod
    def of(cls, config: Any) -> Windows:
        """Of a ``transformers`` configuration."""
        config = config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            window = None
        sizes = {
            "sliding_attention": ("window", window),
            "chunked_attention": ("chunk", getattr(config, "attention_chunk_size", None)),
        }
        types = set(getattr(config, "layer_types", None) or ())
        if not types:
            return cls({FULL: ("window", window) if window else ("full", 0)})
        known = {name: sizes.get(name, ("full", None)) for name in types}
        return cls({name: (kind, size) if size else ("full", 0) for name, (kind, size) in known.items()})

    @property
    def smallest(self) -> int | None:
        """Tokens up to which no window matters; ``None`` where none ever does."""
        return min((size for kind, size in self.limits.values() if kind != "full"), default=None)

    def masks(self, visible: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """The additive mask of every layer type, or the one that all layers share.

        :param visible: which keys each token sees by order, boolean ``(N, 1, M, P + M)``.
        :param queries, keys: the place of each token in its own row, ``(N, M)`` and ``(N, P + M)``.
        """
        by_limit: dict[tuple[str, int], Tensor] = {}
        for limit in self.limits.values():
            if limit not in by_limit:
                seen = _LIMITS[limit[0]](queries[:, None, :, None], keys[:, None, None, :], limit[1])
                mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
                by_limit[limit] = mask.masked_fill_(~(visible & seen), torch.finfo(dtype).min)
        if len(by_limit) == 1:
            return next(iter(by_limit.values()))
        return {name: by_limit[limit] for name, limit in self.limits.items()}


_LIMITS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "full": lambda query, key, size: torch.ones((), dtype=torch.bool, device=key.device),
    "window": lambda query, key, size: query - key < size,
    "chunk": lambda query, key, size: query // size == key // size,
}
