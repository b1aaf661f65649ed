"""A function of strings and numbers over the rows of tensors: what :meth:`llmppl.LM.map` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor

from llmppl.network.text_tensors import check_text
from llmppl.text.marks import Marks
from llmppl.text.row_function import Column, Kind, constant_column, number_column, result_kind, run_rows, text_column
from llmppl.text.spelling import Spelling

_decoders = Marks()


def map_rows(
    spelling: Spelling,
    decode: Callable[[Any], str],
    device: torch.device,
    function: Callable[..., Any],
    values: Sequence[Any],
    max_tokens: int | None,
    returns: Kind | None,
) -> Tensor:
    """The results of :meth:`llmppl.LM.map`.

    :param decode: of one text's ids, for whoever shows a text made here.
    """
    kind = result_kind(function, values, max_tokens, returns)
    columns = [_column(detach_provenance(value), n, spelling) for n, value in enumerate(values)]
    found = torch.from_numpy(run_rows(function, columns, spelling.ids, kind, max_tokens)).to(device)
    if found.dtype == torch.float64:
        found = found.to(torch.get_default_dtype())
    # Pyro's TraceGraph_ELBO finds by it which sites depend on which.
    result = track_provenance(found, get_provenance(list(values)))
    if found.dtype == torch.long:
        _decoders.put(result, decode)
    return result


def decoder_of(value: Any) -> Callable[[Any], str] | None:
    """The strings of a text that :meth:`llmppl.LM.map` made, this very tensor and no view of it; else ``None``."""
    return _decoders.get(value)


def _column(value: Any, number: int, spelling: Spelling) -> Column:
    if not isinstance(value, Tensor):
        return constant_column(value, number, "tensor")
    name = f"value {number} of lm.map"
    value = value.detach()
    if value.dtype == torch.long:
        if not value.dim():
            raise ValueError(
                f"{name} is an int64 tensor without dimensions, and int64 is a text, of shape batch_shape + (T,). Pass "
                "a number as int(value), value.int() or value.float()."
            )
        return text_column(check_text(value, name, spelling.vocabulary).cpu().numpy(), spelling.codec.decode)
    if value.dtype in (torch.bfloat16, torch.float16):
        value = value.float()
    if value.is_complex():
        raise TypeError(f"{name} holds complex numbers. Pass floats, integers or booleans.")
    return number_column(value.cpu().numpy(), name)
