"""Pickles of modules whose parameters Pyro knows, with parts of them left to whoever reads the pickle.

Pyro's parameter store hangs a weak reference on every parameter that it has seen, which pickle refuses; parameters
are written without what hangs on them. Parts that several objects share (a language model, say) are named instead of
written, so that copies share them as the originals do.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from torch import Tensor, nn

APART = "set apart"

LARGE = 2**16
"""Bytes from which on a tensor can be set apart."""


def packed(state: Any, shared: Mapping[int, Any] | None = None, by: type[pickle.Pickler] = pickle.Pickler) -> bytes:
    """An object as bytes.

    :param shared: by ``id``, the names of the parts that are left out.
    :param by: the pickler; cloudpickle's writes what cannot be imported, too.
    :raises pickle.PicklingError: something in it cannot be imported, a lambda say.
    """
    buffer = io.BytesIO()
    try:
        _with_parts(by)(buffer, shared or {}).dump(state)  # type: ignore[arg-type]
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


@contextmanager
def set_apart(kept: Collection[Tensor]) -> Iterator[dict[str, Tensor]]:
    """A block in which large tensors are left out of all pickles and gathered in the dictionary that it gives, each
    once: so that they reach many processes in memory that those share.

    :param kept: tensors that are written nevertheless, as they will be another's own.
    """
    apart = _Apart({id(tensor) for tensor in kept})
    token = _apart.set(apart)
    try:
        yield apart.tensors
    finally:
        _apart.reset(token)


@contextmanager
def put_back(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which pickles that :func:`set_apart` has made are read with the tensors that it gave."""
    token = _back.set(dict(tensors))
    try:
        yield
    finally:
        _back.reset(token)


class _Apart:
    def __init__(self, kept: set[int]) -> None:
        self.kept, self.names, self.tensors = kept, dict[int, str](), dict[str, Tensor]()

    def name(self, obj: Any) -> tuple[str, str, bool] | None:
        """What stands in a pickle for a tensor that is set apart."""
        if not isinstance(obj, Tensor) or obj.nbytes < LARGE or id(obj) in self.kept:
            return None
        name = self.names.setdefault(id(obj), f"tensor {len(self.names)}")
        self.tensors[name] = obj
        return APART, name, isinstance(obj, nn.Parameter)


_apart: ContextVar[_Apart | None] = ContextVar("apart", default=None)
_back: ContextVar[dict[str, Tensor] | None] = ContextVar("back", default=None)


@cache
def _with_parts(by: Any) -> Callable[..., pickle.Pickler]:
    class Pickler(by):
        def __init__(self, file: io.BytesIO, shared: Mapping[int, Any]) -> None:
            super().__init__(file)
            self.shared = shared

        def persistent_id(self, obj: Any) -> Any:
            apart = _apart.get()
            return self.shared.get(id(obj)) or (None if apart is None else apart.name(obj))

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, nn.Parameter):
                return _parameter, (obj.detach(), obj.requires_grad)
            return super().reducer_override(obj) if hasattr(by, "reducer_override") else NotImplemented

    return Pickler


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, shared: Mapping[Any, Any]) -> None:
        super().__init__(file)
        self.shared = shared

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[0] == APART:
            _, name, parameter = pid
            back = _back.get()
            if back is None:
                raise pickle.UnpicklingError("this pickle has its large tensors elsewhere. Read it under put_back().")
            if parameter and not isinstance(back[name], nn.Parameter):
                back[name] = nn.Parameter(back[name], requires_grad=False)  # one object, wherever it stands
            return back[name]
        return self.shared[pid]


def _parameter(value: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(value, requires_grad)
