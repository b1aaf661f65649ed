"""What the library asks of a transformer: hidden states of packed tokens, and the logits of states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from llmppl.network.forked_rows import forks
from llmppl.network.windows import FULL, Windows

KeysAndValues = list[tuple[Tensor, Tensor]]
"""Of every layer, each of shape ``(N, heads, P, width)``."""


class Network:
    """A frozen causal transformer, read in packed form where it follows a mask.

    The trunk runs over all tokens, the vocabulary's layer only over the states that are asked for. A
    model that does more to its logits than that layer does (soft caps, scales) is found out by a
    probe, and then run as a whole; one that cannot be packed is read row by row.

    :param transformer: a ``transformers`` causal language model.
    """

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.recomputed: Callable[[], Callable[[], AbstractContextManager[None]]] | None = None
        """Where it is set, passes that record gradients keep no activations and are run again in the backward pass, in
        the block that it gives when they are run first (gradient checkpointing)."""
        self.windows = Windows.of(transformer.config)

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
        return reading_of(self.transformer).splits

    @property
    def packs(self) -> bool:
        """Whether rows that begin alike can be read together; otherwise they are read row by row."""
        return reading_of(self.transformer).packs

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
        :raises ValueError: a network that cannot be packed.
        """
        if not self.packs:
            raise ValueError(
                f"{type(self.transformer).__name__} does not follow a 4-D attention mask with position ids, so that "
                "its tokens cannot be packed, as this guide or method needs. Load a model with rotary or learned "
                "positions, e.g. of the llama, qwen2, qwen3, mistral or gpt2 family, with "
                "attn_implementation='sdpa' or 'eager'."
            ) from reading_of(self.transformer).reason
        return self._kept_or_not(self._run, self.splits, tokens, positions, visible, keep, past, caches)

    def _kept_or_not(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """A forward pass whose activations are kept for the backward pass, or made again there."""
        if self.recomputed is None or not torch.is_grad_enabled():
            return run(*arguments)
        again = self.recomputed()
        return checkpoint(run, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))

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

    def rows(self, rows: Sequence[Sequence[int]], keep: Sequence[tuple[int, int]]) -> Tensor:
        """Run rows of tokens as they are, each by itself: for a network that cannot be packed.

        :param rows: token lists, none empty.
        :param keep: row and place of the states that are wanted.
        :returns: what :meth:`logits` takes, ``(len(keep), V)``.
        """
        found = self._kept_or_not(self._logits, _filled(rows, self.device))
        row, place = torch.tensor(keep, dtype=torch.long, device=self.device).reshape(-1, 2).T
        return found[row, place]

    def _logits(self, tokens: Tensor) -> Tensor:
        return self.transformer(input_ids=tokens, use_cache=False).logits


@dataclass(frozen=True)
class Reading:
    """How a transformer can be read.

    :param packs: tokens of several rows in one, under a 4-D mask with position ids; otherwise row by row.
    :param splits: the logits are those of the vocabulary's layer at the last hidden state.
    :param reason: why it does not pack.
    :param forks: one that does not pack: its own cache can be forked and its rows reordered.
    """

    packs: bool
    splits: bool
    reason: Exception | None = None
    forks: bool = False


_readings: WeakKeyDictionary[nn.Module, Reading] = WeakKeyDictionary()


def reading_of(transformer: nn.Module) -> Reading:
    """How a transformer can be read, found out by a probe, once."""
    if transformer not in _readings:
        training = {module: module.training for module in transformer.modules()}
        transformer.eval()  # with dropout no two passes agree
        try:
            _readings[transformer] = _probe(Network(transformer))
        finally:
            for module, mode in training.items():
                module.training = mode
    return _readings[transformer]


def forget_reading(transformer: nn.Module) -> None:
    """Probe a transformer anew when it is read next: whoever loads it may have changed what it does."""
    _readings.pop(transformer, None)


@torch.no_grad()
def _probe(network: Network) -> Reading:
    """Two rows that begin alike and go on for as long: packed side by side behind the keys and values of what they
    share, against each row alone. Long enough for what only counts beyond a few tokens."""
    transformer, device = network.transformer, network.device
    last = transformer.get_input_embeddings().weight.shape[0] - 1
    size = 8
    root, one, two = ([min(n % (last + 1) if last else 0, last) for n in part] for part in (
        range(size), range(3, 3 + 2 * size, 2), range(5, 5 + 3 * size, 3)))  # fmt: skip
    plain = transformer(input_ids=torch.tensor([root + one, root + two], device=device), use_cache=False).logits[
        :, size:
    ]
    if not bool(plain.isfinite().all()):
        return Reading(True, True)  # whoever reads the log-probabilities names the site
    tolerance = (float(plain.abs().max()) + 1.0) * (0.05 if plain.dtype in (torch.bfloat16, torch.float16) else 1e-4)
    causal, places = torch.ones(2 * size, 2 * size).tril() > 0, list(range(2 * size))
    # Each branch sees the root and itself.
    own = torch.block_diag(*[torch.ones(size, size).tril()] * 2) > 0
    visible = torch.cat([torch.ones(2 * size, size) > 0, own], -1)
    try:
        _, past = network._run(False, root, places[:size], causal[:size, :size], [size - 1], None, True)
        packed, _ = network._run(False, one + two, places[size:] * 2, visible, places, past, True)
        agrees = bool(torch.allclose(packed.unflatten(0, (2, size)), plain, rtol=0, atol=tolerance))
        reason: Exception | None = None
    except Exception as error:  # whatever a cache or a mask raises, this network is not to be packed
        agrees, reason = False, error
    if not agrees:
        return Reading(False, False, reason, forks(transformer, tolerance))
    head = transformer.get_output_embeddings()
    if not isinstance(head, nn.Module):
        return Reading(True, False)
    try:
        states, _ = network._run(True, root + one, places, causal, places[size:], None, False)
    except (AttributeError, TypeError):
        return Reading(True, False)  # the trunk takes other arguments, or returns something else
    logits = head(states)
    same = logits.shape == plain[0].shape and torch.allclose(logits, plain[0], rtol=0, atol=tolerance * 1e-1)
    return Reading(True, bool(same))


def _filled(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of one length. Behind its end a row repeats its last token, which nothing before it sees."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows], device=device)


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
