"""What makes two training runs the same run: a checkpoint is resumed by no other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO
from torch import Tensor

from llmppl.network.digests import weights_digest
from llmppl.programs.structure import Program

# Set by Pyro, or by fit, while a run goes on.
_OF_THE_RUN = {"max_plate_nesting", "target_temperature"}


def run_identity(
    guide: Program,
    parameters: Mapping[str, Tensor],
    objective: ELBO,
    data: list[tuple[Any, ...]],
    **settings: Any,
) -> dict[str, str]:
    """What a checkpoint must agree with, as text by name.

    :param settings: other arguments of the run.
    """
    record: dict[str, Any] = {}
    if hasattr(guide, "lm"):
        lm = guide.lm
        record |= {f"language model's {key}": value for key, value in lm.fingerprint().items()}
        record["language model's weights"] = weights_digest(lm.transformer)
    record["guide"] = type(guide).__name__
    if hasattr(guide, "settings"):
        record |= {f"guide's {key}": value for key, value in guide.settings().items()}
    record["objective"] = type(objective).__name__
    record |= {f"objective's {key}": value for key, value in _settings(objective).items()}
    record["parameters"] = list(parameters)
    record |= {f"shape of parameter {name!r}": tuple(p.shape) for name, p in parameters.items()}
    record["number of data"] = len(data)
    record["data"] = digest(data)
    return {key: repr(value) for key, value in {**record, **settings}.items()}


def check_identity(stored: Mapping[str, str], present: Mapping[str, str], source: str) -> None:
    """Refuse a checkpoint of another run.

    :raises ValueError: naming the first thing that differs.
    """
    for key in [*present, *(key for key in stored if key not in present)]:
        if stored.get(key) != present.get(key):
            raise ValueError(
                f"{source} belongs to another run: its {key} is {stored.get(key, 'absent')}, this one's is "
                f"{present.get(key, 'absent')}. Call fit as that run was called, or choose another folder."
            )


def digest(value: Any) -> str:
    """16 hexadecimal digits of strings, numbers, tensors and collections of them. Of other things the
    type counts, not the content."""
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()[:16]


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, np.ndarray):
        state.update(f"array {value.dtype} {value.shape}:".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        _feed(state, [list(pair) for pair in value.items()])
    elif isinstance(value, (list, tuple)):
        state.update(f"{type(value).__name__} {len(value)}:".encode())
        for item in value:
            _feed(state, item)
    elif value is None or isinstance(value, (str, bytes, int, float)):
        text = repr(value).encode("utf-8", "surrogatepass")
        state.update(f"{type(value).__name__} {len(text)}:".encode() + text)
    else:
        state.update(f"{type(value).__qualname__};".encode())


def _settings(objective: ELBO) -> dict[str, Any]:
    if hasattr(objective, "settings"):
        return dict(objective.settings())
    changing = _OF_THE_RUN | (objective.state_dict().keys() if hasattr(objective, "state_dict") else set())
    return {
        key: value
        for key, value in vars(objective).items()
        if not key.startswith("_") and key not in changing and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (str, int, float))
