"""Which loaded models are served: those whose numbers and adapters can be vouched for."""

from __future__ import annotations

from typing import Any


def check_servable(model: Any) -> None:
    """Refuse a model that is compiled, quantised, or spread over devices.

    :raises ValueError: naming what it is and the mend.
    """
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
