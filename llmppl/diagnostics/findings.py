"""What numbers say of a guide, one finding each: certified, only suggested, failed, or unknown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmppl.diagnostics.calibration import Calibration
from llmppl.posterior.brackets import Bounds
from llmppl.posterior.doubts import FOR_LONG, LONG
from llmppl.posterior.posterior import Posterior

Array = np.ndarray
STATUS = ("certified", "suggested", "failed", "unknown")
TOLERANCE = 1.0
"""Nats of log Z that matter: a factor below e is "not worth more than a bare mention" (Kass and Raftery 1995)."""
ERRORS = 3.0
"""Standard errors that a number must be away from its threshold; a normal one is by chance in 0.13 %."""
CHANCE = 0.00135
"""The same probability, for exact tests."""
MISSED = 0.01
"""Share of the posterior that a guide may leave unfound; it fails where there is more."""
UNFOUND = 0.1
"""Share up to which "no more is missed" is called certified; the number itself is told."""
UNLIKE = 0.005
"""p-value below which data and simulated data are taken to differ."""
MANY = 100_000
"""Samples beyond which more of them are no advice."""

SLEEP = "train with sleep samples in the mix: Behaviour(sleep=0.25), or WakeSleep"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    :param status: ``certified``, by mathematics up to stated errors; ``suggested``, by numbers that can be
        fooled; ``failed``; or ``unknown``.
    :param claim: what was to be shown.
    :param number: which number says so, in words.
    :param advice: what to do next; empty where nothing is to be done.
    :param topic: ``evidence``, ``modes``, ``density``, ``draws``, ``weights``, ``prior`` or ``data``.
    :param scope: ``these x`` or ``simulated x``.
    """

    status: str
    claim: str
    number: str
    advice: str = ""
    topic: str = "evidence"
    scope: str = "these x"


@dataclass(frozen=True)
class Exact:
    """A guide against enumerated posteriors, one number a row; nats.

    :param error: log Ẑ of the guide's samples minus log Z.
    :param missed: posterior mass where p(z|x) > K q(z|x): where ``K`` draws of the guide do not come.
    :param mass: what the guide's probabilities sum to.
    """

    error: Array
    kl_q_p: Array
    kl_p_q: Array
    missed: Array
    mass: Array
    combinations: int


def of_enumeration(exact: Exact, count: int) -> list[Finding]:
    """Of these very observations, without any error but that of the sampled log Ẑ."""
    worst = float(exact.error[np.abs(exact.error).argmax()])
    wrong, missed = abs(worst) > TOLERANCE, float(exact.missed.max())
    found = [
        Finding(
            "failed" if wrong else "certified",
            f"log Ẑ is within {TOLERANCE:g} nat of log Z",
            f"off by {worst:+.2f} nats at worst of {exact.error.size} x ({exact.combinations:,} combinations)",
            "take log Z from exact_posterior()" if wrong else "",
        ),
        Finding(
            "failed" if missed > MISSED else "certified",
            "no mode is missed",
            f"{count} draws leave {missed:.1%} of a posterior unfound; KL(q‖p) {abs(exact.kl_q_p.mean()):.2f}, "
            f"KL(p‖q) {abs(exact.kl_p_q.mean()):.2f} nats",
            SLEEP if missed > MISSED else "",
            "modes",
        ),
    ]
    off = float(exact.mass[np.abs(exact.mass - 1).argmax()])
    if not abs(off - 1) <= 1e-3:
        found.append(
            Finding(
                "failed",
                "the guide's probabilities sum to one",
                f"they sum to {off:.4f}",
                "correct the guide's log_prob: no weight of it can be trusted",
                "density",
            )
        )
    return found


def of_bounds(found: Bounds, missed: Array) -> list[Finding]:
    """Of simulated observations.

    :param missed: for each, whether the simulated latents outweigh all draws together.
    """
    assert found.upper is not None
    assert found.exact_log_weight is not None
    count, size = found.num_samples, found.lower.size
    width = found.upper - found.lower
    with np.errstate(invalid="ignore"):  # infinite where the guide cannot go
        mean, error = float(width.mean()), _error(width)
        low, high = found.log_evidence
    certified, failed = mean + ERRORS * error <= TOLERANCE, mean - ERRORS * error > TOLERANCE
    # With probability zero under the guide there is no upper bound: neither right nor wrong.
    status = "unknown" if not math.isfinite(mean) else "certified" if certified else "failed" if failed else "unknown"
    finite = np.isfinite(width)
    least, most = (
        float((found.exact_log_weight - bound)[finite].mean()) if finite.all() else math.inf
        for bound in (found.upper, found.lower)
    )
    gap = f"{max(mean, 0.0):.2f} ± {error:.2f} nats apart" if math.isfinite(mean) else "no upper bound"
    evidence = Finding(
        status,
        f"{count} samples pin log Z down to {TOLERANCE:g} nat on average over simulated x",
        f"{low} to {high}, {gap}, {size} simulated x" if math.isfinite(mean) else f"{low} or more, {gap}",
        "" if status == "certified" else _more(least, most, status),
        "evidence",
        "simulated x",
    )
    from scipy import stats  # slow to import

    hits, impossible = int(missed.sum()), int((~finite).sum())
    limit = float(stats.binomtest(hits, size, alternative="less").proportion_ci(0.95).high)
    fails = impossible or stats.binomtest(hits, size, MISSED, alternative="greater").pvalue <= CHANCE
    status = "failed" if fails else "certified" if limit <= UNFOUND else "suggested" if not hits else "unknown"
    advice = f"{math.ceil(math.log(0.05) / math.log1p(-UNFOUND))} simulations without a miss certify {UNFOUND:.0%}"
    modes = Finding(
        status,
        "no mode is missed on average over simulated x",
        f"{hits} of {size} simulated latents outweigh all {count} draws together: at most {limit:.1%} missed (95 %)"
        + (f"; {impossible} have probability 0 under the guide" if impossible else ""),
        SLEEP if fails else "" if status == "certified" else advice,
        "modes",
        "simulated x",
    )
    return [evidence, modes]


def of_calibration(found: Calibration) -> Finding:
    """Of the guide's own draws, unweighted."""
    least = min(found.names, key=found.p_value)
    rejected = found.rejected
    return Finding(
        "failed" if rejected else "suggested",
        "the guide's draws, unweighted, rank as posterior draws do",
        f"SBC of {found.simulations} pairs, {found.num_draws} draws each, "
        + (f"rejected by {', '.join(rejected)}: " if rejected else "not rejected: ")
        + f"p {found.p_value(least):.2g} at least, limit {(1 - found.level) / len(found.names):.2g}",
        f"use its weights or resample(), not its draws; {SLEEP}" if rejected else "",
        "draws",
        "simulated x",
    )


def of_weights(posteriors: Sequence[Posterior]) -> Finding:
    """Of the weights on the data: what ESS and k̂ can see, and no missed mode."""
    count = posteriors[0].num_samples
    ess, khat = (np.concatenate([np.reshape(getattr(p, name), -1) for p in posteriors]) for name in ("ess", "khat"))
    limit = min(1 - 1 / math.log10(count), 0.7) if count > 1 else -math.inf
    # Few distinct weights make k̂ large although they are nearly equal; then the ESS is large too.
    bad = (ess < 2) | ((khat > limit) & (ess < count / 2))
    tokens = max(p.mean_tokens for p in posteriors)
    long = tokens >= LONG
    shape = f"k̂ {_range(khat)} (limit {limit:.2f})" if not np.isnan(khat).all() else f"no k̂ of {count} samples"
    return Finding(
        "failed" if bad.any() else "suggested",
        "the weights on the data can be relied on, if no mode is missed",
        f"{int(bad.sum())} of {len(ess)} x bad: {shape}, ESS {_range(ess, 1)} of {count}"
        + (f", texts of {tokens:.0f} tokens" if long else ""),
        "" if not bad.any() else FOR_LONG if long else "more samples, smc(), or more training",
        "weights",
    )


def of_prior(guided: Array, errors: Array, prior: Array, count: int) -> Finding:
    """Of the evidence that the prior finds as a proposal, against the guide's.

    :param guided, errors: the guide's log Ẑ of each observation and its standard error.
    :param prior: the prior's log Ẑ.
    """
    excess = float((prior - guided).sum())
    # Ẑ/Z has mean one, and so has the product over observations: it exceeds 1/δ with probability at most δ.
    limit = -math.log(CHANCE) + ERRORS * float(np.sqrt(np.square(errors).sum()))
    failed = excess > limit
    return Finding(
        "failed" if failed else "suggested",
        "another proposal, the prior, finds no more evidence",
        f"its log Ẑ ({count} samples) is {excess / len(guided):+.1f} nats from the guide's"
        + (f", beyond the {limit / len(guided):.1f} of chance" if failed else ""),
        f"the guide misses mass here: {SLEEP}" if failed else "",
        "prior",
    )


def of_likeness(data: tuple[Array, Array], simulated: tuple[Array, Array]) -> Finding:
    """Of whether what holds on simulated observations says something of the data.

    :param data, simulated: log Ẑ and ELBO of each observation.
    """
    from scipy import stats  # slow to import

    parts, p_values = [], []
    for name, ours, theirs in (
        ("log Ẑ", data[0], simulated[0]),
        # Rounded, lest the last digits of equal weights be compared.
        ("log Ẑ − ELBO", np.round(data[0] - data[1], 3), np.round(simulated[0] - simulated[1], 3)),
    ):
        ours, theirs = ours[np.isfinite(ours)], theirs[np.isfinite(theirs)]
        if len(ours) and len(theirs):
            p_values.append(float(stats.mannwhitneyu(ours, theirs).pvalue))
            parts.append(f"{name} {np.median(ours):.1f} against {np.median(theirs):.1f} (p {p_values[-1]:.2g})")
    unlike = min(p_values, default=0.0) <= UNLIKE
    return Finding(
        "unknown" if unlike else "suggested",
        "the data look like the simulated x",
        "medians: " + "; ".join(parts),
        "what holds on simulated x says little of these, compare with smc()" if unlike else "",
        "data",
    )


def of_no_simulation(reason: str) -> Finding:
    return Finding(
        "unknown",
        "no mode is missed",
        "nothing was simulated: " + reason,
        "compare with smc(), or write the condition as an observed site"
        if "factor" in reason
        else "ask for simulations, with a guide that takes observations=",
        "modes",
        "simulated x",
    )


def _more(least: float, most: float, status: str) -> str:
    """How many samples it takes: about exp KL(p‖q) (Chatterjee and Diaconis 2018), between bounds."""
    if not most <= math.log(MANY):
        return "samples alone will hardly do, use smc() or retrain"
    low, high = (math.ceil(math.exp(max(each, 0.0))) for each in (least, most))
    samples = f"more samples, about exp KL(p‖q) = {low:,} to {high:,}, or smc()"
    return f"more simulations; {samples}" if status == "unknown" else samples


def _error(values: Array) -> float:
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.inf


def _range(values: Array, digits: int = 2) -> str:
    low, high = np.nanmin(values), np.nanmax(values)
    return f"{low:.{digits}f}" if low == high else f"{low:.{digits}f} to {high:.{digits}f}"
