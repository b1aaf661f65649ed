"""What a language model says of one text alone, by a plain forward pass: the yardstick of all reading."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch

from llmppl import LM
from llmppl.guides import AutoregressiveGuide


def alone(lm: LM, context: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """log p of each token of one text after one context."""
    ids = torch.cat([context, text])[None]
    log_probs = lm.transformer(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    at = torch.arange(len(context) - 1, ids.shape[1] - 1)
    return log_probs[at, ids[0, at + 1]]


@torch.no_grad()
def drawn_alone(lm: LM, contexts: Sequence[torch.Tensor], drawn: torch.Tensor) -> torch.Tensor:
    """log p of texts ``(K, N, T)`` after ``N`` contexts, each by a pass of its own, ``(K, N)``."""
    return torch.stack(
        [torch.stack([alone(lm, c, t[t >= 0]).sum() for c, t in zip(contexts, row, strict=True)]) for row in drawn]
    )


def adapter_gradients(lm: LM, context: torch.Tensor, texts: torch.Tensor) -> list[torch.Tensor]:
    """Of the summed log p of texts ``(N, T)`` by a guide's adapter: ours, and by passes of each text alone."""

    def program() -> None:
        pyro.sample("z", lm(context, max_tokens=texts.shape[-1]))

    guide = AutoregressiveGuide(program, lm, prompt={"z": lambda: [context]}, rank=2, seed=0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    gradients = []
    for own in (True, False):
        guide.zero_grad()
        if own:
            law = lm(context, max_tokens=texts.shape[-1]).with_context(context, guide.adapter)
            law.log_prob(texts).sum().backward()
        else:
            with lm.using(guide.adapter):
                torch.stack([alone(lm, context, text).sum() for text in texts]).sum().backward()
        # Layers that no token came to have none.
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in guide.parameters()]
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return gradients
