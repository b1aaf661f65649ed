"""What the library asks of a transformer: hidden states of packed tokens, and the logits of states."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from llmppl.network.windows import FULL, Windows

KeysAndValues = list[tuple[Tensor, Tensor]]
"""Of every layer, each of shape ``(N, heads, P, width)``."""


class Network:
    """A frozen causal transformer, read in packed form.

    The trunk runs over all tokens, the vocabulary's layer only over the states that are asked for. A
    model that does more to its logits than that layer does (soft caps, scales) is found out by a
    probe, and then run as a whole.

    :param transformer: a ``transformers`` causal language model.
    """

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.windows = Windows.of(transformer.config)
        self._probed: bool | None = None

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the log-probabilities."""
        return torch.promote_types(next(self.transformer.parameters()).dtype, torch.float32)

    @property
    def splits(self) -> bool:
        """Whether the logits are those of the vocabulary's layer at the last hidden state."""
        if self._probed is None:
            self._probed = self._probe()
        return self._probed

    def states(
        self,
        tokens: list[int],
        positions: list[int],
        visible: Tensor,
        keep: list[int],
        past: KeysAndValues | None = None,
        caches: bool = False,
    ) -> tuple[Tensor, KeysAndValues | None]:
        """Run ``M`` packed tokens through the network.

        :param positions: of each token in its own row.
        :param visible: which keys each token sees, a boolean ``(M, P + M)``: those of ``past`` first.
        :param keep: the tokens whose states are wanted.
        :param past: keys and values of ``P`` tokens that were run before.
        :param caches: whether to return the keys and values of all ``P + M`` tokens.
        :returns: what :meth:`logits` takes, ``(len(keep), ...)``, and the keys and values.
        """
        splits = self.splits
        return self._run(splits, tokens, positions, visible, keep, past, caches)

    def logits(self, states: Tensor) -> Tensor:
        """The logits ``(N, V)`` of ``N`` states."""
        return self.transformer.get_output_embeddings()(states) if self.splits else states

    def _run(
        self,
        splits: bool,
        tokens: list[int],
        positions: list[int],
        visible: Tensor,
        keep: list[int],
        past: KeysAndValues | None,
        caches: bool,
    ) -> tuple[Tensor, KeysAndValues | None]:
        device = self.device
        whole, keywords = not splits, dict[str, Any]()
        kept = torch.tensor(keep, dtype=torch.long, device=device)
        if whole and "logits_to_keep" in inspect.signature(self.transformer.forward).parameters:
            keywords["logits_to_keep"] = kept
        found, keys = attend(
            self.transformer if whole else self.transformer.base_model,
            torch.tensor([tokens], device=device),
            torch.tensor([positions], device=device),
            visible[None, None].to(device),
            past or [],
            caches,
            self.windows,
            **keywords,
        )
        states = found.logits[0] if whole else found.last_hidden_state[0]
        return states if keywords else states[kept], keys if caches else None

    @torch.no_grad()
    def _probe(self) -> bool:
        """Whether trunk and vocabulary layer make the whole; refuses a network that packs wrongly.

        :raises ValueError: the architecture does not follow a 4-D mask with position ids.
        """
        last = self.transformer.get_input_embeddings().weight.shape[0] - 1
        first, second, third = 0, min(1, last), min(2, last)
        plain = self.transformer(input_ids=torch.tensor([[first, third]], device=self.device)).logits[0, -1]
        if not bool(plain.isfinite().all()):
            return True  # whoever reads the log-probabilities names the site
        tolerance = (float(plain.abs().max()) + 1.0) * (0.1 if plain.dtype in (torch.bfloat16, torch.float16) else 1e-3)
        # Two branches from one token, the second run after the first with the root's keys and values.
        root, branches = torch.tensor([[True, False], [True, True]]), torch.tensor([[1, 1, 0], [1, 0, 1]]) > 0
        reason: Exception | None = None
        try:
            _, past = self._run(False, [first, second], [0, 1], root, [1], None, True)
            past = [(keys[..., :1, :], values[..., :1, :]) for keys, values in past or []]
            packed, _ = self._run(False, [second, third], [1, 1], branches, [1], past, True)
            agrees = torch.allclose(packed[0], plain, rtol=0, atol=tolerance)
        except (TypeError, ValueError, RuntimeError) as error:
            agrees, reason = False, error
        if not agrees:
            raise ValueError(
                f"{type(self.transformer).__name__} does not follow a 4-D attention mask with position ids, so that "
                "prefixes cannot be shared. Load a model with rotary or learned positions, e.g. of the llama, qwen2, "
                "qwen3, mistral or gpt2 family, with attn_implementation='sdpa' or 'eager'."
            ) from reason
        head = self.transformer.get_output_embeddings()
        if not isinstance(head, nn.Module):
            return False
        try:
            states, _ = self._run(True, [first, third], [0, 1], torch.ones(2, 2).tril() > 0, [1], None, False)
        except (AttributeError, TypeError):
            return False  # the trunk takes other arguments, or returns something else
        logits = head(states)[0]
        return logits.shape == plain.shape and torch.allclose(logits, plain, rtol=0, atol=tolerance * 1e-2)


def attend(
    module: nn.Module,
    tokens: Tensor,
    positions: Tensor,
    visible: Tensor,
    past: KeysAndValues,
    caches: bool,
    windows: Windows | None = None,
    **keywords: Any,
) -> tuple[Any, KeysAndValues]:
    """Run ``(N, M)`` tokens under any attention.

    :param module: a transformer, or its trunk.
    :param visible: which keys each token sees, boolean ``(N, 1, M, P + M)``: those of ``past`` first.
    :param caches: whether to return the keys and values of all ``P + M`` tokens.
    :param windows: what the layers see of it; all by default. Tokens of ``past`` then stand at places 0 to ``P - 1``.
    :param keywords: further arguments of the module.
    :returns: what the module returns, and the keys and values, each ``(N, heads, P + M, width)``.
    """
    dtype = next(module.parameters()).dtype
    before = torch.arange(visible.shape[-1] - tokens.shape[-1], device=positions.device).expand(len(positions), -1)
    keys_at = torch.cat([before, positions], -1)
    mask = (windows or Windows({FULL: ("full", 0)})).masks(visible, positions, keys_at, dtype)
    # Without a configuration every layer keeps all it is given, which the mask counts on.
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)
    used = bool(past) or caches
    found = module(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache if used else None,
        use_cache=used,
        **keywords,
    )
    return found, [(layer.keys, layer.values) for layer in cache.layers] if caches else []
