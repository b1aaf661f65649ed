"""The states of sampled trajectories: every prefix of their texts, ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro import poutine
from torch import Tensor

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.network.text_law import TextLaw
from llmppl.network.text_tensors import lengths
from llmppl.programs.structure import is_latent, text_sites
from llmppl.text import PAD


@dataclass(frozen=True)
class States:
    """``J`` states of each of ``K`` sampled configurations, in the order of the trajectory.

    :param values: by latent site, ``(J * K, ...)``.
    :param place: tokens before the state's end, ``(J, K) + batch_shape``.
    :param valid: whether the sample passed through the state and could end there, same shape. Entries
        that are not repeat the sample. The last entry is the sample itself.
    """

    values: dict[str, Tensor]
    place: Tensor
    valid: Tensor

    def of_samples(self, quantity: Tensor) -> Tensor:
        """The samples' own entries of ``(J, K) + batch_shape``, of shape ``(K,) + batch_shape``."""
        return quantity[-1]


def ended_prefixes(trace: poutine.Trace, axes: tuple[int, ...], nesting: int, objective: str, every: int = 1) -> States:
    """The states of a guide's trace of ``K`` particles.

    Texts that a stop token ends and no grammar binds have prefixes; other latents keep their values.

    :param every: prefixes of multiples of so many tokens alone, and the texts as they are.
    :raises ValueError: no such text; names an objective that takes the program. ``every`` beyond a text.
    """
    latent = {name: site["value"] for name, site in trace.nodes.items() if is_latent(site)}
    terminable, reasons = {}, []
    for name, site in text_sites(trace).items():
        fn = site["fn"]
        if not isinstance(fn, AutoregressiveText):
            reasons.append(f"latent site {name!r} is not written token by token")
        elif reason := fn.not_terminable():
            reasons.append(f"latent site {name!r} {reason}")
        else:
            terminable[name] = fn.law
    if not terminable:
        raise ValueError(
            f"{objective} needs a latent text whose prefixes are texts, and {'; '.join(reasons)}. "
            "Pass stop= and no grammar= at that site, or use TrajectoryBalance, which takes any program."
        )
    blocks: dict[str, list[Tensor]] = {name: [] for name in latent}
    places, valid = [], []
    before: Tensor | int = 0  # tokens of the former texts
    for name, law in terminable.items():
        assert law.max_tokens is not None
        if every > law.max_tokens:
            raise ValueError(
                f"every={every} is beyond the text of site {name!r}, of max_tokens={law.max_tokens}. Choose less, or "
                "TrajectoryBalance, which judges whole texts."
            )
        value = latent[name]
        texts, reached = prefixes(value, law, every)
        for other, kept in latent.items():
            blocks[other].append(texts if other == name else kept.expand((len(texts), *kept.shape)))
        free = lengths(value) - law.ended(value).any(-1).long()
        place = torch.tensor(kept_places(law.max_tokens, every), device=value.device)
        place = place.reshape((-1,) + (1,) * (1 + len(axes)))
        # The sample as a whole is one state, the last.
        whole = _rows((texts == value).all(-1), axes, nesting, 1, torch.all)
        ends = _rows(reached, axes, nesting, 1, torch.all) & ~whole
        places.append((place + before).expand(ends.shape).clone())
        valid.append(ends)
        places[-1][-1] = _rows(free, axes, nesting, 0, torch.amax) + before
        before = before + _rows(lengths(value), axes, nesting, 0, torch.amax)
    valid[-1][-1] = True
    values = {name: torch.cat(parts).flatten(0, 1) for name, parts in blocks.items()}
    return States(values, torch.cat(places), torch.cat(valid))


def _rows(
    full: Tensor, axes: tuple[int, ...], nesting: int, front: int, reduce: Callable[[Tensor, list[int]], Tensor]
) -> Tensor:
    """A site's ``(..., K) + site batch``, reduced to ``(..., K) + batch_shape`` over inner plates.

    :param front: dimensions in front of the particles'.
    """
    missing, split = nesting + 1 + front - full.dim(), front + 1
    shaped = full.reshape(full.shape[:split] + (1,) * missing + full.shape[split:])
    inner = [d for d in range(-nesting, 0) if d not in axes]
    return reduce(shaped, inner) if inner else shaped


def kept_places(max_tokens: int, every: int) -> list[int]:
    """The tokens that the states of a text have, and of the text cut at ``max_tokens``."""
    return [*range(0, max_tokens, every), max_tokens]


def prefixes(value: Tensor, law: TextLaw, every: int = 1) -> tuple[Tensor, Tensor]:
    """Every prefix of texts, ended: with the text's own last token where that ends any text, otherwise with one that
    ends the prefix, if there is one.

    :param value: ``batch_shape + (T,)`` with ``T = max_tokens``.
    :param every: of so many tokens, see :func:`kept_places`.
    :returns: texts ``(J,) + batch_shape + (T,)``, ``J = T + 1`` of all prefixes: an entry holds its first tokens and a
        stop token, the last a text cut at ``max_tokens``; and which of them are texts that the sample
        passed through, ``(J,) + batch_shape``. Entries that are not repeat the sample itself.
    """
    length, max_tokens = lengths(value), law.max_tokens
    assert max_tokens is not None
    last = value.gather(-1, (length - 1).clamp(min=0)[..., None])[..., 0]
    stopped = law.ended(value).any(-1)
    own = torch.isin(last, law.stop)
    free = length - stopped.long()  # tokens before the stop token
    place = torch.arange(max_tokens, device=value.device)
    texts, valid = [], []
    for j in kept_places(max_tokens, every):
        if j < max_tokens:
            kept = torch.where(place < j, value, PAD)
            closing = torch.where(own, last, law.closers(kept))
            text = torch.where(place == j, closing[..., None], kept)
            reached = (free >= j) & (j + 1 >= law.min_tokens) & (closing != PAD)
        else:
            text, reached = value, ~stopped
        texts.append(torch.where(reached[..., None], text, value))
        valid.append(reached)
    return torch.stack(texts), torch.stack(valid)
