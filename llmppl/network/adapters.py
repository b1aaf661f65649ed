"""Adapters on one transformer, of LoRA layers and virtual tokens: added, switched on for a block, saved."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmppl.text.arguments import check_endings

_numbers = itertools.count()

MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Model types of the Mamba family."""


class Adapters:
    """The named adapters of a transformer. All are off but inside :meth:`active`.

    :param transformer: its linear layers are wrapped in place when the first adapter is added.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._made: dict[str, tuple[int, float, list[str] | None]] = {}
        self._active: str | None = None
        self._layers: list[Any] = []
        self._virtual: VirtualTokens | None = None
        self._dropping: str | None = None

    @property
    def names(self) -> list[str]:
        return list(self._parameters)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters by their place in the transformer, without the adapter's name."""
        return self._parameters[name]

    def add(self, name: str, rank: int, alpha: float, target_modules: list[str] | None = None) -> None:
        """Add a LoRA adapter (Hu et al. 2022). It starts as the identity.

        :param target_modules: name endings of the layers to adapt; every linear one but the head by default.
        :raises TypeError, ValueError: no list of endings; an ending of no layer.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._check_new(name)
        if target_modules is not None:
            check_endings(target_modules)
            known = [key.replace(".base_layer", "") for key, _ in self.transformer.named_modules()]
            for ending in target_modules:
                if not any(f".{key}".endswith(f".{ending}") for key in known):
                    raise ValueError(
                        f"target_modules names {ending!r}, which is the end of no layer of the model; its linear "
                        f"layers end in {sorted({key.rsplit('.', 1)[-1] for key in self._linear_layers()})}."
                    )
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules=target_modules or self._linear_layers(),
            bias="none",
        )
        with warnings.catch_warnings():
            # Several adapters on one model are what this class is for.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, self.transformer, adapter_name=name)
        self._made[name] = (rank, alpha, target_modules)
        # A forward pass in training mode would switch dropout on, were there any.
        self.transformer.eval()
        self._parameters[name] = {
            key.replace(f".{name}.", "."): parameter
            for key, parameter in self.transformer.named_parameters()
            if "lora_" in key and f".{name}." in key
        }
        # Small steps are lost in half precision, and peft takes that of the layers.
        for parameter in self._parameters[name].values():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        # Looked up once: a walk over all modules at every switch takes longer than the switch.
        self._layers = [m for m in self.transformer.modules() if isinstance(m, BaseTunerLayer)]
        self._switch(None)

    def add_virtual_tokens(self, name: str, embeddings: Tensor) -> range:
        """Give an adapter, a new one or one of :meth:`add`, tokens of its own, with learned embeddings.

        :param embeddings: to start from, ``(count, width)``.
        :returns: their ids, behind those of the model's own tokens. Only while the adapter is on may a
            context hold them.
        """
        if name in self._parameters:
            if "virtual_tokens" in self._parameters[name]:
                raise ValueError(f"adapter={name!r} has virtual tokens already. Choose another name.")
        else:
            self._check_new(name)
        if self._virtual is None:
            self._virtual = VirtualTokens(self.transformer)
        learned = nn.Parameter(embeddings.detach().clone())
        self._parameters.setdefault(name, {})["virtual_tokens"] = learned
        first = self._virtual.first
        return range(first, first + len(learned))

    def free_name(self, stem: str) -> str:
        """A name that no adapter has yet, here or on another model of this process: Pyro's store is one for all."""
        return next(name for n in _numbers if (name := f"{stem}_{n}") not in self._parameters)

    def made(self, name: str) -> tuple[int, float, list[str] | None]:
        """Rank, scale and layers that :meth:`add` was called with."""
        return self._made[name]

    def _check_new(self, name: str) -> None:
        if name in self._parameters:
            raise ValueError(f"adapter={name!r} exists on this model already. Choose another name.")
        if "." in name or not name:
            raise ValueError(f"adapter={name!r} must be a non-empty name without dots.")

    def _linear_layers(self) -> list[str]:
        from peft.tuners.lora import LoraLayer
        from transformers.pytorch_utils import Conv1D

        transformer: Any = self.transformer
        head = transformer.get_output_embeddings()
        linear, others = [], set()
        for key, module in self.transformer.named_modules():
            layer: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
            key = key.removesuffix(".base_layer")
            if "lora_" in key:
                continue
            if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head:
                linear.append(key)
            else:
                others.add(key.rsplit(".", 1)[-1])
        # A name that stands for something else, too, as the number in a sequence of layers, is given in full.
        found = {ending if (ending := key.rsplit(".", 1)[-1]) not in others else key for key in linear}
        # The kernels of these architectures read that layer's weight themselves, past any adapter, and PEFT refuses it.
        if transformer.config.model_type in MAMBA:
            found -= {"out_proj"}
        return sorted(found)

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Switch to one adapter, or to none, for a block."""
        if name is not None and name not in self._parameters:
            raise KeyError(f"no adapter {name!r} on this model; it has {self.names}.")
        before = self._active
        if name == before:
            yield
            return
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def as_now(self) -> Callable[[], AbstractContextManager[None]]:
        """Blocks in which the adapter that is on now is on again: in a backward pass, say."""
        name = self._active
        return lambda: self.active(name)

    def lora_layers(self, name: str) -> list[Any]:
        """The layers that an adapter adapts."""
        return [layer for layer in self._layers if name in getattr(layer, "lora_A", ())]

    @contextmanager
    def dropping(self, name: str, probability: float) -> Iterator[None]:
        """Dropout on what an adapter's LoRA layers read (``lora_dropout`` of ``peft``), for a block, and there in
        passes that record gradients only: texts are drawn, and scored without gradients, as ever."""
        layers = self.lora_layers(name)
        before = [layer.lora_dropout[name] for layer in layers]
        self._dropping = name
        try:
            for layer in layers:
                layer.lora_dropout[name] = GradientDropout(probability)
            yield
        finally:
            for layer, module in zip(layers, before, strict=True):
                layer.lora_dropout[name] = module
            self._dropping = None

    def drops(self, name: str | None) -> bool:
        """Whether an adapter is another law in a pass with gradients than in one without."""
        return name is not None and name == self._dropping

    def _switch(self, name: str | None) -> None:
        trains = [(p, p.requires_grad) for group in self._parameters.values() for p in group.values()]
        for layer in self._layers:
            own = name is not None and name in layer.lora_A
            layer.enable_adapters(own)
            if own and layer.active_adapters != [name]:
                layer.set_adapter(name)
        if self._virtual is not None:
            self._virtual.embeddings = None if name is None else self._parameters[name].get("virtual_tokens")
        # peft freezes what it switches off, and a graph built while it was on needs it trainable still; it lets learn
        # what it switches on, which may be frozen.
        for parameter, before in trains:
            parameter.requires_grad_(before)
        self._active = name

    def reset(self, name: str) -> None:
        """Start an adapter's LoRA layers anew: the identity, with other random numbers from torch's generator."""
        for layer in self.lora_layers(name):
            layer.reset_lora_parameters(name, init_lora_weights=True)

    @torch.no_grad()
    def load(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Copy tensors, keyed as in :meth:`parameters`, into an adapter."""
        for key, parameter in self._parameters[name].items():
            parameter.copy_(tensors[key])

    # --- copies ------------------------------------------------------------------------------------

    def duplicate(self, name: str) -> str:
        """Another adapter with the values of one; its name."""
        return self.restore(name, self.state(name))

    def state(self, name: str) -> dict[str, Any]:
        """What :meth:`restore` makes an adapter from, in plain tensors and numbers."""
        tensors = {key: parameter.detach().clone() for key, parameter in self._parameters[name].items()}
        return {
            "made": self._made.get(name),
            "tensors": tensors,
            "trained": {key: parameter.requires_grad for key, parameter in self._parameters[name].items()},
        }

    def restore(self, name: str, state: dict[str, Any]) -> str:
        """Add an adapter with the values of a :meth:`state`, under a name that is free here; returns that name."""
        free = next(new for n in itertools.count() if (new := f"{name}_copy{n}" if n else name) not in self._parameters)
        tensors = state["tensors"]
        with torch.random.fork_rng(devices=[]):  # its initial values are not kept
            if state["made"] is not None:
                self.add(free, *state["made"])
        if "virtual_tokens" in tensors:
            self.add_virtual_tokens(free, tensors["virtual_tokens"])
        self.load(free, tensors)
        for key, parameter in self._parameters[free].items():
            parameter.requires_grad_(state["trained"][key])
        return free


class GradientDropout(nn.Module):
    """Dropout where gradients are recorded, whatever the module's mode."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.dropout(states, self.probability, training=torch.is_grad_enabled())


class VirtualTokens:
    """Ids behind the vocabulary whose embeddings are an adapter's own.

    Whatever reads token ids then reads virtual tokens, too: caches, packed prefixes, batches.

    :param transformer: its input embedding gets two hooks, which do nothing while no adapter with virtual
        tokens is on.
    """

    def __init__(self, transformer: Any) -> None:
        embedding = transformer.get_input_embeddings()
        self.first: int = embedding.weight.shape[0]
        self.embeddings: Tensor | None = None
        self._found: Tensor | None = None
        embedding.register_forward_pre_hook(self._hide)
        embedding.register_forward_hook(self._embed)

    def _hide(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self._found = None
        if self.embeddings is None:
            return None
        tokens = arguments[0]
        if not bool((tokens >= self.first).any()):
            return None
        self._found = tokens - self.first
        return (tokens.masked_fill(tokens >= self.first, 0), *arguments[1:])

    def _embed(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        found, embeddings = self._found, self.embeddings
        if found is None or embeddings is None:
            return None
        self._found = None
        own = embeddings[found.clamp(min=0)].to(output.dtype)
        return torch.where((found >= 0)[..., None], own, output)
