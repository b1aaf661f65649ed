"""How many particles are drawn and scored together."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample

from llmppl.network.random_states import randomness_kept
from llmppl.posterior.running_error import BLOCK
from llmppl.programs.structure import Program, is_text, structure

BLOCK_BYTES = 256 * 2**20
"""Memory of the tokens of the particles that are drawn and scored together. (The network's own is bounded apart:
``sampling.CACHE_BYTES``, ``scoring.MAX_NODES``.)"""

TOKEN_BYTES = 512
"""Of one token of a particle while it is drawn and scored, as measured."""


def block_size(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Particles that are drawn and scored together: :data:`BLOCK`, fewer where plates have many rows."""
    with randomness_kept():
        trace = structure(model, args, kwargs)
    tokens = 0
    for site in trace.nodes.values():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if is_text(site) and isinstance(site["value"], torch.Tensor):
            # Each row is read with its context.
            width = site["fn"].context.shape[-1] + site["value"].shape[-1]
            tokens += math.prod(torch.broadcast_shapes(site["fn"].batch_shape, site["value"].shape[:-1])) * width
        else:
            tokens += site["value"].numel() if isinstance(site["value"], torch.Tensor) else 1
    return min(max(BLOCK_BYTES // (TOKEN_BYTES * max(tokens, 1)), 1), BLOCK)
