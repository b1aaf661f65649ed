"""One call that says how far a guide can be trusted, and which number says so."""

from __future__ import annotations

import html
import math
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from tqdm.auto import tqdm

from llmppl.diagnostics import findings as say
from llmppl.diagnostics.calibration import Calibration, call_seed
from llmppl.diagnostics.findings import Exact, Finding
from llmppl.diagnostics.ranks import ranks_of
from llmppl.distributions.process_text import ProcessText
from llmppl.inference.enumeration import exact_posterior
from llmppl.inference.importance import importance
from llmppl.inference.simulated_pairs import (
    Array,
    Pair,
    Scored,
    draw_scored,
    placed,
    score_given,
    scored,
    simulated_pair,
)
from llmppl.inference.stages import latents_of
from llmppl.network.random_states import randomness_kept
from llmppl.posterior.brackets import Bounds
from llmppl.posterior.exactness import check_weights, exactness_of, scores_given
from llmppl.posterior.posterior import Posterior
from llmppl.programs.observations import observing
from llmppl.programs.plates import in_data_plate
from llmppl.programs.structure import Program, Site, is_latent, structure
from llmppl.text.arguments import check_programs
from llmppl.text.declared import declared
from llmppl.training.collation import collate
from llmppl.training.minibatches import Rows, checked

ENUMERABLE = 2000
"""Combinations of latents of one observation up to which its posterior is enumerated."""
ROWS = 16
"""Observations that are run together where the data are vectorised."""
WIDTH = 118
MARKS = {"certified": "certified", "suggested": "suggested", "failed": "FAILED", "unknown": "unknown"}
FAILURES = {
    "density": "the guide's probabilities are wrong",
    "modes": "the guide misses part of the posterior",
    "evidence": "log Z is not known to 1 nat",
    "prior": "log Ẑ is too low",
    "weights": "the weights on the data cannot be relied on",
}


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What :func:`diagnose` found.

    :param verdict: one line.
    :param findings: each with its status, claim, number and advice.
    :param posterior: by importance sampling on the data: one with rows, or one a call of the program.
    :param bounds: on simulated observations; ``None`` where nothing could be simulated.
    :param calibration: of the guide's draws at the same simulated observations.
    :param seconds: that it took.
    """

    verdict: str
    findings: list[Finding]
    posterior: Posterior | list[Posterior]
    bounds: Bounds | None
    calibration: Calibration | None
    seconds: float

    def __repr__(self) -> str:
        lines = textwrap.wrap(f"Diagnosis: {self.verdict}", WIDTH, subsequent_indent="  ")
        for finding in self.findings:
            text = f"{MARKS[finding.status]:<10} {finding.claim}: {finding.number}"
            lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent=" " * 13)
        parts = [part for finding in self.findings for part in finding.advice.split("; ") if part]
        advice = ["; ".join(dict.fromkeys(parts))] if parts else []
        for text in advice:
            lines += textwrap.wrap(f"{'next':<10} {text}.", WIDTH, initial_indent="  ", subsequent_indent=" " * 13)
        return "\n".join([*lines, f"  {self.seconds:.0f} s"])

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr>"
            + "".join(
                f"<td style='text-align:left'>{html.escape(text)}</td>"
                for text in (finding.status, finding.claim, finding.number, finding.advice)
            )
            + "</tr>"
            for finding in self.findings
        )
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("status", "claim", "number", "next"))
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        return f"<p><b>{html.escape(self.verdict)}</b></p>{table}"


@declared
def diagnose(
    model: Program,
    guide: Program,
    data: Rows,
    num_samples: int = 24,
    simulations: int = 8,
    seed: int = 0,
    vectorize_data: bool = False,
    progress: bool = True,
) -> Diagnosis:
    r"""How far a guide can be trusted on these data: what is certified, what only suggested, what fails.

    ESS and k̂ see the guide's own draws only, so that a missed mode can leave them perfect. Hence, the
    strongest source first:

    1. *Enumeration*, where the latents of an observation have at most 2000 combinations: log Z and both
       divergences of these very ``x``, the mass where ``num_samples`` draws do not come
       (:math:`p(z|x) > K q(z|x)`), and whether the guide's probabilities sum to one. Certified for these ``x``.
    2. *Simulated pairs* :math:`(z^*, x^*)`, where :math:`z^*` is an exact posterior draw: two-sided bounds of
       log Z (as :func:`~llmppl.bounds`, from the same draws), how often :math:`z^*` outweighs all draws
       together, and calibration of the guide's draws (as :func:`~llmppl.calibrate`). Certified on average over
       simulated ``x``, up to their errors; of these ``x`` only suggested, and unknown where these look different.
    3. *The prior as another proposal* on these ``x``. By Markov's inequality a product of unbiased :math:`\hat Z`
       exceeds that of the Z by :math:`1/\delta` with probability :math:`\delta` at most: more evidence than that
       proves that the guide's is too low. Less proves nothing.
    4. *ESS and k̂* on these ``x``, with the limit :math:`\min(1 - 1/\log_{10} K, 0.7)` [1]: suggested only.

    Thresholds: 1 nat of log Z, a Bayes factor "not worth more than a bare mention" [2]; 1 % of the posterior
    missed; each must be passed by 3 standard errors or in an exact test at 0.135 %. Unweighted draws may fail while
    the weights are certified: the verdict then says to use the weights. The samples advised are
    :math:`\exp\mathrm{KL}(p\|q)` [3].

    The defaults are for a language model on two cores: about 60 samples of guide or prior for each of 8
    observations. They find gross failures. Where samples are cheap, ``num_samples=64, simulations=200`` finds
    a guide that misses a tenth of the posterior.

    :param data: argument tuples of the program, as :func:`~llmppl.fit` takes them.
    :param num_samples: ``K`` of the guide for each observation, real and simulated; k̂ takes 21. The prior
        draws a third of them.
    :param simulations: simulated pairs, at least so many in all, spread evenly over the data; 0 for none.
    :param seed: of all random numbers.
    :param vectorize_data: as for :func:`~llmppl.fit`.
    :param progress: show a progress bar if it takes more than a few seconds.
    :raises ValueError: as :func:`~llmppl.importance`. What cannot be simulated (a program with factors, a guide
        without a marginal density or without ``observations=``) is no error but a finding of status ``unknown``.

    References

    [1] Vehtari, Simpson, Gelman, Yao, Gabry (2024), `Pareto smoothed importance sampling`.
    [2] Kass, Raftery (1995), `Bayes factors`.
    [3] Chatterjee, Diaconis (2018), `The sample size required in importance sampling`.
    """
    check_programs(model=model, guide=guide)
    start = time.monotonic()
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}: a standard error takes two.")
    if simulations < 0:
        raise ValueError(f"simulations must not be negative, got {simulations}. Pass 0 to leave them out.")
    check_weights(guide)
    data = checked(data, program=model)
    calls = list(data)
    if vectorize_data:
        calls = [collate(data[n : n + ROWS]) for n in range(0, len(data), ROWS)]
        model, guide = in_data_plate(model), in_data_plate(guide)
    reason = _cannot_simulate(model, guide, calls[0]) if simulations else "simulations=0"
    repeats = 0 if reason else math.ceil(simulations / len(data))
    few = max(num_samples // 3, 2)

    posteriors: list[Posterior] = []
    priors: list[Scored] = []
    exact: list[Exact | None] = []
    pairs: list[Pair] = []
    ranks: list[dict[str, Array]] = []
    run = importance(model, guide, num_samples, progress=False)
    with (
        torch.no_grad(),
        tqdm(total=len(calls) * (2 + repeats), desc="diagnose", disable=not progress, delay=5, leave=False) as bar,
    ):
        for number, args in enumerate(calls):
            state = call_seed(seed, number)
            generator = np.random.default_rng(state)
            with randomness_kept(state):
                posteriors.append(run(*args))
                exact.append(_enumerated(model, guide, args, posteriors[-1]))
                bar.update()
                priors.append(draw_scored(model, latents_of(model), args, {}, few))
                bar.update()
                for _ in range(repeats):
                    pairs.append(simulated_pair(model, guide, args, {}, num_samples, generator))
                    ranks.append(ranks_of(pairs[-1], {}, generator))
                    bar.update()

    found: list[Finding] = []
    known = [each for each in exact if each is not None]
    if len(known) == len(calls):
        found += say.of_enumeration(_joined(known), num_samples)
    simulated, calibration = None, None
    if pairs:
        simulated, missed = _bounds(pairs)
        calibration = Calibration.join([Calibration(each, num_samples) for each in ranks])
        found += [*say.of_bounds(simulated, missed), say.of_calibration(calibration)]
    else:
        found.append(say.of_no_simulation(reason or ""))
    log_evidence, error, elbo = (
        np.concatenate([np.reshape(getattr(posterior, name), -1) for posterior in posteriors])
        for name in ("log_evidence", "log_evidence_error", "elbo")
    )
    if simulated is not None:
        found.append(say.of_likeness((log_evidence, elbo), (simulated.lower, simulated.elbo)))
    prior = np.concatenate([_log_mean(each.posterior.log_joint - each.log_q).reshape(-1) for each in priors])
    found += [say.of_prior(log_evidence, error, prior, few), say.of_weights(posteriors)]
    return Diagnosis(
        verdict=_verdict(found),
        findings=found,
        posterior=posteriors[0] if len(posteriors) == 1 else posteriors,
        bounds=simulated,
        calibration=calibration,
        seconds=time.monotonic() - start,
    )


def _verdict(found: Sequence[Finding]) -> str:
    def failing(scope: str) -> str:
        topics = [f.topic for f in found if f.status == "failed" and f.scope == scope and f.topic in FAILURES]
        return ", and ".join(FAILURES[topic] for topic in sorted(set(topics), key=list(FAILURES).index))

    here, there = failing("these x"), failing("simulated x")
    draws = any(f.topic == "draws" and f.status == "failed" for f in found)
    enumerated = any(f.topic == "modes" and f.scope == "these x" for f in found)
    if here or (there and not enumerated):
        elsewhere = "" if enumerated or not there else f"on simulated x {there}"
        return f"Failed: {'; '.join(part for part in (here, elsewhere) if part)}."
    unweighted = " Its draws without weights are not the posterior's." if draws else ""
    if enumerated:
        return "Certified for these x, by enumeration." + (f" But on simulated x {there}." if there else unweighted)
    status = {f.topic: f.status for f in found if f.scope == "simulated x"}
    if status.get("evidence") == status.get("modes") == "certified":
        if any(f.topic == "data" and f.status == "unknown" for f in found):
            return "Suggested only: certified on average over simulated x, but the data look different." + unweighted
        return "Certified on average over simulated x, and so suggested for these." + unweighted
    if "evidence" not in status:
        return "Unknown: nothing could be simulated, and ESS and k̂ do not see a missed mode."
    if draws:
        return "Unknown: the guide's draws are not the posterior's, and whether weights mend it takes more simulations."
    return "Suggested only: no failure seen, but too few simulations to certify."


def _cannot_simulate(model: Program, guide: Program, args: tuple[Any, ...]) -> str | None:
    """Why the program cannot be simulated for this guide; ``None`` if it can."""
    if not scores_given(guide):
        return f"the guide has no density of values that it did not draw (exactness {exactness_of(guide)!r})"
    for name, site in structure(model, args, {}).nodes.items():
        if site["type"] == "sample" and isinstance(site["fn"], dist.Unit):
            return f"the program has a factor, {name!r}"
    try:
        observing(model, guide, {})
    except TypeError:
        return "the guide takes no observations="
    return None


def _enumerated(model: Program, guide: Program, args: tuple[Any, ...], sampled: Posterior) -> Exact | None:
    """The guide against the enumerated posterior; ``None`` where that is too large or impossible."""
    size = 1.0
    for site in structure(model, args, {}).nodes.values():
        if is_latent(site):
            size *= _support_size(site, sampled.batch_shape)
    if size > ENUMERABLE or exactness_of(guide) != "marginal":
        return None
    try:
        exact = exact_posterior(model)(*args)
    except ValueError:
        # Supports or plates that depend on sampled values were not seen above: it is larger, or impossible.
        return None
    if exact.batch_shape != sampled.batch_shape or exact.num_samples > ENUMERABLE or _branches(exact):
        return None
    given = placed(model, guide, args, {}, exact.samples)
    of_guide = scored([score_given(model, guide, args, {}, given, exact.num_samples)])
    log_q = of_guide.log_q
    log_p = exact.log_joint - exact.log_evidence
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(invalid="ignore"):
        ratio = log_p - log_q
        return Exact(
            error=np.reshape(sampled.log_evidence - exact.log_evidence, -1),
            kl_q_p=np.where(q > 0, -q * ratio, 0.0).sum(0).reshape(-1),
            kl_p_q=np.where(p > 0, p * ratio, 0.0).sum(0).reshape(-1),
            missed=np.where(ratio > math.log(sampled.num_samples), p, 0.0).sum(0).reshape(-1),
            mass=q.sum(0).reshape(-1),
            combinations=exact.num_samples,
        )


def _support_size(site: Site, rows: tuple[int, ...]) -> float:
    """Values of a site in one observation: of a plate's entries, all combinations."""
    fn = site["fn"]
    if isinstance(fn, ProcessText):
        size = math.inf if fn.law.max_tokens is None else float(fn.law.support_size())
    else:
        size = float(len(fn.enumerate_support(expand=False))) if fn.has_enumerate_support else math.inf
    entries = max(math.prod(fn.batch_shape) // math.prod(rows), 1)
    return size**entries if entries * math.log(max(size, 1.0)) < math.log(1e9) else math.inf


def _branches(exact: Posterior) -> bool:
    """Whether some combinations lack a site: a guide's scores of those cannot be asked for at once."""
    return any(
        bool(((values < 0).all(-1) if name in exact.decoders else np.isnan(values.astype(np.float64))).any())
        for name, values in exact.samples.items()
        if name not in exact.deterministic
    )


def _joined(parts: Sequence[Exact]) -> Exact:
    names = ("error", "kl_q_p", "kl_p_q", "missed", "mass")
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return Exact(**columns, combinations=parts[0].combinations)


def _bounds(pairs: Sequence[Pair]) -> tuple[Bounds, Array]:
    """Bounds from the draws that the ranks were taken of, and which truths outweigh all draws together."""
    parts, missed = [], []
    for pair in pairs:
        assert pair.drawn is not None
        drawn = pair.drawn.posterior.log_joint - pair.drawn.log_q  # (K,) + batch_shape
        truth = pair.truth.posterior.log_joint - pair.truth.log_q
        parts.append(
            Bounds(
                lower=_log_mean(drawn).reshape(-1),
                upper=_log_mean(np.concatenate([drawn[:-1], truth])).reshape(-1),
                elbo=drawn.mean(0).reshape(-1),
                exact_log_weight=truth[0].reshape(-1),
                num_samples=len(drawn),
            )
        )
        missed.append((truth[0] > np.logaddexp.reduce(drawn, axis=0)).reshape(-1))
    return Bounds.join(parts), np.concatenate(missed)


def _log_mean(log_weights: Array) -> Array:
    return np.asarray(np.logaddexp.reduce(log_weights, axis=0) - math.log(len(log_weights)))
