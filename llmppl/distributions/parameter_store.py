"""Modules in Pyro's parameter store."""

from __future__ import annotations

import pyro
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import nn


def register_module(name: str, module: nn.Module) -> None:
    """``pyro.module``, but a parameter that another module of this name left in the store gives way:
    Pyro would put the old tensor in place of the new one, and the adapter would never train."""
    store = pyro.get_param_store()
    for key, parameter in module.named_parameters():
        full_name = f"{name}$$${key}"
        if full_name in store and store[full_name] is not parameter:
            del store[full_name]
    pyro.module(name, module)


def register_where_traced(name: str, module: nn.Module) -> None:
    """:func:`register_module` unless every trace in progress has the module already.

    For modules that a program meets at each of its sites: hundreds of parameters take longer to name than a small
    network takes to run.
    """
    first = next((key for key, parameter in module.named_parameters() if parameter.requires_grad), None)
    traces = [handler.trace for handler in _PYRO_STACK if isinstance(handler, TraceMessenger)]
    if first is not None and any(f"{name}$$${first}" not in trace.nodes for trace in traces):
        register_module(name, module)
