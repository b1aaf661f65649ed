"""fit(): the training loop for guides."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmppl.text import pad_rows, unpad_rows
from llmppl.tracing import Program, in_data_plate


@dataclass(repr=False)
class History:
    """What a training run reported at each step.

    :param loss: of the objective, for one observation.
    :param elbo: nats, mean over the step's observations; NaN where the objective reports none.
    :param ess: effective sample size of the step's on-policy particles, mean over observations.
    :param gradient_norm: before clipping.
    :param seconds: since the start.
    """

    loss: list[float] = field(default_factory=list)
    elbo: list[float] = field(default_factory=list)
    ess: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __repr__(self) -> str:
        if not self.loss:
            return "History(no steps)"
        last = max(len(self.loss) // 5, 1)
        return (
            f"History({len(self.loss)} steps in {self.seconds[-1]:.0f} s, mean of the last {last}: "
            f"loss {np.mean(self.loss[-last:]):.2f}, ELBO {np.mean(self.elbo[-last:]):.2f} nats, "
            f"ESS {np.mean(self.ess[-last:]):.1f})"
        )

    def plot(self, ax: Any = None) -> Any:
        """See :func:`llmppl.plots.plot_history`."""
        from llmppl.plots import plot_history

        return plot_history(self, ax)


def fit(
    model: Program,
    guide: Program,
    data: Sequence[tuple[Any, ...]],
    objective: ELBO,
    steps: int,
    batch_size: int = 1,
    vectorize_data: bool = False,
    learning_rate: float = 3e-4,
    log_partition_learning_rate: float = 1e-1,
    warmup_steps: int = 10,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
    seed: int | None = None,
    progress: bool = True,
    callback: Callable[[int, History], None] | None = None,
) -> History:
    """Train a guide on minibatches of data with AdamW.

    :param data: the program's argument tuples; each is drawn once before any is drawn again.
    :param objective: any pyro ``ELBO``.
    :param batch_size: tuples a step; their gradients are averaged.
    :param vectorize_data: call the program once for a whole minibatch, with a list in place of each
        string argument (tensors are stacked, text tensors padded first), inside a plate: faster, for
        programs that treat rows alike.
    :param learning_rate: after ``warmup_steps`` steps of linear warm-up.
    :param log_partition_learning_rate: for a guide's learned log-partition.
    :param clip_norm: the global gradient norm is clipped at this.
    :param seed: of every random number of the run; by default Pyro's current state is used.
    :param callback: called as ``callback(step, history)`` after each step.
    :returns: the history.
    :raises TypeError, ValueError: malformed data or numbers; a loss that is not finite.
    """
    data = _checked(data)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    if not batch_size >= 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    batch_size = min(batch_size, len(data))
    if not isinstance(objective, ELBO):
        raise TypeError(f"objective must be an ELBO such as TrajectoryBalance(num_particles=16), got {objective!r}.")
    if seed is not None:
        pyro.set_rng_seed(seed)
    # Its own generator: the order of the data does not depend on how much the objective draws.
    order = np.random.default_rng(torch.initial_seed() % 2**32 if seed is None else seed)
    program, proposal = (model, guide)
    if vectorize_data:
        program, proposal = in_data_plate(model), in_data_plate(guide)

    history, queue = History(), list[int]()
    optimizer: torch.optim.Optimizer | None = None
    parameters: list[Tensor] = []
    # What an earlier run or backward pass left behind is none of this one's gradient.
    for _, parameter in pyro.get_param_store().named_parameters():
        parameter.grad = None
    if isinstance(guide, nn.Module):
        guide.zero_grad()
    start = time.monotonic()
    with tqdm(total=steps, desc=f"fit {type(objective).__name__}", disable=not progress) as bar:
        for step in range(steps):
            while len(queue) < batch_size:
                queue.extend(order.permutation(len(data)).tolist())
            batch, queue = [data[n] for n in queue[:batch_size]], queue[batch_size:]
            calls = [_collate(batch)] if vectorize_data else batch
            for parameter in parameters:
                parameter.grad = None
            total, reports = 0.0, []
            for args in calls:
                with poutine.trace(param_only=True) as captured:
                    # Some of Pyro's objectives have no differentiable loss, and some return several.
                    loss = float(np.sum(objective.loss_and_grads(program, proposal, *args)))
                if not math.isfinite(loss):
                    raise ValueError(
                        f"the loss is {loss} at step {step + 1}, on {args!r}. Lower learning_rate, or check the "
                        "program's factors."
                    )
                total += loss / len(batch)
                reports.append(getattr(objective, "diagnostics", None) or {"elbo": -loss * len(calls) / len(batch)})
            if optimizer is None:
                optimizer = _optimizer(captured.trace, guide, learning_rate, log_partition_learning_rate, weight_decay)
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                peaks = [group["lr"] for group in optimizer.param_groups]
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= len(batch)
            norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * min(1.0, (step + 1) / max(warmup_steps, 1))
            optimizer.step()
            history.loss.append(total)
            history.elbo.append(_mean(reports, "elbo"))
            history.ess.append(_mean(reports, "ess"))
            history.gradient_norm.append(float(norm))
            history.seconds.append(time.monotonic() - start)
            bar.set_postfix(
                loss=f"{total:.2f}",
                ELBO=f"{history.elbo[-1]:.2f}",
                ESS=f"{history.ess[-1]:.1f}",
                refresh=False,
            )
            bar.update()
            if callback is not None:
                callback(step + 1, history)
    return history


def _checked(data: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    data = list(data)
    if not data:
        raise ValueError("data is empty. Pass a list of the program's argument tuples.")
    for n, item in enumerate(data):
        if not isinstance(item, tuple):
            raise TypeError(
                f"data[{n}] is a {type(item).__name__}; it must be a tuple of the program's arguments, "
                f"e.g. ({item!r},)."
            )
    return data


def _collate(batch: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """A minibatch as one argument tuple: lists of strings, stacked tensors."""
    if len({len(item) for item in batch}) > 1:
        raise ValueError("vectorize_data=True needs tuples of one length. Leave it out for others.")
    columns: list[Any] = []
    for n, column in enumerate(zip(*batch, strict=True)):
        if all(isinstance(item, str) for item in column):
            columns.append(list(column))
        elif all(isinstance(item, Tensor) for item in column):
            if all(item.dtype == torch.long and item.dim() == 1 for item in column):
                rows = [unpad_rows(item[None])[0] for item in column]
                columns.append(pad_rows(rows, device=column[0].device))
            else:
                columns.append(torch.stack(column))
        elif all(isinstance(item, (int, float)) for item in column):
            columns.append(torch.tensor(column))
        else:
            kinds = sorted({type(item).__name__ for item in column})
            raise TypeError(
                f"vectorize_data=True cannot batch argument {n} of types {kinds}: strings, numbers and tensors can be. "
                "Leave vectorize_data out."
            )
    return tuple(columns)


def _optimizer(
    captured: poutine.Trace, guide: Program, learning_rate: float, head_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW over every parameter that the first step met in Pyro's store, as SVI finds them."""
    # In order of first use: sums over a set would differ from one process to the next.
    found = dict.fromkeys(site["value"].unconstrained() for site in captured.nodes.values())
    if isinstance(guide, nn.Module):
        found |= dict.fromkeys(p for p in guide.parameters() if p.requires_grad)
    head = set(guide.head.parameters()) if hasattr(guide, "head") else set()
    groups = [
        {"params": [p for p in found if p not in head], "lr": learning_rate},
        {"params": [p for p in found if p in head], "lr": head_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            "nothing to train: neither model nor guide has parameters. PromptGuide has none; use AutoregressiveGuide."
        )
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay)


def _mean(reports: list[dict[str, float]], key: str) -> float:
    return float(np.mean([report.get(key, math.nan) for report in reports]))
