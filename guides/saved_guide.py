"""Guides whose trained tensors are kept in a safetensors file."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from llmppl.guides.text_guide import TextGuide
from llmppl.network.guide_tensors import load_adapter, save_adapter
from llmppl.text.declared import declared


class SavedGuide(TextGuide):
    """A guide with :meth:`save` and :meth:`load`. A subclass names its tensors."""

    def settings(self) -> dict[str, object]:
        """What a checkpoint must agree with, beside the model."""
        return {"guide": type(self).__name__}

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors, by name."""
        raise NotImplementedError

    @declared
    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write the trained tensors to a safetensors file, whole or not at all.

        :param dtype: ``torch.float16`` halves the file.
        """
        save_adapter(path, self.tensors(), self.lm.fingerprint(), self.settings(), dtype)

    @declared
    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what :meth:`save` has written. Nothing changes if it does not fit.

        :raises FileNotFoundError: no such file.
        :raises ValueError: damaged, or of another model, guide or shape; names the difference.
        """
        loaded = load_adapter(path, self.tensors(), self.lm.fingerprint(), self.settings())
        with torch.no_grad():
            for key, tensor in self.tensors().items():
                tensor.copy_(loaded[key])
