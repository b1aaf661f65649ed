"""An autoregressive guide read as a GFlowNet policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array

from llmppl.numpyro.guides.adapter_guide import _taken
from llmppl.numpyro.guides.autoregressive import AutoregressiveGuide
from llmppl.numpyro.guides.text_guide import Others, Prompt
from llmppl.numpyro.language_model import LM
from llmppl.numpyro.network.reading import Reader
from llmppl.numpyro.programs.tracing import Program, structure, text_sites
from llmppl.text.declared import declared


class GFlowNetGuide(AutoregressiveGuide):
    r"""An :class:`AutoregressiveGuide` whose texts are trajectories of a GFlowNet (Hu et al. 2024).

    Appending a token is an action, a stop token ends the trajectory, and the terminal reward is the program's joint. It
    adds :math:`\log Z_\theta(x)`, which ``TrajectoryBalance(log_partition="learned")`` trains beside the policy: a
    linear head on the prior network's last hidden state of the prompt, averaged over its tokens. All other parameters
    as in :class:`AutoregressiveGuide`.

    The head's parameters are the site ``f"{guide.adapter}_log_partition$params"``; they want a larger learning rate
    (:func:`llmppl.numpyro.objectives.optimizer`).
    """

    @declared
    def __init__(
        self,
        model: Program,
        lm: LM,
        prompt: Mapping[str, Prompt] | None = None,
        others: Others | None = None,
        rank: int = 16,
        alpha: float | None = None,
        target_modules: list[str] | None = None,
        adapter: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, lm, prompt, others, rank, alpha, target_modules, adapter, seed)
        self.head = self._new_head()

    def _new_head(self) -> dict[str, Array]:
        width = self.lm.architecture.hidden
        return {"weight": jnp.zeros((1, width), self._precision), "bias": jnp.zeros(1, self._precision)}

    def reset_parameters(self, seed: int | None = None) -> None:
        super().reset_parameters(seed)
        self.head = self._new_head()

    def register(self) -> GFlowNetGuide:
        registered = super().register()
        assert isinstance(registered, GFlowNetGuide)
        registered.head = self._registered_head()
        return registered

    def _registered_head(self) -> dict[str, Array]:
        return dict(numpyro.param(f"{self.adapter}_log_partition$params", self.head))

    def update(self, params: Mapping[str, Any]) -> None:
        name = f"{self.adapter}_log_partition$params"
        head = _taken(params, name, self.head)
        super().update({key: value for key, value in params.items() if key != name})
        self.head = head

    def parameters(self) -> dict[str, Any]:
        return {**super().parameters(), f"{self.adapter}_log_partition$params": self.head}

    def tensors(self) -> dict[str, np.ndarray]:
        return {**super().tensors(), **{f"log_partition.{k}": np.asarray(v) for k, v in self.head.items()}}

    def _load(self, tensors: Mapping[str, Any]) -> None:
        super()._load(tensors)
        self.head = {k: jnp.asarray(tensors[f"log_partition.{k}"], v.dtype) for k, v in self.head.items()}

    def log_partition(self, *args: Any, **kwargs: Any) -> Array:
        """log Z_θ(x) in nats for the program's arguments, one for each row of the first latent text."""
        proposal = next(iter(text_sites(structure(self, args, kwargs)).values()))["fn"]
        readings = Reader(self.lm.architecture, self.lm.weights).stretches(proposal.context)
        total: Any = 0.0
        count: Any = 0
        for reading in readings:
            seen = reading.past.seen[..., None]
            total = total + jnp.where(seen, reading.states, 0).sum(-2)
            count = count + seen.sum(-2)
        # Scaled by the width, as attention is: the head then learns at one rate for every model.
        mean = total / count / self.lm.architecture.hidden**0.5
        head = self._registered_head()
        log_z = mean.astype(head["weight"].dtype) @ head["weight"][0] + head["bias"][0]
        return jnp.broadcast_to(log_z, proposal.batch_shape)
