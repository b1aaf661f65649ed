"""What a program says of something finite, averaged over the latents that lead there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.inference.blocks import block_size
from llmppl.programs.particles import common_axes, compute_log_prob, sum_site
from llmppl.programs.plates import in_data_plate, in_particles
from llmppl.programs.structure import Program, is_deterministic, plate_nesting, structure
from llmppl.text.arguments import check_count, check_programs
from llmppl.text.declared import declared


@dataclass(frozen=True)
class Prediction:
    """Probabilities of a finite site's values, averaged over sampled latents.

    :param options: the values: strings of a choice, numbers of other distributions.
    :param probabilities: ``batch_shape + (n,)``.
    :param error: their Monte Carlo standard errors; NaN of a single sample.
    :param num_samples: ``K``.
    :param ess: effective sample size of the latents, of shape ``batch_shape``; ``K`` where nothing weighs them.
    """

    options: list[Any]
    probabilities: np.ndarray
    error: np.ndarray
    num_samples: int
    ess: np.ndarray

    @property
    def best(self) -> Any:
        """The most probable value, one for each row of the batch, in nested lists."""
        return _named(self.probabilities.argmax(-1), self.options)

    def __repr__(self) -> str:
        if self.probabilities.ndim > 1:
            rows = " x ".join(map(str, self.probabilities.shape[:-1]))
            return f"Prediction({rows} rows, options={self.options}, {self._samples})"
        shown = (
            f"{o!r}: {p:.3f} ± {e:.3f}" for o, p, e in zip(self.options, self.probabilities, self.error, strict=True)
        )
        return f"Prediction({', '.join(shown)}, {self._samples})"

    @property
    def _samples(self) -> str:
        least = float(self.ess.min())
        weighed = f", ESS {least:.1f}" if least < self.num_samples * (1 - 1e-9) else ""
        return f"{self.num_samples} samples{weighed}"


@declared
def predict(
    model: Program, site: str, num_samples: int = 16, guide: Program | None = None, vectorize_data: bool = False
) -> Callable[..., Prediction]:
    r"""The posterior predictive of a finite site: a function of the program's arguments, without that of the site.

    .. math:: p(y|x) = \mathbb E_{z \sim p(z|x)}\, p(y|x, z) \approx \frac1K\sum_k p(y|x, z_k)

    Every value's probability counts, not only that of a value that was drawn: Rao-Blackwell's estimate. Latents come
    from the prior, :math:`p(z)`, and are weighed by whatever else the program observes or holds as a factor before the
    site; without any, the estimate is unbiased, and with them of bias :math:`1/K`, as self-normalised ones are.

    :param site: a site whose values can be listed, such as ``lm.choice``; a program of :mod:`llmppl.models` draws it
        where its argument is left out.
    :param num_samples: ``K``.
    :param guide: draws the latents instead, of what it is told, and the program says the rest; not told the site, as it
        is unknown (Hu et al. 2024, sec. 4.4). No weights are taken, of observations and factors neither: a guide that
        was trained on the posterior given the site's values then has learned what the program has not.
    :param vectorize_data: the returned function takes lists in place of its arguments, as that of
        :func:`~llmppl.importance` does.
    :raises ValueError: no such site, or one whose values cannot be listed; an observation or factor behind the site,
        which may depend on its value; no draw that the observations permit.
    """
    check_programs(model=model)
    if guide is not None:
        check_programs(guide=guide)
    check_count(num_samples=num_samples)
    if vectorize_data:
        model, guide = in_data_plate(model), None if guide is None else in_data_plate(guide)

    def run(*args: Any, **kwargs: Any) -> Prediction:
        sites = structure(model, args, kwargs)
        _check_site(sites, site)
        if guide is None:
            check_nothing_behind(sites, site)
        parts, weights, fn = [], [], None
        with torch.no_grad():
            for trace in drawn_traces(model, guide, site, num_samples, block_size(model, args, kwargs), args, kwargs):
                fn = trace.nodes[site]["fn"]
                values = fn.enumerate_support(expand=False)
                probabilities = fn.log_prob(values).exp()  # (n, K) + batch_shape
                count = fn.batch_shape[0]
                parts.append(probabilities.expand(len(values), count, *probabilities.shape[2:]).movedim(0, -1))
                weights.append(other_evidence(trace, site, guide is not None))
        drawn = torch.cat(parts).double().cpu().numpy()
        shares = normalised(weights, drawn.shape[:-1])
        return Prediction(_options(fn), *weighed(drawn, shares), num_samples, ess_of(shares))

    return run


def drawn_traces(
    model: Program,
    guide: Program | None,
    site: str,
    num_samples: int,
    block: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Iterator[poutine.Trace]:
    """Runs of the program on latents that it, or a guide, has drawn, at most ``block`` particles in each; ``site`` is
    the program's own in any case."""
    nesting = plate_nesting(structure(model, args, kwargs))
    for first in range(0, num_samples, block):
        count = min(block, num_samples - first)
        program = in_particles(model, count, nesting)
        if guide is not None:
            proposed = poutine.trace(in_particles(guide, count, nesting)).get_trace(*args, **kwargs)
            if site in proposed.nodes:
                proposed.remove_node(site)
            program = poutine.replay(program, trace=proposed)
        yield poutine.trace(program).get_trace(*args, **kwargs)


def other_evidence(trace: poutine.Trace, site: str, guided: bool) -> Tensor:
    """What else than ``site`` weighs a run's latents, that the prior has drawn: log-densities of the other observations
    and of the factors, ``(K,)`` and a dimension for each of the program's plates, of size 1 but for its rows; nats."""
    nodes = {
        name: dict(node) for name, node in trace.nodes.items() if name != site and not guided and is_evidence(node)
    }
    if not nodes:
        return torch.zeros(())
    part = poutine.Trace()
    part.nodes.update(nodes)
    compute_log_prob(part)
    nesting, axes = plate_nesting(trace) - 1, common_axes(trace)  # the particles' plate is outside of the program's
    terms = [sum_site(node["log_prob"], axes, nesting, keepdim=True) for node in part.nodes.values()]
    return torch.as_tensor(sum(terms))


def is_evidence(node: Any) -> bool:
    """Whether a site says something of the latents before it: an observation, or a factor."""
    return bool(
        node["type"] == "sample" and node["is_observed"] and not is_deterministic(node) and not site_is_subsample(node)
    )


def check_nothing_behind(sites: poutine.Trace, name: str) -> None:
    """Refuse what is observed behind a site: it may depend on the site's value, of which each is asked for.

    :raises ValueError: naming both.
    """
    order = list(sites.nodes)
    behind = [other for other in order[order.index(name) + 1 :] if is_evidence(sites.nodes[other])]
    if behind:
        raise ValueError(
            f"site {behind[0]!r} is observed, or a factor, behind site={name!r}, and may depend on its value. Use "
            f"importance(...) or smc(...), which weigh whole runs, with {name!r} left latent."
        )


def normalised(log_weights: list[Tensor], shape: tuple[int, ...]) -> np.ndarray:
    """Weights that sum to one over the draws, of ``shape``, ``(K,) + batch_shape``.

    :raises ValueError: a row of which no draw has weight.
    """
    if not any(own.dim() for own in log_weights):
        return np.full(shape, 1 / shape[0])
    logs = np.broadcast_to(torch.cat(log_weights).double().cpu().numpy(), shape)
    largest = logs.max(0)
    if np.isneginf(largest).any():
        raise ValueError(
            f"none of the {shape[0]} draws of the prior is possible under what else the program observes. Take more "
            "draws, num_samples=, or a guide that is told it, guide=."
        )
    weights = np.exp(logs - largest)
    return np.asarray(weights / weights.sum(0))


def weighed(drawn: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighed means over the draws of ``(K,) + batch_shape + (n,)`` and their standard errors, by the delta method; NaN
    of a single draw."""
    count, own = len(drawn), shares[..., None]
    mean = (own * drawn).sum(0)
    if count == 1:
        return mean, np.full(mean.shape, np.nan)
    return mean, np.sqrt(count / (count - 1) * np.square(own * (drawn - mean)).sum(0))


def ess_of(shares: np.ndarray) -> np.ndarray:
    """Kish's effective sample size of normalised weights."""
    return np.asarray(1 / np.square(shares).sum(0))


def _check_site(sites: poutine.Trace, name: str) -> None:
    site = sites.nodes.get(name)
    if site is None or site["type"] != "sample":
        known = [n for n, s in sites.nodes.items() if s["type"] == "sample" and not n.startswith("_")]
        raise ValueError(f"site={name!r} is no site of the program, which has {known}.")
    if not getattr(site["fn"], "has_enumerate_support", False):
        raise ValueError(
            f"site={name!r} is a {type(site['fn']).__name__}, whose values cannot be listed. Name a finite one, such "
            "as lm.choice."
        )


def _options(fn: Any) -> list[Any]:
    values: Tensor = fn.enumerate_support(expand=False)
    if isinstance(fn, ConditionedText):
        return list(fn.lm.decode(values.flatten(0, -2)))
    return list(values.flatten().tolist())


def _named(index: np.ndarray, options: list[Any]) -> Any:
    return options[int(index)] if index.ndim == 0 else [_named(row, options) for row in index]
