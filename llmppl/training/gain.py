"""The held-out gain: how much better than the prior a guide knows latents that it never saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmppl.inference.simulated_pairs import score_given
from llmppl.programs.observations import observing
from llmppl.programs.particles import log_prior
from llmppl.programs.plates import in_data_plate
from llmppl.programs.simulated_pair import SimulatedPair
from llmppl.programs.structure import Program
from llmppl.text.declared import declared, is_list
from llmppl.training.collation import collate

ROWS = 32
"""Pairs that are scored together where the data are vectorised."""


@dataclass(frozen=True, repr=False)
class Gain:
    r""":math:`\log q(z|x) - \log p(z)` at simulated pairs, nats.

    Its mean is the mutual information of latents and observations less :math:`\mathrm{KL}(p(z|x)\|q)`, so that it is
    bounded by the former and zero for the prior. It has a finite variance where the evidence's estimate has none, and
    it takes one scoring pass; a hard condition does not disturb it, for simulated latents satisfy it.

    :param values: of each pair, ``(N,)``; −inf where the guide cannot write the latent.
    :param information: log p(x|z) − log Z(x) of each pair where log Z is known: its mean is the mutual information.
    """

    values: np.ndarray
    information: np.ndarray | None = None

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean, NaN of a single pair."""
        if len(self.values) < 2 or not np.isfinite(self.values).all():
            return math.nan
        return float(self.values.std(ddof=1) / math.sqrt(len(self.values)))

    @property
    def mutual_information(self) -> float:
        """Mean of :attr:`information`, the bound of the gain; NaN where log Z is not known."""
        return math.nan if self.information is None else float(self.information.mean())

    @property
    def kl(self) -> float:
        """KL(p‖q), the mutual information less the gain, mean over observations; NaN where log Z is not known."""
        return self.mutual_information - self.mean

    @property
    def kl_error(self) -> float:
        """Standard error of :attr:`kl`, by the pairs; the error of the given log Z is not in it."""
        return math.nan if self.information is None else Gain(self.information - self.values).error

    def __repr__(self) -> str:
        text = f"Gain({self.mean:.2f} ± {self.error:.2f} nats over {len(self.values)} pairs"
        if self.information is not None:
            share = self.mean / self.mutual_information
            text += (
                f", {share:.0%} of the mutual information {self.mutual_information:.2f}; "
                f"KL(p‖q) {self.kl:.2f} ± {self.kl_error:.2f}"
            )
        return text + ")"


@torch.no_grad()
@declared
def held_out_gain(
    model: Program,
    guide: Program,
    pairs: Sequence[SimulatedPair],
    vectorize_data: bool = True,
    log_evidence: Sequence[float] | None = None,
) -> Gain:
    """The gain of a guide over the prior, at pairs of :func:`~llmppl.simulate` that it was not trained on.

    :param vectorize_data: score pairs together, in a plate over the program's arguments.
    :param log_evidence: log Z of each pair's observation, by enumeration or long runs: the gain then comes with the
        mutual information and KL(p‖q).
    :raises ValueError: a guide that does not score what it did not draw; another number of log Z than of pairs.
    """
    if not is_list(pairs) or not hasattr(pairs, "__getitem__"):
        raise TypeError(
            f"pairs must be simulated pairs, got {pairs!r}. Draw some: simulate(program, data, num_pairs=64)."
        )
    if not len(pairs):
        raise ValueError("pairs is empty. Draw some: simulate(program, data, num_pairs=64).")
    if log_evidence is not None and len(log_evidence) != len(pairs):
        raise ValueError(f"log_evidence has {len(log_evidence)} values for {len(pairs)} pairs. Give one for each.")
    found, likelihood = [], []
    calls: list[Any] = [pairs[n] for n in range(len(pairs))]
    for n, pair in enumerate(calls):
        if not isinstance(pair, SimulatedPair):
            raise TypeError(
                f"pairs[{n}] is {pair!r}, no simulated pair. Draw some: simulate(program, data, num_pairs=64)."
            )
    if vectorize_data:
        calls = [collate(calls[start : start + ROWS]) for start in range(0, len(calls), ROWS)]
    programs = (in_data_plate(model), in_data_plate(guide)) if vectorize_data else (model, guide)
    for pair in calls:
        observed, told = observing(*programs, dict(pair.observations))
        particles = score_given(observed, told, tuple(pair), {}, dict(pair.latents), 1)
        prior = log_prior(particles)
        found.append((particles.log_q - prior)[0].reshape(-1).double().cpu().numpy())
        likelihood.append((particles.log_p - prior)[0].reshape(-1).double().cpu().numpy())
    information = None
    if log_evidence is not None:
        information = np.concatenate(likelihood) - np.asarray([float(value) for value in log_evidence])
    return Gain(np.concatenate(found), information)
