"""The states of the random generators that a run draws from, in plain tensors and strings."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch


def random_state() -> dict[str, Any]:
    """Of torch, its CUDA devices, numpy and Python: what ``torch.load(weights_only=True)`` reads back."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - Pyro seeds this one
    version, internal, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "python": json.dumps([version, internal, gauss_next]),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`random_state` returned. CUDA states of devices that are missing are left out."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, internal, gauss_next = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss_next))
    if torch.cuda.is_available():
        for device, values in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(values, device)


@contextmanager
def randomness_kept(seed: int | None = None) -> Iterator[None]:
    """A block after which every generator is as it was before.

    :param seed: of the block's own random numbers; by default they go on from the present state.
    """
    before = random_state()
    try:
        if seed is not None:
            pyro.set_rng_seed(seed)
        yield
    finally:
        set_random_state(before)
