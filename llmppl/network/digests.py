"""A few digits that tell a model's weights from another's."""

from __future__ import annotations

import hashlib

from torch import nn


def weights_digest(transformer: nn.Module, points: int = 32) -> str:
    """A few numbers of every frozen weight: another model of the same shape differs in them."""
    state = hashlib.sha256()
    for name, weight in transformer.named_parameters():
        if "lora_" not in name:
            flat = weight.detach().flatten()
            sample = flat[:: max(len(flat) // points, 1)][:points]
            # Adapters that were added since wrap the layer.
            state.update(name.replace(".base_layer", "").encode() + sample.double().cpu().numpy().tobytes())
    return state.hexdigest()[:16]
