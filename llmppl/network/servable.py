"""Which models are served: those that can be had, and whose numbers and adapters can be vouched for."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies


def check_servable(model: Any) -> None:
    """Refuse a model that is compiled, quantised, or spread over devices.

    :raises TypeError: no model of transformers.
    :raises ValueError: naming what it is and the mend.
    """
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise TypeError(
            f"model must be a causal language model of transformers, got a {type(model).__name__}. Load one by its "
            "name or folder: LM.from_pretrained(...)."
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "model is compiled by torch.compile, which compiles anew for each shape of packed texts and cannot take "
            "adapters. Pass the model as it was before: model._orig_mod, or one that model.compile() was not called on."
        )
    check_config(model.config)
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1 or devices & {"disk", "meta"}:
        raise ValueError(
            f"model is spread over {', '.join(sorted(devices))} by device_map=, and texts, masks and adapters have one "
            "device. Load it on one: LM.from_pretrained(name, device='cuda:0'), in bfloat16 if it does not fit."
        )


def check_config(config: Any) -> None:
    """Refuse a quantised checkpoint.

    :raises ValueError: naming its method.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    raise ValueError(
        f"model is quantised ({getattr(method, 'value', method) or 'by a method of its own'}): its log-probabilities "
        "are those of another model, and adapters are not trained through its layers. Load the checkpoint that it was "
        "made from, in bfloat16 if memory is short."
    )


def check_reachable(name: str) -> None:
    """Refuse a name of the hub at once where there is no way to the hub and no copy in its cache: its client would try
    again for half a minute.

    :raises FileNotFoundError: with the mend.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if constants.HF_HUB_OFFLINE or Path(name).is_dir() or getproxies():
        return
    try:
        known = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return  # no name of the hub, as transformers will say
    host = urlsplit(constants.ENDPOINT).hostname or "huggingface.co"
    try:
        if not known:
            socket.getaddrinfo(host, 443)
    except OSError as error:
        raise FileNotFoundError(
            f"name_or_folder={name!r} is no folder here, the hub's cache has no copy of it, and {host} cannot be "
            f"reached ({error}). Pass a folder made by save_pretrained, or the packaged 'smollm2-135m'."
        ) from error
