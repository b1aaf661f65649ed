r"""Filling a masked canvas step by step, and the exact log-probability of what was filled in.

The positions of a step are decided before its tokens are drawn: by number, by a random order drawn in
advance, or by a rule on the network's predictions from what is revealed so far. Then

.. math:: \log q(z \mid n, \sigma) = \sum_t \sum_{i \in S_t} \log q_i(z_i \mid z_{S_1}, \dots, z_{S_{t-1}})

is the log-probability of the text, for any number of positions a step. Under a rule the steps are a function
of the text, so that each text has one trajectory and the sum over ``z`` is one; under a random order it holds
for each order. Drawing tokens first and keeping the best of them is another law, without a density to write
down: it is not offered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmppl.network.drawing import NotFiniteError, choose
from llmppl.network.text_law import TextLaw
from llmppl.network.transformer import KeysAndValues
from llmppl.text import PAD
from llmppl.text.text_support import nan_mend

ORDERS = ("left-to-right", "random", "confidence", "margin", "entropy")

CANVAS_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Canvas tokens of one forward pass, by device."""

LOGITS = {"cpu": 2**25, "cuda": 2**28}
"""Numbers in one matrix of predictions over the vocabulary, by device; a few such matrices live at once."""


@dataclass(frozen=True)
class Reading:
    """What the network has read of the contexts: keys and values, once for each distinct one.

    :param row: which of the distinct contexts each of ``N`` rows has, ``(N,)``.
    :param last: the token before the gap, ``(D,)``, and its position; it is read with the canvas.
    :param valid: which keys are there, ``(D, P)``.
    :param keys: of every layer, keys and values ``(D, heads, P, width)``.
    """

    row: Tensor
    last: Tensor
    start: Tensor
    valid: Tensor
    keys: KeysAndValues

    def of(self, rows: Tensor) -> Reading:
        """The same for some rows, a row named as often as wanted."""
        return Reading(self.row[rows], self.last, self.start, self.valid, self.keys)

    def of_distinct(self, contexts: Tensor) -> Reading:
        """One row for each of some distinct contexts."""
        return Reading(contexts, self.last, self.start, self.valid, self.keys)


class GapNetwork(Protocol):
    """What unmasking asks of a network that fills gaps; :class:`~llmppl.MaskedLM` says what each is."""

    mask: int
    max_tokens: int
    adapter: str | None
    length_head: nn.Linear

    @property
    def lm(self) -> Any: ...
    @property
    def wants_gradient(self) -> bool: ...
    def read(self, left: Tensor, right: Tensor) -> Reading: ...
    def length_log_probs(self, reading: Reading, law: TextLaw) -> Tensor: ...
    def states(self, reading: Reading, canvas: Tensor, count: Tensor) -> Tensor: ...
    def logits(self, states: Tensor) -> Tensor: ...
    def version(self) -> int: ...


@dataclass(frozen=True)
class Plan:
    """How a canvas of masks is filled.

    :param order: ``"left-to-right"``; ``"random"``, drawn for each text; or from the predictions at the masked
        positions: the largest ``"confidence"`` (the probability of the likeliest token), the largest ``"margin"``
        (over the second likeliest), the smallest ``"entropy"``.
    :param steps: forward passes; a text of fewer tokens takes as many as it has. All positions are one pass
        with ``steps=1``.
    :param tokens_per_step: instead of ``steps``, positions of each step: a number, or a schedule whose last
        entry is repeated until the text is full, e.g. ``(1, 2)``. By default one.
    :param num_orders: of random orders, how many are drawn for each text: it is filled in one of them, and its
        density is the mean over all, which has less variance.
    :raises ValueError: naming the argument and the mend.
    """

    order: str = "confidence"
    steps: int | None = None
    tokens_per_step: int | Sequence[int] | None = None
    num_orders: int = 1

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is no unmasking order. Use one of {ORDERS}.")
        if self.steps is not None and self.tokens_per_step is not None:
            raise ValueError("steps= and tokens_per_step= say the same thing in two ways. Give one of them.")
        check_count("steps", 1 if self.steps is None else self.steps)
        for count in self._schedule:
            check_count("tokens_per_step", count)
        if not self._schedule:
            raise ValueError("tokens_per_step= is empty. Give a number, or a schedule such as (1, 2).")
        check_count("num_orders", self.num_orders)
        if self.num_orders > 1 and self.order != "random":
            raise ValueError(
                f"num_orders={self.num_orders} is for order='random'; order={self.order!r} is a single one."
            )

    @property
    def _schedule(self) -> tuple[int, ...]:
        if self.tokens_per_step is None:
            return (1,)
        return (self.tokens_per_step,) if isinstance(self.tokens_per_step, int) else tuple(self.tokens_per_step)

    @property
    def exactness(self) -> str:
        """``"conditional"`` on the order where that is random, else ``"marginal"``."""
        return "conditional" if self.order == "random" else "marginal"

    def quota(self, length: int) -> list[int]:
        """Positions of each step, for a text of ``length`` tokens."""
        if self.steps is not None:
            steps = min(self.steps, length)
            # Later steps know more, so the larger ones come last.
            return [(t + 1) * length // steps - t * length // steps for t in range(steps)]
        counts: list[int] = []
        while sum(counts) < length:
            wanted = self._schedule[min(len(counts), len(self._schedule) - 1)]
            counts.append(min(wanted, length - sum(counts)))
        return counts

    def draw_orders(self, count: Tensor, width: int) -> Tensor | None:
        """The step of each position, ``(num_orders, N, width)`` and -1 behind the end, where it does not depend
        on the tokens; ``None`` where it does.

        :param count: tokens of each text, ``(N,)``.
        """
        if self.order == "left-to-right":
            rank = torch.arange(width, device=count.device).expand(1, len(count), -1)
        elif self.order == "random":
            keys = torch.rand(self.num_orders, len(count), width, dtype=torch.float64, device=count.device)
            behind = torch.arange(width, device=count.device) >= count[:, None]
            rank = keys.masked_fill(behind, 2.0).argsort(-1).argsort(-1)
        else:
            return None
        step_of_rank = self.steps_of_ranks(count, width)
        return step_of_rank.expand(len(rank), -1, -1).gather(-1, rank)

    def steps_of_ranks(self, count: Tensor, width: int) -> Tensor:
        """The step of the position that is filled as number 0, 1, ...: ``(N, width)``, -1 behind the end."""
        rows = torch.full((len(count), width), -1, device=count.device)
        for length in set(count.tolist()):
            steps = [t for t, k in enumerate(self.quota(length)) for _ in range(k)]
            rows[count == length, :length] = torch.tensor(steps, device=count.device)
        return rows


def draw(
    model: GapNetwork, law: TextLaw, plan: Plan, reading: Reading, count: Tensor, heat: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill canvases of ``count`` tokens.

    :param heat: an extra temperature to draw at, ``(N,)``; no part of the law.
    :returns: the tokens ``(N, T)``, the steps ``(num_orders, N, T)``, and the log-probability of each token under the
        law, of the first order in nats ``(N, T)``.
    """
    assert law.max_tokens is not None
    width = law.max_tokens
    orders = plan.draw_orders(count, width)
    place = torch.arange(width, device=count.device)
    canvas = torch.where(place < count[:, None], model.mask, PAD)
    filled = torch.full(canvas.shape, -1, device=count.device)
    recorded = torch.zeros(canvas.shape, dtype=model.length_head.weight.dtype, device=count.device)
    ranks = plan.steps_of_ranks(count, width)
    for step in range(int(ranks.max()) + 1):
        rows = (ranks == step).any(-1).nonzero()[:, 0]
        # A rule looks at every mask, a known order at its own positions only.
        open_ = canvas == model.mask if orders is None else orders[0] == step
        for part in _parts(rows, width, law.vocabulary, int(open_[rows].sum(-1).max())):
            masked = open_[part]
            row, column = masked.nonzero(as_tuple=True)
            log_probs = predictions(model, law, reading.of(part), canvas[part], count[part], row, column)
            now = (
                masked
                if orders is not None
                else chosen(plan.order, log_probs, row, column, masked, (ranks[part] == step).sum(-1))
            )
            at = now[row, column]
            weights = log_probs[at] if heat is None else log_probs[at] / heat[part][row[at], None]
            token = choose(weights)
            canvas[part[row[at]], column[at]] = token
            recorded[part[row[at]], column[at]] = log_probs[at].gather(-1, token[:, None])[:, 0]
            filled[part[row[at]], column[at]] = step
    return canvas, filled[None] if orders is None else orders, recorded


@torch.no_grad()
def steps_of(model: GapNetwork, law: TextLaw, plan: Plan, reading: Reading, texts: Tensor, count: Tensor) -> Tensor:
    """In which step each token of given texts is filled in, ``(num_orders, N, T)``; a random order is drawn.

    :param texts: ``(N, T)``.
    """
    width = texts.shape[-1]
    orders = plan.draw_orders(count, width)
    if orders is not None:
        return orders
    canvas = torch.where(texts == PAD, PAD, model.mask)
    filled = torch.full(canvas.shape, -1, device=count.device)
    ranks = plan.steps_of_ranks(count, width)
    for step in range(int(ranks.max()) + 1):
        rows = (ranks == step).any(-1).nonzero()[:, 0]
        for part in _parts(rows, width, law.vocabulary, int((canvas[rows] == model.mask).sum(-1).max())):
            masked = canvas[part] == model.mask
            row, column = masked.nonzero(as_tuple=True)
            log_probs = predictions(model, law, reading.of(part), canvas[part], count[part], row, column)
            now = chosen(plan.order, log_probs, row, column, masked, (ranks[part] == step).sum(-1))
            canvas[part] = torch.where(now, texts[part], canvas[part])
            filled[part] = torch.where(now, step, filled[part])
    return filled[None]


def score(model: GapNetwork, law: TextLaw, reading: Reading, texts: Tensor, count: Tensor, steps: Tensor) -> Tensor:
    """Log-probability of each token, filled in at its step, ``(N, T)`` in nats; zero behind the end.

    All steps of all texts are canvases of one batch: no step waits for another.

    :param steps: ``(N, T)``.
    """
    number = int(steps.max()) + 1
    rows = torch.stack([(steps == step).any(-1) for step in range(number)], 1).nonzero()  # (M, 2): text, step
    text, step = rows[:, 0], rows[:, 1]
    revealed = (steps[text] >= 0) & (steps[text] < step[:, None])
    canvas = torch.where(texts[text] == PAD, PAD, torch.where(revealed, texts[text], model.mask))
    wanted = steps[text] == step[:, None]
    found = log_probs_at(model, law, reading.of(text), canvas, count[text], wanted, texts[text])
    return torch.zeros(texts.shape, dtype=found.dtype, device=texts.device).index_add(0, text, found)


def log_probs_at(
    model: GapNetwork, law: TextLaw, reading: Reading, canvas: Tensor, count: Tensor, wanted: Tensor, texts: Tensor
) -> Tensor:
    """Log-probabilities of the wanted tokens of ``texts``, given canvases: ``(M, T)`` in nats, zero elsewhere.

    :param canvas, wanted, texts: ``(M, T)``.
    """
    rows = torch.arange(len(canvas), device=canvas.device)
    parts = list(_parts(rows, canvas.shape[-1], law.vocabulary, int(wanted.sum(-1).max())))

    def one(part: Tensor) -> Tensor:
        row, column = wanted[part].nonzero(as_tuple=True)
        log_probs = predictions(model, law, reading.of(part), canvas[part], count[part], row, column)
        token = texts[part][row, column]
        picked = log_probs.gather(-1, token[:, None])[:, 0]
        return torch.zeros(part.shape + canvas.shape[1:], dtype=picked.dtype, device=picked.device).index_put(
            (row, column), picked
        )

    if len(parts) > 1 and torch.is_grad_enabled():
        # The activations of one part at a time.
        return torch.cat([checkpoint(one, part, use_reentrant=False) for part in parts])
    return torch.cat([one(part) for part in parts])


def predictions(
    model: GapNetwork, law: TextLaw, reading: Reading, canvas: Tensor, count: Tensor, row: Tensor, column: Tensor
) -> Tensor:
    """Log-probabilities over the vocabulary at positions of canvases, ``(len(row), V)`` in nats.

    :raises NotFiniteError: NaN.
    """
    logits = model.logits(model.states(reading, canvas, count)[row, column])
    log_probs = permitted_logits(law, logits, column, count[row]).log_softmax(-1)
    if bool(log_probs.isnan().any()):
        bad = int(log_probs.isnan().any(-1).nonzero()[0, 0])
        raise NotFiniteError(
            f"the network's log-probabilities are NaN at row {int(row[bad])}, token {int(column[bad])}. {nan_mend(law)}"
        )
    return log_probs


def permitted_logits(law: TextLaw, logits: Tensor, column: Tensor, count: Tensor) -> Tensor:
    """Logits made those of a text of ``count`` tokens: tempered, −inf for tokens that cannot stand at ``column``.

    The last token of a text is a stop token, unless the text has the most tokens; no other is.

    :param logits: ``(M, V)``.
    :param column, count: ``(M,)``.
    """
    scaled = law.scaled_logits(logits, torch.full_like(column, law.max_tokens or 0), None)
    if not len(law.stop):
        return scaled
    stops = torch.zeros(scaled.shape[-1], dtype=torch.bool, device=scaled.device)
    stops[law.stop] = True
    last = column == count - 1
    ends, inside = last & (count < (law.max_tokens or 0)), ~last
    return scaled.masked_fill((ends[:, None] & ~stops) | (inside[:, None] & stops), -torch.inf)


def chosen(order: str, log_probs: Tensor, row: Tensor, column: Tensor, masked: Tensor, quota: Tensor) -> Tensor:
    """The positions that a rule fills next, boolean ``(N, T)``; of equals the leftmost.

    :param log_probs: at the masked positions, ``(M, V)``; ``row`` and ``column`` say where these are.
    :param quota: how many positions of each row, ``(N,)``.
    """
    if order == "confidence":
        merit = log_probs.max(-1).values
    elif order == "margin":
        merit = (
            torch.cat([log_probs.exp(), torch.zeros_like(log_probs[:, :1])], -1).topk(2).values.diff(dim=-1).neg()[:, 0]
        )
    elif order == "entropy":
        merit = torch.special.entr(log_probs.exp()).sum(-1).neg()
    else:
        raise ValueError(f"order={order!r} does not look at predictions.")
    merits = torch.full(masked.shape, -torch.inf, dtype=merit.dtype, device=masked.device)
    # Rounded, so that a text that is scored in another batch takes the order in which it was drawn.
    merits[row, column] = (merit * 4096).round()
    rank = merits.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return masked & (rank < quota[:, None])


def _parts(rows: Tensor, width: int, vocabulary: int, positions: int) -> Iterator[Tensor]:
    """Rows that go through the network together.

    :param positions: the most positions of a row whose predictions are wanted at once.
    """
    kind = rows.device.type if rows.device.type in CANVAS_TOKENS else "cpu"
    size = min(CANVAS_TOKENS[kind] // (width + 1), LOGITS[kind] // (vocabulary * max(positions, 1)))
    yield from rows.split(max(size, 1))


def check_count(name: str, count: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``.

    :raises ValueError: naming the argument.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {count!r}.")
