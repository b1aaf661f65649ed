"""Text as tensors: token ids, then padding.

A text value is a ``LongTensor`` of shape ``batch_shape + (T,)``: token ids, then :data:`PAD` after
the end. ``PAD`` lies outside every vocabulary, so that no tokenizer's own pad or end token can be
confused with it. Only :mod:`llmppl.text.padding` knows the number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmppl.network.embedded import Embedded
from llmppl.text import PAD
from llmppl.text.spelling import unbroadcastable

Piece = str | Sequence[str] | Tensor | Embedded


def lengths(value: Tensor) -> Tensor:
    """Number of tokens of each text, of shape ``value.shape[:-1]``."""
    return (value != PAD).sum(-1)


def is_right_padded(value: Tensor) -> Tensor:
    """Whether no token follows a padding, of shape ``value.shape[:-1]``."""
    pad = value == PAD
    return ~(pad[..., :-1] & ~pad[..., 1:]).any(-1)


def pad_rows(rows: Sequence[Sequence[int]], width: int | None = None, device: object = None) -> Tensor:
    """Stack token lists into a text tensor of shape ``(len(rows), width)``."""
    width = max((len(row) for row in rows), default=0) if width is None else width
    return torch.tensor(
        [list(row) + [PAD] * (width - len(row)) for row in rows],
        dtype=torch.long,
        device=device,  # type: ignore[arg-type]
    ).reshape(len(rows), width)


def unpad_rows(value: Tensor) -> list[list[int]]:
    """The token lists of a ``(N, T)`` tensor; padding is dropped wherever it stands."""
    return [[token for token in row if token != PAD] for row in value.tolist()]


def pad_scores(rows: Sequence[Tensor], width: int) -> Tensor:
    """Stack scores of single texts, zero behind the end: ``(len(rows), width)``."""
    table = rows[0].new_zeros(len(rows), width)
    for n, row in enumerate(rows):
        table[n, : len(row)] = row
    return table


def widen(value: Tensor, width: int) -> Tensor:
    """Pad the last dimension on the right up to ``width`` tokens."""
    missing = width - value.shape[-1]
    return torch.nn.functional.pad(value, (0, missing), value=PAD) if missing > 0 else value


def left_aligned(value: Tensor) -> Tensor:
    """Tokens first, padding last, the order of the tokens kept: a text tensor again."""
    order = (value == PAD).long().argsort(dim=-1, stable=True)
    return value.gather(-1, order)


def check_text(value: object, name: str, vocabulary: int) -> Tensor:
    """Return ``value`` if it is a well-formed text tensor, or say what is wrong with ``name``.

    :raises TypeError: not an integer tensor.
    :raises ValueError: ids outside the vocabulary, or padding before a token.
    """
    if isinstance(value, str) or (isinstance(value, (list, tuple)) and value and isinstance(value[0], str)):
        raise TypeError(
            f"{name} is a string, {value!r}; a text tensor belongs here. "
            "Pass lm.encode(text) instead: traces hold tensors only."
        )
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a text tensor (LongTensor of token ids), got {type(value).__name__}. Pass lm.encode(text)."
        )
    if value.dtype not in (torch.long, torch.int, torch.int16, torch.int32):
        raise TypeError(
            f"{name} must hold integer token ids, got dtype {value.dtype}. "
            "Pass lm.encode(text), or convert the ids with .long()."
        )
    if value.dim() == 0:
        raise ValueError(
            f"{name} must have a token dimension, batch_shape + (T,); got a scalar. "
            "Reshape one token id with .reshape(1)."
        )
    if value.numel():
        smallest, largest = int(value.min()), int(value.max())
        if smallest < PAD or largest >= vocabulary:
            wrong = smallest if smallest < PAD else largest
            raise ValueError(
                f"{name} holds the token id {wrong}, outside the vocabulary of {vocabulary} tokens. "
                f"Ids go from 0 to {vocabulary - 1}; padding is llmppl.text.PAD = {PAD}."
            )
        if not bool(is_right_padded(value).all()):
            row = (~is_right_padded(value)).nonzero()[0].tolist()
            raise ValueError(
                f"{name} has padding before a token (row {tuple(row)}). PAD may stand only after "
                "the end of a text; to join texts pass them as separate pieces: lm(first, second)."
            )
    return value.long()


def join(texts: Sequence[Tensor], pieces: Sequence[object]) -> Tensor:
    """Concatenate text tensors row by row after broadcasting their batch shapes.

    :param texts: one text tensor a piece.
    :param pieces: what the user passed, for the error message.
    :returns: a tensor of shape ``batch_shape + (L,)`` that may hold padding between the pieces.
    :raises ValueError: two batch shapes do not broadcast; names both pieces.
    """
    batch_shape: torch.Size = torch.Size()
    for n, text in enumerate(texts):
        try:
            batch_shape = torch.broadcast_shapes(batch_shape, text.shape[:-1])
        except RuntimeError:
            other = next(m for m in range(n) if not _broadcast(texts[m], text))
            shapes = [tuple(each.shape[:-1]) for each in texts]
            raise unbroadcastable(pieces, shapes, other, n) from None
    return torch.cat([text.expand(batch_shape + text.shape[-1:]) for text in texts], -1)


def _broadcast(a: Tensor, b: Tensor) -> bool:
    try:
        torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    except RuntimeError:
        return False
    return True
