"""Guides whose trained arrays are kept in a safetensors file, the same that the guide of the same name has in torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from llmppl.files import guide_file
from llmppl.numpyro.guides.text_guide import TextGuide
from llmppl.text.declared import declared


class SavedGuide(TextGuide):
    """A guide with :meth:`save` and :meth:`load`. A subclass names its arrays."""

    def settings(self) -> dict[str, object]:
        """What a checkpoint must agree with, beside the model."""
        return {"guide": type(self).__name__}

    def tensors(self) -> dict[str, np.ndarray]:
        """The trained arrays, by the names that they have in a file."""
        raise NotImplementedError

    def _load(self, tensors: Mapping[str, Any]) -> None:
        """Take arrays of a file over."""
        raise NotImplementedError

    @declared
    def save(self, path: str | os.PathLike[str], dtype: Any = jnp.float32) -> None:
        """Write the trained arrays to a safetensors file, whole or not at all. The guide of the same name in
        :mod:`llmppl.guides` reads it.

        :param dtype: ``jnp.float16`` halves the file.
        """
        stored = {name: np.asarray(tensor, dtype=dtype) for name, tensor in self.tensors().items()}
        guide_file.write(path, stored, self.lm.fingerprint(), self.settings(), save_file)

    @declared
    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what :meth:`save` has written, here or in torch. Nothing changes if it does not fit.

        :raises FileNotFoundError: no such file.
        :raises ValueError: damaged, or of another model, guide or shape; names the difference.
        """
        shapes = {name: tensor.shape for name, tensor in self.tensors().items()}
        # numpy has no bfloat16; jax reads it.
        tensors = guide_file.read(
            path, shapes, self.lm.fingerprint(), self.settings(), "flax", lambda t: bool(jnp.isfinite(t).all())
        )
        self._load(tensors)
