"""Arrays in a context: an image or a series that stands where tokens would, by an encoder's embeddings.

Each distinct array that a language model is given has token ids of its own, far behind the vocabulary's, and the input
embedding looks their rows up in what the encoder makes of the array. Whatever reads token ids reads arrays, too: packed
prefixes, which equal arrays share, caches, batches, resampled particles.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FIRST = 2**40
"""The first id of arrays, which no vocabulary reaches."""

KEPT = 8192
"""Distinct arrays whose embeddings can be asked for; those used least recently leave."""

RANDOM = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
"""Layers that are another function from one pass to the next, or of the other rows, while they train."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """An array as a piece of a context: ``lm(Embedded(encoder, image, event_dim=2), " A caption:", ...)``.

    The encoder's embeddings of the array, ``P`` of the model's width, stand where ``P`` tokens would. Its parameters
    are registered with Pyro under ``name``, so that whatever trains a guide trains the encoder of its prompts, and
    whatever trains a program (:meth:`llmppl.LM.adapt`) that of the program's own contexts; one that is frozen,
    ``encoder.requires_grad_(False)``, stays as it is. Checkpoints of ``fit`` hold it; ``guide.save`` holds the guide's
    own parameters alone.

    :param encoder: maps arrays ``(N,) + event_shape`` to embeddings ``(N, P, width)``, or ``(N, width)`` where ``P`` is
        1. It must be a function of each array alone: call ``encoder.eval()`` where it has dropout or batch norm.
    :param array: ``batch_shape + event_shape``, floating; a batch shape broadcasts as that of a text.
    :param event_dim: dimensions of one array: 2 for an image ``(height, width)``, 1 for a series.
    :param name: of the encoder's parameters; two encoders that train want two.
    :raises TypeError: no module, no floating tensor.
    :raises ValueError: an array of fewer dimensions, without elements, or with NaN or infinite ones.
    """

    encoder: nn.Module
    array: Tensor
    event_dim: int
    name: str = "encoder"

    def __post_init__(self) -> None:
        if not isinstance(self.encoder, nn.Module):
            raise TypeError(f"encoder={self.encoder!r} must be a torch.nn.Module that maps arrays to embeddings.")
        if not isinstance(self.array, Tensor):
            raise TypeError(
                f"array must be a tensor, got {type(self.array).__name__}. Pass torch.as_tensor(array).float()."
            )
        if not self.array.is_floating_point():
            raise TypeError(f"array has dtype {self.array.dtype}. Pass floating numbers, e.g. image.float() / 255.")
        if isinstance(self.event_dim, bool) or not isinstance(self.event_dim, int) or self.event_dim < 1:
            raise ValueError(f"event_dim={self.event_dim!r} must be a whole number, at least 1: of an image 2 or 3.")
        if self.array.dim() < self.event_dim:
            raise ValueError(
                f"array of shape {tuple(self.array.shape)} has fewer than event_dim={self.event_dim} dimensions."
            )
        if not self.array.numel():
            raise ValueError(f"array of shape {tuple(self.array.shape)} is empty.")
        finite = self.array.isfinite()
        if not bool(finite.all()):
            raise ValueError(
                f"array is {float(self.array[~finite][0])} at {tuple((~finite).nonzero()[0].tolist())}. Give finite "
                "numbers; what is missing needs a number of its own, and the encoder a channel that says so."
            )

    @property
    def batch_shape(self) -> torch.Size:
        return self.array.shape[: self.array.dim() - self.event_dim]

    @property
    def trains(self) -> bool:
        return any(p.requires_grad for p in self.encoder.parameters())

    def __repr__(self) -> str:
        return f"Embedded({type(self.encoder).__name__}, array of shape {tuple(self.array.shape)}, {self.name!r})"


@dataclass
class _Entry:
    encoder: nn.Module
    array: Tensor
    first: int
    size: int
    rows: Tensor | None = None
    version: int = -1


class EmbeddedArrays:
    """The arrays that a transformer has been given, and the hooks that embed them.

    :param transformer: its input embedding gets two hooks, which do nothing where there is no array.
    """

    def __init__(self, transformer: Any) -> None:
        self._entries: OrderedDict[tuple[int, bytes], _Entry] = OrderedDict()
        self._of_id: dict[int, tuple[_Entry, int]] = {}
        self._sizes: dict[tuple[int, torch.Size], int] = {}
        self._names: dict[str, nn.Module] = {}
        self._next = FIRST
        self._found: Tensor | None = None
        embedding = transformer.get_input_embeddings()
        self._weight: Tensor = embedding.weight
        # Before the hook of virtual tokens, which would take every id behind the vocabulary for its own.
        embedding.register_forward_pre_hook(self._hide, prepend=True)
        embedding.register_forward_hook(self._embed)

    # --- ids ---------------------------------------------------------------------------------------

    def ids(self, piece: Embedded) -> Tensor:
        """Token ids of an array, ``batch_shape + (P,)``.

        :raises ValueError: an encoder that refuses the array, or gives something else than embeddings; a second one of
            the same name that trains.
        """
        known = self._names.setdefault(piece.name, piece.encoder) if piece.trains else piece.encoder
        if known is not piece.encoder:
            raise ValueError(
                f"two encoders are called {piece.name!r}, {type(known).__name__} and {type(piece.encoder).__name__}. "
                "Give each a name: Embedded(..., name='eye')."
            )
        event = piece.array.shape[len(piece.batch_shape) :]
        flat = piece.array.detach().reshape(-1, *event)
        size = self._size(piece.encoder, flat)
        rows = [self._entry(piece.encoder, array, size).first for array in flat]
        firsts = torch.tensor(rows, device=self._weight.device).reshape(piece.batch_shape)
        return firsts[..., None] + torch.arange(size, device=firsts.device)

    def _entry(self, encoder: nn.Module, array: Tensor, size: int) -> _Entry:
        content = array.cpu().contiguous()
        digest = hashlib.blake2b(
            content.numpy().tobytes(), digest_size=16, person=str(tuple(array.shape))[:16].encode()
        )
        key = (id(encoder), digest.digest() + str(array.dtype).encode())
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(encoder, content.clone(), self._next, size)
            self._of_id |= {self._next + n: (entry, n) for n in range(size)}
            self._next += size
            while len(self._entries) > KEPT:
                _, old = self._entries.popitem(last=False)
                # With its last array an encoder may go, and another may have its id.
                self._sizes.pop((id(old.encoder), old.array.shape), None)
                for n in range(old.size):
                    del self._of_id[old.first + n]
        self._entries.move_to_end(key)
        return entry

    def _size(self, encoder: nn.Module, arrays: Tensor) -> int:
        """How many embeddings an array of this shape has."""
        key = (id(encoder), arrays.shape[1:])
        if key not in self._sizes:
            with torch.no_grad():
                self._sizes[key] = self._encoded(encoder, arrays[:1]).shape[1]
        return self._sizes[key]

    def _encoded(self, encoder: nn.Module, arrays: Tensor) -> Tensor:
        """Embeddings of a batch of arrays, ``(N, P, width)``."""
        kind, width = type(encoder).__name__, self._weight.shape[-1]
        for layer in encoder.modules():
            if isinstance(layer, RANDOM) and layer.training:
                raise ValueError(
                    f"encoder={kind} has a {type(layer).__name__} that is training, so that it is another function at "
                    "every pass, and a density would be, too. Call encoder.eval(); its parameters train all the same."
                )
        own = next(encoder.parameters(), self._weight)
        try:
            found = encoder(arrays.to(own.device, own.dtype))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"encoder={kind} refuses arrays of shape {tuple(arrays.shape)}, {len(arrays)} of shape "
                f"{tuple(arrays.shape[1:])} each: {error}"
            ) from error
        if not isinstance(found, Tensor):
            raise TypeError(f"encoder={kind} returns a {type(found).__name__}. It must return a tensor of embeddings.")
        if found.dim() == 2:
            found = found[:, None]
        if found.dim() != 3 or found.shape[0] != len(arrays) or found.shape[-1] != width or not found.shape[1]:
            raise ValueError(
                f"encoder={kind} returns shape {tuple(found.shape)} for {len(arrays)} arrays. It must be "
                f"({len(arrays)}, P, {width}): {width} is the width of the language model."
            )
        if not bool(found.isfinite().all()):
            raise ValueError(f"encoder={kind} returns NaN or infinite embeddings. Check its weights and learning rate.")
        return found

    # --- what trains -------------------------------------------------------------------------------

    def train(self, contexts: Tensor) -> bool:
        """Whether gradients flow into an encoder from contexts."""
        return any(self._trains(encoder) for encoder in self._encoders(contexts))

    def version(self, contexts: Tensor) -> int:
        """A number that grows whenever a parameter of their encoders changes in place."""
        return sum(_version(encoder) for encoder in self._encoders(contexts))

    def stand_in(self, contexts: Tensor) -> bool:
        """Whether any array stands in contexts."""
        return bool(self._of_id) and bool((contexts >= FIRST).any())

    def any_trains(self) -> bool:
        return any(map(self._trains, self._names.values()))

    def _encoders(self, contexts: Tensor) -> list[nn.Module]:
        if not self.stand_in(contexts):
            return []
        found = contexts[contexts >= FIRST].unique().tolist()
        return list({id(e): e for e in (self._place(n)[0].encoder for n in found)}.values())

    @staticmethod
    def _trains(encoder: nn.Module) -> bool:
        return any(p.requires_grad for p in encoder.parameters())

    def _place(self, number: int) -> tuple[_Entry, int]:
        if number not in self._of_id:
            raise ValueError(
                f"an array of this context is kept no more: {KEPT} others were used since. Make the context anew."
            )
        return self._of_id[number]

    # --- hooks -------------------------------------------------------------------------------------

    def _hide(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self._found = None
        if not self._of_id:
            return None
        here = arguments[0] >= FIRST
        if not bool(here.any()):
            return None
        self._found = arguments[0]
        return (arguments[0].masked_fill(here, 0), *arguments[1:])

    def _embed(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self._found is None:
            return None
        tokens, self._found = self._found, None
        here = tokens >= FIRST
        distinct, place = tokens[here].unique(return_inverse=True)
        rows = self._rows([self._place(number) for number in distinct.tolist()])
        return output.masked_fill(here[..., None], 0.0).index_put(here.nonzero(as_tuple=True), rows[place].to(output))

    def _rows(self, places: list[tuple[_Entry, int]]) -> Tensor:
        """The embeddings of ids, ``(N, width)``: each array goes through its encoder once."""
        groups: dict[tuple[int, torch.Size], dict[int, _Entry]] = {}
        for entry, _ in places:
            groups.setdefault((id(entry.encoder), entry.array.shape), {})[entry.first] = entry
        found: dict[int, Tensor] = {}
        for entries in groups.values():
            encoder = next(iter(entries.values())).encoder
            gradient, version = torch.is_grad_enabled() and self._trains(encoder), _version(encoder)
            new = [e for e in entries.values() if gradient or e.rows is None or e.version != version]
            if new:
                encoded = self._encoded(encoder, torch.stack([entry.array for entry in new]))
                for entry, rows in zip(new, encoded, strict=True):
                    found[entry.first] = rows
                    entry.rows, entry.version = rows.detach(), version
            found |= {entry.first: entry.rows for entry in entries.values() if entry.first not in found}  # type: ignore[misc]
        return torch.stack([found[entry.first][n] for entry, n in places])


def _version(encoder: nn.Module) -> int:
    return sum(tensor._version for tensor in (*encoder.parameters(), *encoder.buffers()))
