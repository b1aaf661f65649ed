"""Pickles of modules whose parameters Pyro knows, with parts of them left to whoever reads the pickle.

Pyro's parameter store hangs a weak reference on every parameter that it has seen, which pickle refuses; parameters
are written without what hangs on them. Parts that several objects share (a language model, say) are named instead of
written, so that copies share them as the originals do.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def packed(state: Any, shared: Mapping[int, Any] | None = None) -> bytes:
    """An object as bytes.

    :param shared: by ``id``, the names of the parts that are left out.
    :raises pickle.PicklingError: something in it cannot be imported, a lambda say.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, shared or {}).dump(state)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise pickle.PicklingError(
            f"{error}. Programs and prompts are pickled by their names: define them at the top of a module that can be "
            "imported, or save the guide's weights by guide.save(path) instead."
        ) from error
    return buffer.getvalue()


def unpacked(content: bytes, shared: Mapping[Any, Any] | None = None) -> Any:
    """What :func:`packed` was given.

    :param shared: by name, what stands for the parts that were left out.
    """
    return _Unpickler(io.BytesIO(content), shared or {}).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, shared: Mapping[int, Any]) -> None:
        super().__init__(file)
        self.shared = shared

    def persistent_id(self, obj: Any) -> Any:
        return self.shared.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, nn.Parameter):
            return _parameter, (obj.detach(), obj.requires_grad)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, shared: Mapping[Any, Any]) -> None:
        super().__init__(file)
        self.shared = shared

    def persistent_load(self, pid: Any) -> Any:
        return self.shared[pid]


def _parameter(value: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(value, requires_grad)
