"""A posterior over text as weighted samples. Needs numpy only."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmppl.inference.pareto import pareto_k

Array = NDArray[Any]
EXACTNESS = ("marginal", "conditional", "extended", "none")


@dataclass(repr=False)
class Posterior:
    r"""Samples of a program's latent sites with unnormalised weights.

    :param samples: by site, ``(K,) + batch_shape + event_shape``.
    :param log_weights: ``(K,) + batch_shape``, nats. From importance sampling
        :math:`\log p(x, z_k) - \log q(z_k|x)`; from enumeration :math:`\log p(x, z_k)`.
    :param log_joint: :math:`\log p(x, z_k)`, same shape.
    :param method: ``"importance"`` or ``"enumeration"``.
    :param exactness: what the weights are exact for: the guide's ``marginal`` density, one
        ``conditional`` on auxiliary choices, an ``extended`` space, or ``none``.
    :param decoders: by text site, a function from one text's ids to a string.
    :param observed: the observed texts, by site.
    """

    samples: Mapping[str, Array]
    log_weights: Array
    log_joint: Array
    method: str = "importance"
    exactness: str = "marginal"
    decoders: Mapping[str, Callable[[Array], str]] = field(default_factory=dict)
    observed: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in ("importance", "enumeration"):
            raise ValueError(f"method={self.method!r} must be 'importance' or 'enumeration'.")
        if self.exactness not in EXACTNESS:
            raise ValueError(f"exactness={self.exactness!r} must be one of {EXACTNESS}.")
        if self.exactness == "none":
            raise ValueError(
                "the guide's log-probability is not that of its samples (exactness 'none'), so there are no "
                "importance weights. Use a guide with an exact density."
            )

    @property
    def num_samples(self) -> int:
        return self.log_weights.shape[0]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.log_weights.shape[1:]

    # --- evidence and quality, each of shape batch_shape -------------------------------------------

    @property
    def log_evidence(self) -> Array:
        """log Z in nats. Exact by enumeration; by importance sampling the logarithm of an unbiased
        estimate of Z, below log Z in expectation."""
        total = _logsumexp(self.log_weights)
        return total if self.method == "enumeration" else total - math.log(self.num_samples)

    @property
    def log_evidence_error(self) -> Array:
        """Standard error of :attr:`log_evidence` by the delta method, nats; zero by enumeration.

        It is itself estimated from the weights, and too small where k̂ is above 0.7.
        """
        if self.method == "enumeration":
            return np.zeros(self.batch_shape)
        if self.num_samples < 2:
            return np.full(self.batch_shape, np.nan)
        relative = self.weights * self.num_samples
        return np.asarray(relative.std(0, ddof=1) / math.sqrt(self.num_samples))

    @property
    def weights(self) -> Array:
        """Normalised weights, ``(K,) + batch_shape``, summing to one over the samples."""
        return np.exp(self.log_weights - _logsumexp(self.log_weights))

    @property
    def ess(self) -> Array:
        """Effective sample size (Kish): (Σw)² / Σw². By enumeration, of the exact posterior itself."""
        return np.asarray(1.0 / np.square(self.weights).sum(0))

    @property
    def khat(self) -> Array:
        """Pareto k̂ of the weights (Vehtari et al. 2024): below 0.7 they can be relied on, if no mode
        was missed. −inf for equal weights; NaN where there are too few samples, or by enumeration. Where
        few texts have most of the mass the weights are few distinct numbers, and k̂ can be far above 0.7
        although they are nearly equal: read it beside :attr:`ess`."""
        if self.method == "enumeration":
            return np.full(self.batch_shape, np.nan)
        flat = self.log_weights.reshape(self.num_samples, -1)
        return np.array([pareto_k(column) for column in flat.T]).reshape(self.batch_shape)

    @property
    def elbo(self) -> Array:
        """Mean log-weight, the evidence lower bound of the guide, nats; of the exact posterior by
        enumeration it is log Z itself."""
        if self.method == "enumeration":
            return self.log_evidence
        return np.asarray(self.log_weights.mean(0))

    @property
    def elbo_error(self) -> Array:
        """Standard error of :attr:`elbo`, nats."""
        if self.method == "enumeration":
            return np.zeros(self.batch_shape)
        if self.num_samples < 2:
            return np.full(self.batch_shape, np.nan)
        with np.errstate(invalid="ignore"):  # a weight of zero: the ELBO is −inf, its error undefined
            return np.asarray(self.log_weights.std(0, ddof=1) / math.sqrt(self.num_samples))

    # --- samples -----------------------------------------------------------------------------------

    def resample(self, num_samples: int | None = None, seed: int = 0) -> Posterior:
        """Equally weighted samples: systematic resampling by the weights, row by row.

        The evidence is kept: every new log-weight is :attr:`log_evidence`.

        :param num_samples: how many; as many as there are by default.
        """
        count = self.num_samples if num_samples is None else num_samples
        if count < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        generator = np.random.default_rng(seed)
        weights = self.weights.reshape(self.num_samples, -1)
        index = np.empty((count, weights.shape[1]), dtype=np.int64)
        for column in range(weights.shape[1]):
            points = (generator.random() + np.arange(count)) / count
            bounds = np.cumsum(weights[:, column])
            index[:, column] = np.searchsorted(bounds / bounds[-1], points).clip(max=self.num_samples - 1)
            generator.shuffle(index[:, column])
        index = index.reshape((count, *self.batch_shape))
        return Posterior(
            samples={name: self._take(value, index) for name, value in self.samples.items()},
            log_weights=np.broadcast_to(self.log_evidence, (count, *self.batch_shape)).copy(),
            log_joint=self._take(self.log_joint, index),
            method="importance",
            exactness=self.exactness,
            decoders=self.decoders,
            observed=self.observed,
        )

    def _take(self, value: Array, index: Array) -> Array:
        rows = len(self.batch_shape)
        lead = value.shape[1 : 1 + rows]
        if lead != self.batch_shape:
            raise ValueError(f"a site of shape {value.shape} does not follow the batch shape {self.batch_shape}.")
        expanded = index.reshape(index.shape + (1,) * (value.ndim - 1 - rows))
        return np.take_along_axis(value, expanded, axis=0)

    def decode(self, site: str) -> list[Any]:
        """The texts of a site as strings: ``K`` of them, nested by batch row where there are rows.

        :raises KeyError: no such text site.
        """
        if site not in self.samples:
            raise KeyError(f"no site {site!r}; the posterior has {sorted(self.samples)}.")
        if site not in self.decoders:
            raise KeyError(f"site {site!r} is no text; its values are in posterior.samples[{site!r}].")
        return _decode(self.samples[site], self.decoders[site])

    def top(self, site: str, count: int = 10) -> list[tuple[str, float]]:
        """The distinct texts of a site with the largest total weight, for a posterior without rows."""
        if self.batch_shape:
            raise ValueError("top() needs a posterior without batch rows. Ask for one row: posterior.row(0).")
        total: dict[str, float] = {}
        for text, weight in zip(self.decode(site), self.weights, strict=True):
            total[text] = total.get(text, 0.0) + float(weight)
        return sorted(total.items(), key=lambda item: -item[1])[:count]

    def row(self, *index: int) -> Posterior:
        """The posterior of one batch row."""
        if len(index) != len(self.batch_shape):
            raise IndexError(f"batch_shape is {self.batch_shape}: pass {len(self.batch_shape)} numbers.")
        place: Any = (slice(None), *index)
        return Posterior(
            {name: value[place] for name, value in self.samples.items()},
            self.log_weights[place],
            self.log_joint[place],
            self.method,
            self.exactness,
            self.decoders,
            {n: v[index] if v.shape[: len(index)] == self.batch_shape else v for n, v in self.observed.items()},
        )

    # --- out ---------------------------------------------------------------------------------------

    def summary(self) -> str:
        """The numbers and the heaviest texts, for reading."""
        lines = [repr(self)]
        if self.batch_shape:
            return lines[0]
        for site in self.decoders:
            lines.append(f"  {site}:")
            lines += [f"    {weight:6.1%}  {text!r}" for text, weight in self.top(site, 5)]
        return "\n".join(lines)

    def to_arviz(self, num_samples: int | None = None, seed: int = 0) -> Any:
        """The resampled posterior for ArviZ; see :func:`llmppl.arviz.to_arviz`."""
        from llmppl.arviz import to_arviz

        return to_arviz(self, num_samples, seed)

    def plot(self, ax: Any = None) -> Any:
        """Sorted weights against equal ones; see :func:`llmppl.plots.plot_weights`."""
        from llmppl.plots import plot_weights

        return plot_weights(self, ax)

    def __repr__(self) -> str:
        sites = ", ".join(f"{name}{list(value.shape[1:])}" for name, value in self.samples.items())
        rows = f", batch_shape={self.batch_shape}" if self.batch_shape else ""
        head = f"Posterior({self.num_samples} samples of {sites}{rows}, {self.method}"
        if self.method == "enumeration":
            return f"{head}: log evidence {_span(self.log_evidence)} exactly)"
        return (
            f"{head}: log evidence {_span(self.log_evidence)} ± {_span(self.log_evidence_error)}, "
            f"ELBO {_span(self.elbo)} ± {_span(self.elbo_error)}, ESS {_span(self.ess, 1)} of {self.num_samples}, "
            f"k̂ {_span(self.khat)})"
        )

    def _repr_html_(self) -> str:
        parts = [f"<p><code>{html.escape(repr(self))}</code></p>"]
        if not self.batch_shape:
            for site in self.decoders:
                rows = "".join(
                    f"<tr><td style='text-align:right'>{weight:.1%}</td>"
                    f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
                    for text, weight in self.top(site)
                )
                parts.append(
                    f"<table><thead><tr><th>weight</th><th style='text-align:left'>{html.escape(site)}</th>"
                    f"</tr></thead><tbody>{rows}</tbody></table>"
                )
        return "".join(parts)


def _logsumexp(values: Array) -> Array:
    largest = values.max(0)
    shift = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(shift + np.log(np.exp(values - shift).sum(0)))


def _decode(value: Array, decoder: Callable[[Array], str]) -> list[Any]:
    return [decoder(row) if row.ndim == 1 else _decode(row, decoder) for row in value]


def _span(value: Array, digits: int = 2) -> str:
    """One number, or the range of several."""
    if value.size == 1:
        return f"{value.item():.{digits}f}"
    return f"{np.nanmin(value):.{digits}f}..{np.nanmax(value):.{digits}f}" if not np.isnan(value).all() else "nan"
