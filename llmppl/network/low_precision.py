"""A copy of the language model in lower precision, for drawing texts only.

What it draws has the copy's own density, which is recorded while drawing: as a proposal it is exact.
Scores of the program, and of a guide while it trains, come from the model itself.
"""

from __future__ import annotations

from typing import Any

import torch


class Sampler:
    """A transformer's copy in ``dtype`` with one adapter merged into its weights.

    :param transformer: the original, with its adapters injected or not.
    """

    def __init__(self, transformer: Any, dtype: torch.dtype) -> None:
        device = next(transformer.parameters()).device
        with torch.random.fork_rng(devices=[]):
            self.transformer = type(transformer)._from_config(transformer.config, dtype=dtype).to(device)
        self.transformer.eval().requires_grad_(False)
        self._version: int | None = None

    @torch.no_grad()
    def refresh(self, original: Any, adapter: str | None, version: int) -> Any:
        """The copy with the adapter's present weights.

        :param version: of the adapter; nothing is copied while it stays the same.
        """
        if version == self._version:
            return self.transformer
        from peft.tuners.tuners_utils import BaseTunerLayer

        targets = dict(self.transformer.named_parameters())
        merged = set()
        for key, module in original.named_modules():
            if isinstance(module, BaseTunerLayer):
                layer: Any = module
                weight = layer.get_base_layer().weight
                if adapter is not None and adapter in layer.lora_A:
                    weight = weight + layer.get_delta_weight(adapter)
                targets[f"{key}.weight"].copy_(weight)
                merged.add(f"{key}.weight")
        if self._version is None:
            for key, parameter in original.named_parameters():
                plain = key.replace(".base_layer.", ".")
                if "lora_" not in key and plain not in merged and plain in targets:
                    targets[plain].copy_(parameter)
        self._version = version
        return self.transformer
