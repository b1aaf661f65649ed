"""How far a guide in training is from the posteriors of held-out observations."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmppl.inference.bounds import bounds
from llmppl.inference.gathering import NoWeightError
from llmppl.inference.importance import importance
from llmppl.network.random_states import randomness_kept
from llmppl.posterior.brackets import Bounds, Estimate
from llmppl.posterior.posterior import Posterior
from llmppl.programs.simulated_pair import SimulatedPair
from llmppl.programs.structure import Program
from llmppl.text.declared import check_fields, is_list
from llmppl.training.collation import collate
from llmppl.training.gain import held_out_gain
from llmppl.training.history import Evaluated
from llmppl.training.minibatches import Rows, checked
from llmppl.training.run_identity import digest

ROWS = 16
"""Observations that are evaluated together where the data are vectorised."""


@dataclass
class Evaluation:
    """What ``fit`` measures on held-out data, when, and when it stops because of it.

    Every ``every`` steps, and before the first, the guide proposes ``num_samples`` latents for each
    observation. The gap is log Z − ELBO, mean over the observations. For log Z of an observation stands
    its largest log Ẑ of all evaluations so far; when a better one is found the gaps of earlier
    evaluations are taken again with it, so that all gaps of a run are comparable: they differ as the
    held-out ELBOs do. Each log Ẑ is below log Z in expectation, hence the gap is a lower bound of the
    true one up to the luck of the largest; with ``references`` it has no such flaw.

    The random numbers are the same at each evaluation and none of the training's: a run with and
    without evaluations trains the same.

    Where the program learns, log Z is another at each evaluation: each gap is then taken with the evaluation's
    own log Ẑ, and ``patience`` waits for a larger mean log Ẑ, which is what EM raises.

    With ``pairs`` the held-out gain is measured as well (:class:`~llmppl.training.gain.Gain`), and ``patience`` rests
    on it: it works where a hard condition makes ELBO and gap infinite, and differs from one evaluation to the next by
    what the guide has learned, not by luck. ``data`` may then be left out.

    :param data: held-out argument tuples of the program.
    :param every: steps between evaluations.
    :param num_samples: ``K`` for each observation, at least 2.
    :param patience: training stops after so many evaluations in a row without a smaller gap, and the
        parameters of the smallest gap are put back; by default it does not stop.
    :param simulations: simulated observations for each held-out one, on which both divergences are
        bracketed by :func:`~llmppl.inference.bounds`; 0 leaves them out, as programs with factors need.
    :param references: log Z of each observation where it is known, e.g. by enumeration.
    :param seed: of the evaluations' random numbers.
    :param pairs: simulated pairs that training never sees, of :func:`~llmppl.simulate`.
    :param pairs_log_evidence: log Z of each pair's observation where it is known, or log Ẑ of long runs: then
        KL(p‖q), the mutual information less the gain, is reported as well.
    :raises TypeError, ValueError: malformed data or numbers.
    """

    data: Rows = ()
    every: int = 50
    num_samples: int = 32
    patience: int | None = None
    simulations: int = 1
    references: Sequence[float] | None = None
    seed: int = 0
    pairs: Sequence[SimulatedPair] | None = None
    pairs_log_evidence: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pairs is None or not isinstance(self.data, Sequence) or len(self.data):
            self.data = checked(self.data, "Evaluation.data")
        pairs = self.pairs
        listed = is_list(pairs) and hasattr(pairs, "__getitem__")
        if pairs is not None and not (listed and all(isinstance(pairs[n], SimulatedPair) for n in range(len(pairs)))):
            raise TypeError(
                "Evaluation.pairs must be simulated pairs: simulate(program, data, num_pairs=64) draws some."
            )
        if self.pairs_log_evidence is not None and len(self.pairs_log_evidence) != len(pairs or ()):
            raise ValueError(
                f"pairs_log_evidence has {len(self.pairs_log_evidence)} values of log Z for {len(pairs or ())} pairs. "
                "Give one for each."
            )
        for name, least in (("every", 1), ("num_samples", 2), ("simulations", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}. Leave it out to train all steps.")

    def settings(self) -> dict[str, Any]:
        """What a resumed run must agree with."""
        return {
            "every": self.every,
            "num_samples": self.num_samples,
            "simulations": self.simulations,
            "seed": self.seed,
            "data": digest(self.data),
            **({} if self.pairs is None else {"pairs": digest([dict(p.latents) for p in self.pairs])}),
            "references": None if self.references is None else digest([float(z) for z in self.references]),
        }


class HeldOut:
    """An evaluation as a run goes on: the best log Ẑ so far, the best step and its parameters.

    :param results: to which evaluations are appended.
    :param learning: whether the program is another at each evaluation.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        model: Program,
        guide: Program,
        parameters: Mapping[str, Tensor],
        vectorize_data: bool,
        results: list[Evaluated],
        learning: bool = False,
    ) -> None:
        self.learning = learning
        self.evaluation, self.model, self.guide = evaluation, model, guide
        self.parameters, self.vectorize_data, self.results = parameters, vectorize_data, results
        self.log_evidence: np.ndarray | None = None
        self.log_evidence_error: np.ndarray | None = None
        if evaluation.references is not None:
            self.log_evidence = np.asarray([float(z) for z in evaluation.references])
            self.log_evidence_error = np.zeros(len(self.log_evidence))
        self.data = checked(evaluation.data, "Evaluation.data", model) if len(evaluation.data) else []
        self.best_step: int | None = None
        self.best_parameters: dict[str, Tensor] = {}
        self.best_gains: Tensor | None = None
        self.gains: Tensor | None = None

    def due(self, step: int) -> bool:
        return step % self.evaluation.every == 0

    def exhausted(self) -> bool:
        """Whether the gap has not become smaller, or the gain larger, for long enough."""
        patience = self.evaluation.patience
        return patience is not None and sum(item.step > (self.best_step or 0) for item in self.results) >= patience

    def parted(self, step: int, losses: Sequence[float]) -> str:
        """Why the loss no longer says that the guide gets better: the gain has fallen by more than two standard errors
        of its paired difference while the loss has fallen, too. Empty where that is not so.

        :param losses: of all steps so far.
        """
        if self.gains is None or self.best_gains is None or self.best_step is None or step == self.best_step:
            return ""
        fallen = (self.best_gains - self.gains).numpy()
        error = fallen.std(ddof=1) / math.sqrt(len(fallen)) if len(fallen) > 1 else math.inf
        after = losses[self.best_step : step]
        before = losses[max(self.best_step - len(after), 0) : self.best_step]
        if not (fallen.mean() > 2 * error and (not before or np.mean(after) < np.mean(before))):
            return ""
        return (
            f"the held-out gain has fallen by {fallen.mean():.2f} ± {error:.2f} nats since step {self.best_step} while "
            "the training loss went on falling: the guide learns its pairs by heart. Stop there (patience=), draw more "
            "pairs, or train on a stream, simulate(program, data)."
        )

    def measure(self, step: int, seconds: float) -> Evaluated:
        """Evaluate the guide as it is.

        :param seconds: of the run so far.
        """
        start = time.monotonic()
        gain = None
        if self.evaluation.pairs is not None:
            with randomness_kept(self.evaluation.seed):
                gain = held_out_gain(
                    self.model,
                    self.guide,
                    self.evaluation.pairs,
                    self.vectorize_data,
                    self.evaluation.pairs_log_evidence,
                )
        elapsed = seconds + time.monotonic() - start
        result = self._of_gain(step, elapsed) if not len(self.evaluation.data) else self._measured(step, seconds, start)
        if gain is not None:
            result.gain, result.gain_error = gain.mean, gain.error
            self.gains = torch.from_numpy(gain.values)
            if gain.information is not None and math.isnan(result.kl_p_q[0]):
                result.kl_p_q = (gain.kl, gain.kl)
        better = (
            all(not item.gain >= result.gain for item in self.results)
            if gain is not None
            else all(not item.log_evidence >= result.log_evidence for item in self.results)
            if self.learning
            # With one log Z for all, the gaps are ordered as the ELBOs are.
            else all(not item.elbo >= result.elbo for item in self.results)
        )
        if better:
            self.best_step, self.best_gains = step, self.gains
            self.best_parameters = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.results.append(result)
        if len(self.evaluation.data):
            self._compare(self.results[-1:] if self.learning else self.results)
        return result

    def _of_gain(self, step: int, seconds: float) -> Evaluated:
        """An evaluation of the gain alone."""
        unknown = (math.nan, math.nan)
        nan = math.nan
        return Evaluated(step, nan, nan, nan, nan, nan, nan, kl_q_p=unknown, kl_p_q=unknown, seconds=seconds)

    def _measured(self, step: int, seconds: float, start: float) -> Evaluated:
        run = importance(
            self.model, self.guide, self.evaluation.num_samples, vectorize_data=self.vectorize_data, progress=False
        )
        # One seed a call: a guide whose texts are longer draws more, and the calls after it would differ.
        posteriors: list[Posterior] = []
        for args in self._calls():
            with randomness_kept(self.evaluation.seed + len(posteriors)):
                try:
                    posteriors.append(run(*args))
                except NoWeightError as refusal:
                    posteriors.append(refusal.posterior)
        elbo, elbo_error, log_evidence, error, ess = (
            np.concatenate([np.reshape(getattr(posterior, name), -1) for posterior in posteriors])
            for name in ("elbo", "elbo_error", "log_evidence", "log_evidence_error", "ess")
        )
        self._improve(log_evidence, error)
        bracket = self._bracket()
        result = Evaluated(
            step=step,
            gap=math.nan,
            gap_error=math.nan,
            elbo=float(elbo.mean()),
            elbo_error=float(np.sqrt(np.square(elbo_error).sum()) / len(elbo)),
            log_evidence=float(log_evidence.mean()),
            ess=float(ess.mean()),
            kl_q_p=_values(None if bracket is None else bracket.kl_q_p),
            kl_p_q=_values(None if bracket is None else bracket.kl_p_q),
            seconds=seconds + time.monotonic() - start,
        )
        result.impossible = float(np.mean([np.mean(p.impossible) / p.num_samples for p in posteriors]))
        return result

    def restore(self) -> None:
        """Put the best evaluated parameters back."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best_parameters[name])

    def state_dict(self) -> dict[str, Any]:
        known = self.log_evidence is not None
        return {
            "log_evidence": torch.from_numpy(self.log_evidence) if known else None,
            "log_evidence_error": torch.from_numpy(self.log_evidence_error) if known else None,
            "best_step": self.best_step,
            "best_parameters": self.best_parameters,
            "best_gains": self.best_gains,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["log_evidence"] is not None:
            self.log_evidence = state["log_evidence"].numpy()
            self.log_evidence_error = state["log_evidence_error"].numpy()
        self.best_step, self.best_parameters = state["best_step"], state["best_parameters"]
        self.best_gains = state["best_gains"]

    def _calls(self) -> Iterator[tuple[Any, ...]]:
        data, size = self.data, ROWS
        if not self.vectorize_data:
            yield from data
            return
        for start in range(0, len(data), size):
            yield collate(data[start : start + size])

    def _improve(self, log_evidence: np.ndarray, error: np.ndarray) -> None:
        if self.log_evidence is None or self.log_evidence_error is None or self.learning:
            self.log_evidence, self.log_evidence_error = log_evidence.copy(), error.copy()
        if self.log_evidence.shape != log_evidence.shape:
            raise ValueError(
                f"references= has {len(self.log_evidence)} values of log Z, but there are {len(log_evidence)} held-out "
                "observations. Give one for each."
            )
        if self.evaluation.references is None:
            better = log_evidence > self.log_evidence
            self.log_evidence[better], self.log_evidence_error[better] = log_evidence[better], error[better]

    def _compare(self, results: list[Evaluated]) -> None:
        """The gaps of evaluations against one log Z."""
        assert self.log_evidence is not None
        assert self.log_evidence_error is not None
        mean = float(self.log_evidence.mean())
        squares = float(np.square(self.log_evidence_error).sum()) / len(self.log_evidence) ** 2
        for item in results:
            item.gap = mean - item.elbo
            item.gap_error = math.sqrt(item.elbo_error**2 + squares)

    def _bracket(self) -> Bounds | None:
        if not self.evaluation.simulations:
            return None
        run = bounds(
            self.model, self.guide, self.evaluation.num_samples, self.evaluation.simulations, self.vectorize_data
        )
        parts: list[Bounds] = []
        for args in self._calls():
            with randomness_kept(self.evaluation.seed + len(parts)):
                parts.append(run(*args))
        return Bounds.join(parts)


def _values(bracket: tuple[Estimate, Estimate | None] | None) -> tuple[float, float]:
    if bracket is None or bracket[1] is None:
        return math.nan, math.nan
    return bracket[0].value, bracket[1].value
