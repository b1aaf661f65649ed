"""A language model that can be had again with parameters of its own."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import nn

from llmppl.distributions.parameter_store import register_where_traced
from llmppl.network.adapters import Adapters
from llmppl.network.guide_tensors import load_adapter, save_adapter
from llmppl.text.declared import declared


class Adaptable:
    """What :class:`llmppl.LM` has so that a program can be learned: the same model under an adapter of its own.

    The model itself has no parameters, and what is said here of parameters then is of none.
    """

    adapters: Adapters
    adapter: str | None = None
    """The adapter that is on in this model's distributions; ``None`` of the model itself."""
    weights: nn.ParameterDict | None = None
    """The adapter's parameters."""
    _unadapted: Any = None

    @property
    def base(self) -> Self:
        """The model itself, of which this is an adapted one; of an unadapted one this."""
        return self if self._unadapted is None else self._unadapted

    @declared
    def adapt(
        self,
        rank: int = 16,
        alpha: float | None = None,
        target_modules: list[str] | None = None,
        adapter: str | None = None,
        seed: int | None = None,
    ) -> Self:
        """The same model under a LoRA adapter of its own (Hu et al. 2022): a prior with parameters.

        It is used as this one is, shares its transformer, and starts as the same law. Programs that take it learn:
        the objectives train it by the M-step of EM (wake-θ, Bornschein & Bengio 2015) while the guide takes the E-step,
        and so do Pyro's own ``SVI`` and ELBOs. What takes this model itself stays as it is.

        :param rank: rank of the adapter's matrices.
        :param alpha: their scale; ``2 * rank`` by default.
        :param target_modules: name endings of the layers to adapt; all linear layers but the head by default.
        :param adapter: name of the adapter on the model, and of its parameters in Pyro's store; made up by default.
        :param seed: of the adapter's initial weights; drawn from torch's generator by default.
        :raises ValueError: a rank below 1; a name that is taken; this model is an adapted one itself.

        Example::

            theta = lm.adapt(rank=8)
            program = rationale(theta, options=[" yes", " no"])
            fit(program, GFlowNetGuide(program, lm), data, TrajectoryBalance(8), steps=100, model_learning_rate=1e-4)
        """
        if self.adapter is not None:
            raise ValueError(f"this language model is adapted already, by {self.adapter!r}. Adapt lm.base.")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}.")
        name = adapter or self.adapters.free_name("prior")
        scale = float(2 * rank if alpha is None else alpha)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.adapters.add(name, rank, scale, target_modules)
        return self._under(name)

    def _under(self, adapter: str) -> Self:
        """This model under one of its adapters."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._unadapted, twin.adapter = self, adapter
        twin.weights = nn.ParameterDict(
            {key.replace(".", "/"): p for key, p in self.adapters.parameters(adapter).items()}
        )
        return twin

    def _copied(self, memo: dict[int, Any]) -> Self:
        """An adapted model's deep copy: that of the model itself, under the same adapter."""
        assert self.adapter is not None
        twin = copy.deepcopy(self.base, memo)._under(self.adapter)
        memo[id(self)] = twin
        return twin

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, for an optimizer of torch."""
        return iter(()) if self.weights is None else self.weights.parameters()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let the parameters learn, or freeze them. Returns the model."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def register(self) -> None:
        """Make the parameters known to Pyro's parameter store, as every call of the model does."""
        if self.adapter is not None and self.weights is not None:
            register_where_traced(self.adapter, self.weights)

    @declared
    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write the parameters to a safetensors file, whole or not at all.

        :param dtype: ``torch.float16`` halves the file.
        :raises ValueError: a model without parameters.
        """
        save_adapter(path, self._tensors("save"), self._fingerprint(), self._settings(), dtype)

    @declared
    def load(self, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` has written; returns the model. Nothing changes if it does not fit.

        :raises FileNotFoundError: no such file.
        :raises ValueError: damaged, or of another model, rank or shape; a model without parameters.
        """
        own = self._tensors("load")
        loaded = load_adapter(path, own, self._fingerprint(), self._settings())
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(loaded[key])
        return self

    def _tensors(self, what: str) -> dict[str, nn.Parameter]:
        if self.adapter is None:
            raise ValueError(f"a language model without parameters has nothing to {what}. lm.adapt(rank=8) has some.")
        return self.adapters.parameters(self.adapter)

    def _settings(self) -> dict[str, object]:
        assert self.adapter is not None
        rank, alpha, _ = self.adapters.made(self.adapter)
        return {"guide": "LM.adapt", "rank": rank, "alpha": alpha}

    def _fingerprint(self) -> dict[str, Any]:
        return self.fingerprint()  # type: ignore[attr-defined]
