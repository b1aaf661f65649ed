"""How much memory a training step needs, roughly, and whether there is as much."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch

from llmppl.language_model import LM
from llmppl.network.scoring import HEAD_ROWS, MAX_NODES
from llmppl.programs.structure import Program, structure, text_sites

HIDDEN, INNER = 6, 3
"""Activations that a layer keeps for the backward pass of a token, in hidden and in inner widths: measured on
SmolLM2-135M, and a few per cent more; see docs/scale.md."""


def step_memory(lm: LM, tokens: int) -> int:
    """Bytes that a training step takes beside the model's weights, roughly: activations of all tokens that are scored
    with gradients, or of one chunk of them with gradient checkpointing, and the logits of a block of them."""
    config = lm.transformer.config.get_text_config()
    width = torch.finfo(lm.dtype).bits // 8
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    each = config.num_hidden_layers * (HIDDEN * config.hidden_size + INNER * inner) * width
    kept = min(tokens, MAX_NODES.get(lm.device.type, MAX_NODES["cpu"])) if lm.gradient_checkpointing else tokens
    logits = 3 * min(tokens, HEAD_ROWS) * lm.vocabulary * 4
    return int(kept * each + logits)


def scored_tokens(program: Program, args: tuple[Any, ...], particles: int) -> int:
    """Most tokens that a guide scores in a step: of every latent text, as long as it may be, and what it is told."""
    total = 0
    for site in text_sites(structure(program, args, {})).values():
        rows = math.prod(site["fn"].batch_shape)
        context = site["fn"].context.shape[-1] if hasattr(site["fn"], "context") else 0
        total += rows * (particles * site["fn"].event_shape[0] + context)
    return total


def available_memory(device: torch.device) -> float:
    """Bytes that are free; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)


def warn_where_memory_is_short(program: Program, lm: Any, args: tuple[Any, ...], particles: int) -> None:
    """Say so before a run that would not fit, and what makes it smaller."""
    if not isinstance(lm, LM):
        return
    tokens = scored_tokens(program, args, particles)
    needed, free = step_memory(lm, tokens), available_memory(lm.device)
    if needed > free:
        mends = ["lower num_particles or batch_size, with accumulate= in its place", "load it as dtype=torch.bfloat16"]
        if not lm.gradient_checkpointing:
            mends.insert(0, "set lm.gradient_checkpointing = True")
        warnings.warn(
            f"a step scores up to {tokens} tokens and takes some {needed / 1e9:.1f} GB beside the model's weights; "
            f"{free / 1e9:.1f} GB are free on {lm.device}. To fit it: {'; or '.join(mends)}.",
            stacklevel=3,
        )
