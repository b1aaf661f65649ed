"""An autoregressive guide read as a GFlowNet policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmppl.distributions.parameter_store import register_module
from llmppl.guides.autoregressive import AutoregressiveGuide
from llmppl.guides.text_guide import Others, Prompt
from llmppl.language_model import LM
from llmppl.network.text_tensors import pad_rows, unpad_rows
from llmppl.programs.structure import Program, structure, text_sites
from llmppl.text.declared import declared


class GFlowNetGuide(AutoregressiveGuide):
    r"""An :class:`AutoregressiveGuide` whose texts are trajectories of a GFlowNet (Hu et al. 2024).

    Appending a token is an action, a stop token ends the trajectory, and the terminal reward is the
    program's joint. It adds :math:`\log Z_\theta(x)`, which ``TrajectoryBalance(log_partition="learned")``
    trains beside the policy: a linear head on the prior network's last hidden state of the prompt,
    averaged over its tokens. All other parameters as in :class:`AutoregressiveGuide`.
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
        sampling_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, lm, prompt, others, rank, alpha, target_modules, adapter, seed, sampling_dtype)
        width = lm.transformer.config.hidden_size
        self.head = nn.Linear(width, 1, device=lm.device, dtype=torch.promote_types(lm.dtype, torch.float32))
        self._reset_head()

    def _reset_head(self) -> None:
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_head()

    def register(self) -> None:
        super().register()
        register_module(f"{self.adapter}_log_partition", self.head)

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **{f"log_partition.{k}": v for k, v in self.head.state_dict().items()}}

    def log_partition(self, *args: Any, **kwargs: Any) -> Tensor:
        """log Z_θ(x) in nats for the program's arguments, one for each row of the first latent text."""
        prompts = next(iter(text_sites(structure(self, args, kwargs)).values()))["fn"].context
        rows = unpad_rows(prompts.reshape(-1, prompts.shape[-1]))
        tokens = pad_rows(rows, device=self.lm.device)
        seen = tokens >= 0
        with self.lm.using(None), torch.no_grad():
            network = self.lm.transformer.base_model
            states = network(input_ids=tokens.clamp(min=0), attention_mask=seen.long()).last_hidden_state
        # Scaled by the width, as attention is: the head then learns at one rate for every model.
        mean = (states * seen[..., None]).sum(1) / seen.sum(1, keepdim=True) / states.shape[-1] ** 0.5
        return self.head(mean.to(self.head.weight.dtype))[:, 0].reshape(prompts.shape[:-1])
