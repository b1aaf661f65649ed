"""gap_report(): the inference gap in its parts, by fitting the guide's family to each observation alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO
from tqdm.auto import tqdm

from llmppl.diagnostics.family import Family, left_as_it_was
from llmppl.inference.enumeration import exact_posterior
from llmppl.inference.importance import importance
from llmppl.network.random_states import randomness_kept
from llmppl.objectives import LeaveOneOutELBO, TrajectoryBalance
from llmppl.objectives.behaviour import Behaviour
from llmppl.posterior.exactness import check_weights
from llmppl.posterior.gap_parts import GapReport, Gaps
from llmppl.posterior.posterior import Posterior
from llmppl.programs.particles import common_axes
from llmppl.programs.structure import Program, is_latent, structure
from llmppl.text.arguments import check_programs
from llmppl.text.declared import declared
from llmppl.training.fit import fit
from llmppl.training.minibatches import Rows, checked

PARTICLES = 16
ENUMERABLE = 10_000
"""Combinations of latent values up to which log Z is enumerated; about what fits draw for a few x."""


@declared
def gap_report(
    model: Program,
    guide: Program,
    data: Rows,
    held_out: Rows | None = None,
    num_samples: int = 128,
    steps: int = 100,
    restarts: int = 1,
    objective: ELBO | None = None,
    learning_rate: float = 3e-3,
    references: Sequence[float] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> GapReport:
    r"""The inference gap of a guide in its two parts [1], on training and on held-out observations.

    .. math:: \underbrace{\log Z - \mathcal L(q_{\phi(x)})}_{\text{inference}}
              = \underbrace{\log Z - \mathcal L(q^*_x)}_{\text{approximation}}
              + \underbrace{\mathcal L(q^*_x) - \mathcal L(q_{\phi(x)})}_{\text{amortization}}

    with :math:`\mathcal L` the ELBO and :math:`q^*_x` the member of the same family that is best for
    ``x`` alone. Each ``x`` is a call of the program of its own. The guide is fitted to it from its
    present parameters and from ``restarts`` fresh ones; the best of these members and of the guide as it
    is, which belongs to the family, too, is chosen by its ELBO on ``num_samples`` latents and evaluated
    on as many others. Then everything is put back: parameters, gradients, Pyro's store, random
    generators, also after an error. Parameters of the program are not trained.

    log Z is exact where the latents have at most 10 000 combinations of values, or where ``references``
    are given. Elsewhere log Ẑ by importance sampling with the best member, from the latents of its
    evaluation, stands for it: below log Z in expectation, so that the inference gap is a lower bound. A
    fit may stop short of :math:`q^*_x`: the amortization gap, in which log Z cancels, is a lower bound,
    too, and given log Z the approximation gap an upper one. Of a guide on an extended space
    (:attr:`exactness`) the approximation gap holds the auxiliary gap as well.

    Generalisation and regularisation are read off the two columns: an amortization gap that is larger
    on held-out x is the price of new x, large ones on both sides are that of one guide for all.

    For each ``x`` it costs ``(1 + restarts) * steps`` steps of the objective, and ``(4 + restarts) *
    num_samples`` latents drawn and scored. With the default objective of 16 particles a step draws 16
    latents, scores them with the program, and takes a gradient through the guide at 16.

    :param model: the program.
    :param guide: any guide whose parameters are a module's own or stand in Pyro's store. Fresh starts
        need a ``reset_parameters()`` of every module with parameters, as the ready guides and torch's
        layers have; without it the fits start from the guide's present parameters only.
    :param data: observations that the guide was trained on, as tuples of the program's arguments.
    :param held_out: others.
    :param num_samples: latents for each ELBO and log Ẑ, at least 2.
    :param steps: of each fit.
    :param restarts: fits from fresh parameters for each ``x``.
    :param objective: what is minimised for an ``x``; each fit takes a copy. By default trajectory balance
        with 16 particles, a quarter of them replayed, for half of the steps, then the ELBO itself with a
        leave-one-out baseline.
    :param learning_rate: of each fit, as in :func:`~llmppl.fit`; it falls to zero by half a cosine.
    :param references: log Z where it is known, of each of ``data`` and then of ``held_out``.
    :param seed: of every random number. The numbers of an ``x`` depend on its place, not on other x.
    :param progress: show a progress bar if it takes more than a few seconds.
    :raises TypeError, ValueError: malformed data or numbers; an ``x`` that is several observations, in a
        plate; what :func:`~llmppl.importance` and the objective refuse.

    References

    [1] Cremer, Li, Duvenaud (2018), `Inference suboptimality in variational autoencoders`.
    """
    check_programs(model=model, guide=guide)
    check_weights(guide)
    data = checked(data, program=model)
    everything = data + ([] if held_out is None else checked(held_out, "held_out", model))
    for name, number, least in (("num_samples", num_samples, 2), ("steps", steps, 1), ("restarts", restarts, 0)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}.")
    if references is not None:
        references = [float(z) for z in references]
        if len(references) != len(everything):
            raise ValueError(
                f"references= has {len(references)} values of log Z, but there are {len(everything)} observations. "
                "Give one for each of data, then one for each of held_out."
            )
        if not all(map(math.isfinite, references)):
            raise ValueError(f"references= must be finite, got {references}. Leave it out where log Z is not known.")
    if objective is not None and not isinstance(objective, ELBO):
        raise TypeError(f"objective must be an ELBO such as TrajectoryBalance(num_particles=16), got {objective!r}.")
    with (
        randomness_kept(seed),
        left_as_it_was(model, guide, everything),
        tqdm(desc="gap_report", disable=not progress, delay=5, leave=False) as bar,
    ):
        for n, x in enumerate(everything):
            _check_single(model, guide, x, f"data[{n}]" if n < len(data) else f"held_out[{n - len(data)}]")
        families = [Family(guide, x) for x in everything]
        starts = _starts(families, restarts)
        bar.total = len(everything) * (len(starts) - 1) * steps
        points = []
        for n, (x, family) in enumerate(zip(everything, families, strict=True)):
            with randomness_kept(seed + n):
                search = _Search(model, guide, x, family, num_samples)
                for start in range(1, len(starts)):
                    search.fit(objective, steps, learning_rate, anew=start > 1, bar=bar)
                points.append(search.point(None if references is None else references[n]))
    exact = sum(point.exact for point in points)
    gaps = _gathered(points, starts)
    return GapReport(
        train=_rows(gaps, slice(None, len(data))),
        held_out=None if held_out is None else _rows(gaps, slice(len(data), None)),
        certified=exact == len(points),
        source=_source(exact, len(points), references is not None, num_samples),
    )


@dataclass(frozen=True)
class _Point:
    """One observation's numbers."""

    log_evidence: float
    log_evidence_error: float
    guide: Posterior
    best: Posterior
    start_elbo: list[float]
    best_start: int
    exact: bool


class _Search:
    """The search for the family's best member for one observation."""

    def __init__(self, model: Program, guide: Program, x: tuple[Any, ...], family: Family, num_samples: int) -> None:
        self.model, self.guide, self.x, self.family = model, guide, x, family
        self._importance = importance(model, guide, num_samples, progress=False)
        self.amortized = family.member()
        self.members = [self.amortized]
        # One to report, one to compare by.
        self.as_it_is = self._importance(*x)
        self.compared = [self._importance(*x)] if family.parameters else [self.as_it_is]

    def fit(self, objective: ELBO | None, steps: int, learning_rate: float, anew: bool, bar: tqdm) -> None:
        """Fit to this observation alone, from the guide's parameters or from fresh ones."""
        self.family.become(self.amortized)
        if anew:
            self.family.start_anew()
        for phase, count in _phases(steps) if objective is None else [(copy.deepcopy(objective), steps)]:
            with torch.enable_grad():
                fit(
                    self.model,
                    self.guide,
                    [self.x],
                    phase,
                    steps=count,
                    learning_rate=learning_rate,
                    warmup_steps=count // 10,
                    weight_decay=0.0,
                    schedule="cosine",
                    progress=False,
                    callback=lambda step, history: bar.update(),
                )
        self.members.append(self.family.member())
        self.compared.append(self._importance(*self.x))

    def point(self, reference: float | None) -> _Point:
        """The best member, evaluated afresh, and log Z."""
        elbo = [float(posterior.elbo.item()) for posterior in self.compared]
        chosen = int(np.argmax(elbo))
        best = self.as_it_is
        if chosen > 0:
            self.family.become(self.members[chosen])
            best = self._importance(*self.x)
        self.family.become(self.amortized)
        evidence = reference if reference is not None else _enumerated(self.model, self.x)
        exact, error = evidence is not None, 0.0
        if evidence is None:
            # Not the largest log Ẑ of all: of a narrow member's few lucky weights it was seen 2 nats above log Z.
            evidence, error = float(best.log_evidence.item()), float(best.log_evidence_error.item())
        return _Point(evidence, error, self.as_it_is, best, elbo, chosen, exact)


def _phases(steps: int) -> list[tuple[ELBO, int]]:
    """The default objectives of a fit, with their steps.

    The ELBO alone loses modes for good: on the enumerable twin one fit in four by leave-one-out ended 2.7 nats
    short. Replay of what the guide underrates brings them back (0.1), but is after another optimum where the
    family misses the posterior: 0.5 nats short on two discrete causes taken as independent. Hence one, then the
    other.
    """
    first: list[tuple[ELBO, int]] = [(TrajectoryBalance(PARTICLES, behaviour=Behaviour(replayed=0.25)), steps // 2)]
    return (first if steps > 1 else []) + [(LeaveOneOutELBO(PARTICLES), steps - steps // 2)]


def _starts(families: Sequence[Family], restarts: int) -> tuple[str, ...]:
    """The candidates for the best member, by name."""
    if not any(family.parameters for family in families):
        return ("the guide as it is",)
    anew = range(1, restarts + 1) if all(family.starts_anew for family in families) else ()
    return ("the guide as it is", "fitted", *(f"fitted anew ({n})" if restarts > 1 else "fitted anew" for n in anew))


def _check_single(model: Program, guide: Program, x: tuple[Any, ...], name: str) -> None:
    """Refuse several observations in one call: a fit to all of them is a fit to none alone."""
    traces = [structure(program, x, {}) for program in (model, guide)]
    axes = common_axes(*traces)
    frames = {f for site in traces[0].nodes.values() if site["type"] == "sample" for f in site["cond_indep_stack"]}
    rows = math.prod(f.size for f in frames if f.vectorized and f.dim in axes)
    if rows > 1:
        raise ValueError(
            f"{name} holds {rows} observations, the rows of a plate. The guide is fitted to each alone: make each a "
            "tuple of its own, e.g. [(['a'], ['b']), (['c'], ['d'])] instead of [(['a', 'c'], ['b', 'd'])]."
        )


def _enumerated(model: Program, x: tuple[Any, ...]) -> float | None:
    """log Z where enumeration costs little."""
    size = 1.0
    for site in structure(model, x, {}).nodes.values():
        if not is_latent(site):
            continue
        if not site["fn"].has_enumerate_support:
            return None
        law = getattr(site["fn"], "law", None)
        size *= len(site["fn"].enumerate_support(expand=False)) if law is None else law.support_size()
    if size > ENUMERABLE:
        return None
    try:
        return float(exact_posterior(model)(*x).log_evidence.item())
    except ValueError:
        # A latent inside a plate; whatever else is wrong importance sampling has met.
        return None


def _source(exact: int, count: int, given: bool, num_samples: int) -> str:
    if given:
        return "the references given"
    sampled = f"importance sampling with each x's best member ({num_samples} samples), a lower bound"
    if exact == count:
        return "enumeration"
    return sampled if not exact else f"enumeration for {exact} x, else {sampled}"


def _gathered(points: Sequence[_Point], starts: tuple[str, ...]) -> Gaps:
    def column(values: Iterator[Any]) -> np.ndarray:
        return np.array([float(np.asarray(value).item()) for value in values])

    return Gaps(
        log_evidence=column(p.log_evidence for p in points),
        log_evidence_error=column(p.log_evidence_error for p in points),
        elbo=column(p.guide.elbo for p in points),
        elbo_error=column(p.guide.elbo_error for p in points),
        best_elbo=column(p.best.elbo for p in points),
        best_elbo_error=column(p.best.elbo_error for p in points),
        starts=starts,
        start_elbo=np.array([p.start_elbo for p in points]).T,
        best_start=np.array([p.best_start for p in points]),
    )


def _rows(gaps: Gaps, rows: slice) -> Gaps:
    arrays = {name: value[..., rows] for name, value in vars(gaps).items() if isinstance(value, np.ndarray)}
    return Gaps(**arrays, starts=gaps.starts)
