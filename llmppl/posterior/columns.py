"""What a posterior keeps of several passes, put together. Needs numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmppl.posterior.posterior import Array, Posterior
from llmppl.text import PAD

_Columns = dict[str, Array]


@dataclass
class Columns:
    """Numbers of any number of passes.

    A site that only some passes have is filled up in the others: a text with padding, a number with NaN,
    a log-probability with zero.

    :param parts: of each pass ``count``, ``log_p``, ``log_q`` and by site ``samples``, ``token_log_p``,
        ``token_log_q`` and ``log_likelihood``, as of :class:`Posterior`.
    :param decoders: as of :class:`Posterior`, as are ``observed``, ``masked``, ``deterministic``, ``plates`` and
        ``dims``.
    """

    parts: list[dict[str, Any]] = field(default_factory=list)
    decoders: dict[str, Any] = field(default_factory=dict)
    observed: _Columns = field(default_factory=dict)
    masked: tuple[str, ...] = ()
    deterministic: tuple[str, ...] = ()
    plates: tuple[str, ...] = ()
    dims: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def posterior(self, method: str, exactness: str) -> Posterior:
        """Everything taken so far; log-weights are log p by enumeration, zero by MCMC, else log p − log q."""
        log_p = np.concatenate([part["log_p"] for part in self.parts])
        if method == "enumeration":
            log_weights = log_p
        elif method == "mcmc":
            log_weights = np.zeros_like(log_p)
        elif method == "decoding":
            log_weights = np.full_like(log_p, np.nan)
        else:
            log_weights = log_p - np.concatenate([part["log_q"] for part in self.parts])
        return Posterior(
            samples=self._joined("samples"),
            log_weights=log_weights,
            log_joint=log_p,
            method=method,
            exactness=exactness,
            decoders=self.decoders,
            observed=self.observed,
            masked=self.masked,
            deterministic=self.deterministic,
            plates=self.plates,
            dims=self.dims,
            token_log_p=self._joined("token_log_p"),
            token_log_q=self._joined("token_log_q"),
            log_likelihood=self._joined("log_likelihood"),
        )

    def _joined(self, column: str) -> _Columns:
        names = dict.fromkeys(name for part in self.parts for name in part[column])
        return {name: self._concatenated(column, name) for name in names}

    def _concatenated(self, column: str, name: str) -> Array:
        found = [part[column].get(name) for part in self.parts]
        known = [values for values in found if values is not None]
        text = column == "samples" and name in self.decoders
        filling = PAD if text else np.nan if column == "samples" else 0.0
        if text or column.startswith("token"):
            width = max(values.shape[-1] for values in known)
            found = [None if v is None else widened(v, width, filling) for v in found]
            known = [values for values in found if values is not None]
        if len(known) < len(found):
            kind = np.result_type(known[0].dtype, np.int64 if text else np.float64)
            shape = known[0].shape[1:]
            found = [
                np.full((part["count"], *shape), filling, dtype=kind) if v is None else v
                for v, part in zip(found, self.parts, strict=True)
            ]
        return np.concatenate([values for values in found if values is not None])


def inner_plates(
    shape: Sequence[int], event: int, axes: Sequence[int], nesting: int, names: Mapping[int, str]
) -> tuple[str, ...]:
    """Names of the plates, other than those of the rows, in which a value has more than one entry.

    :param shape: of the value, plates and event.
    :param axes: the (negative) dimensions of the rows.
    :param names: of the plates, by (negative) dimension.
    """
    batch = list(shape[: len(shape) - event])[-nesting:] if nesting else []
    inner = [dim - len(batch) for dim, size in enumerate(batch) if size != 1 and dim - len(batch) not in axes]
    return tuple(names.get(dim, "") for dim in inner)


def widened(values: Array, width: int, filling: float = PAD) -> Array:
    """Padded on the right to so many tokens."""
    missing = width - values.shape[-1]
    if not missing:
        return values
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)], constant_values=filling)
