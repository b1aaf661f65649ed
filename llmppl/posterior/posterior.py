"""A posterior over text as weighted samples. Needs numpy only."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmppl.display.arviz_data import chain_ess, chain_rhat, to_arviz
from llmppl.display.plots import plot_weights
from llmppl.display.posterior_html import posterior_html
from llmppl.files.folders import written_whole
from llmppl.posterior.doubts import doubts
from llmppl.posterior.pareto import Tail, pareto_k, pareto_tail
from llmppl.posterior.replicates import Replicates, decoded
from llmppl.text import PAD
from llmppl.text.declared import check_fields, declared

Array = NDArray[Any]
EXACTNESS = ("marginal", "conditional", "extended", "none")
METHODS = ("enumeration", "importance", "smc", "mcmc", "decoding")


@dataclass(repr=False)
class Posterior:
    r"""Samples of a program's latent and deterministic sites, with unnormalised weights where the method has them.

    Weighted are those of enumeration, importance sampling and SMC. Draws of MCMC are equally weighted
    and say nothing of the evidence; answers of decoding are points, with their joint and no weight.

    :param samples: by site, ``(K,) + batch_shape + event_shape``.
    :param log_weights: ``(K,) + batch_shape``, nats. From importance sampling
        :math:`\log p(x, z_k) - \log q(z_k|x)`; from enumeration :math:`\log p(x, z_k)`; from SMC such that
        their mean weight is :math:`\hat Z`; zero from MCMC; NaN from decoding.
    :param log_joint: :math:`\log p(x, z_k)`, same shape.
    :param method: one of :data:`METHODS`.
    :param exactness: what the weights are exact for: the guide's ``marginal`` density, one
        ``conditional`` on auxiliary choices, an ``extended`` space, or ``none``.
    :param decoders: by text site, latent, deterministic or observed, a function from one text's ids to a string.
    :param observed: what was observed, by site: texts, and numbers as ``batch_shape + event_shape``.
    :param token_log_p: by text site, log-probability of each token under the prior, nats, of the shape of
        the site's ``samples``; zero behind the end.
    :param token_log_q: the same under the guide.
    :param log_likelihood: by observed site, its log-density at each sample, ``(K,) + batch_shape``, nats.
    :param masked: text sites whose guide has a grammar or a vocabulary that forbids what the program permits.
    :param deterministic: the sites of ``samples`` that the program computes from others. Those that are texts made by
        ``lm.map`` are among the :attr:`texts`.
    :param ancestors: of SMC, which first-generation particle each sample descends from, ``(K,) + batch_shape``.
    :param num_ancestors: how many of those there were in the beginning.
    :param complete: of SMC with optimal resampling, that no continuation had to be dropped: every text that the
        guide can write and the program permits is here, and the evidence over the guide's support is exact.
    :param ess_history: of SMC, the effective sample size at each step before any resampling,
        ``(steps,) + batch_shape``; the last entry is that of the final weights.
    :param num_chains: of MCMC; samples stand chain after chain.
    :param acceptance: of MCMC, the share of accepted moves, ``(num_chains,) + batch_shape``.
    :param observations: name of what was conditioned on, the program's arguments by value, or one name for each row of
        data. A replay buffer files draws by it.
    :param plates: names of the plates that the rows are, one for each dimension of ``batch_shape``.
    :param dims: by site, names of the plates behind the rows that its values have entries for.
    :param source: of resampled draws, the weighted ones: evidence, its error, ESS, k̂, ELBO and doubts are theirs.
    """

    samples: Mapping[str, Array]
    log_weights: Array
    log_joint: Array
    method: str = "importance"
    exactness: str = "marginal"
    decoders: Mapping[str, Callable[[Array], str]] = field(default_factory=dict)
    observed: Mapping[str, Array] = field(default_factory=dict)
    token_log_p: Mapping[str, Array] = field(default_factory=dict)
    token_log_q: Mapping[str, Array] = field(default_factory=dict)
    log_likelihood: Mapping[str, Array] = field(default_factory=dict)
    masked: tuple[str, ...] = ()
    deterministic: tuple[str, ...] = ()
    ancestors: Array | None = None
    num_ancestors: int = 0
    complete: bool = False
    ess_history: Array | None = None
    num_chains: int = 1
    acceptance: Array | None = None
    observations: tuple[str, ...] | str = ""
    plates: tuple[str, ...] = ()
    dims: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    source: Posterior | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("log_weights", "log_joint"):
            if not getattr(getattr(self, name), "shape", ()):
                raise TypeError(f"{name} must be an array, (K,) + batch_shape, got {getattr(self, name)!r}.")
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} must be one of {METHODS}.")
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

    @property
    def texts(self) -> list[str]:
        """The text sites of the samples."""
        return [site for site in self.samples if site in self.decoders]

    @property
    def mean_tokens(self) -> float:
        """Tokens of all latent texts of a sample together, their mean over samples and rows."""
        total = 0.0
        for site in self.texts:
            if site not in self.deterministic:
                tokens = (self.samples[site] != PAD).sum(-1)  # (K,) + batch_shape + inner plates
                inner = tokens.shape[1 + len(self.batch_shape) :]
                total += float(tokens.mean()) * math.prod(inner)
        return total

    # --- evidence and quality, each of shape batch_shape -------------------------------------------

    @property
    def weighted(self) -> bool:
        """Whether the samples have weights that say something of the evidence."""
        return self.method in ("enumeration", "importance", "smc")

    def _need_weights(self, what: str) -> None:
        if not self.weighted:
            raise ValueError(
                f"{what} needs weights, and a posterior by {self.method} has none. Use importance() or smc() with a "
                "guide, or exact_posterior()."
            )

    @property
    def log_evidence(self) -> Array:
        """log Z in nats. Exact by enumeration; by importance sampling and SMC the logarithm of an unbiased
        estimate of Z, below log Z in expectation.

        :raises ValueError: a method without weights; so do the properties below.
        """
        self._need_weights("log_evidence")
        total = _logsumexp(self.log_weights)
        return total if self.method == "enumeration" else total - math.log(self.num_samples)

    @property
    def log_evidence_error(self) -> Array:
        """Standard error of :attr:`log_evidence` by the delta method, nats; zero by enumeration.

        It is itself estimated from the weights, and too small where k̂ is above 0.7. By SMC samples that
        descend from one ancestor count as one (Chan and Lai 2013; Lee and Whiteley 2018), consistent for
        multinomial resampling and cautious for the others; once one ancestor is left it says 1 nat whatever
        the truth.
        """
        self._need_weights("log_evidence_error")
        if self.source is not None:
            return self.source.log_evidence_error
        if self.method == "enumeration" or self.complete:
            return np.zeros(self.batch_shape)
        count = self.num_samples if self.ancestors is None else self.num_ancestors
        if count < 2:
            return np.full(self.batch_shape, np.nan)
        if self.ancestors is None:
            squares = np.square(self.weights).sum(0)
        else:
            families = np.stack([(self.weights * (self.ancestors == n)).sum(0) for n in range(self.num_ancestors)])
            squares = np.square(families).sum(0)
        return np.asarray(np.sqrt(np.maximum(squares * count - 1, 0) / (count - 1)))

    @property
    def doubts(self) -> list[str]:
        """Why the weights may not be trusted, as far as they can tell; see :mod:`llmppl.posterior.doubts`."""
        return doubts(self) if self.source is None else self.source.doubts

    @property
    def weights(self) -> Array:
        """Normalised weights, ``(K,) + batch_shape``, summing to one over the samples; zero where none has weight."""
        if self.method == "decoding":
            self._need_weights("weights")
        total = _logsumexp(self.log_weights)
        return np.exp(self.log_weights - np.where(np.isneginf(total), 0.0, total))

    @property
    def ess(self) -> Array:
        """Effective sample size. Of weights (Kish): (Σw)² / Σw²; by enumeration, of the exact posterior
        itself; by SMC, the smallest at any step, before resampling could hide it; by MCMC, of the joint's
        chains, from their autocorrelation (Vehtari et al. 2021)."""
        if self.method == "decoding":
            self._need_weights("ess")
        if self.method == "mcmc":
            return chain_ess(self.log_joint, self.num_chains)
        if self.source is not None:
            return np.minimum(self.source.ess, self.num_samples)
        square = np.asarray(np.square(self.weights).sum(0))
        kish = np.divide(1.0, square, out=np.zeros_like(square), where=square > 0)
        return kish if self.ess_history is None else np.minimum(kish, self.ess_history.min(0))

    @property
    def rhat(self) -> Array:
        """R̂ of the joint's chains (Vehtari et al. 2021), of MCMC: below 1.01 they agree.

        :raises ValueError: another method.
        """
        if self.method != "mcmc":
            raise ValueError(f"rhat is for chains of MCMC, and this posterior is by {self.method}.")
        return chain_rhat(self.log_joint, self.num_chains)

    @property
    def distinct_ancestors(self) -> Array:
        """How many first-generation particles of SMC have a descendant with weight; elsewhere the number of
        samples."""
        if self.ancestors is None:
            return np.full(self.batch_shape, self.num_samples)
        flat = self.ancestors.reshape(self.num_samples, -1)
        alive = np.isfinite(self.log_weights).reshape(self.num_samples, -1)
        counts = [len(np.unique(flat[alive[:, n], n])) for n in range(flat.shape[1])]
        return np.array(counts).reshape(self.batch_shape)

    @declared
    def distinct_texts(self, site: str) -> Array:
        """How many different values the samples of a site have, of shape ``batch_shape``."""
        if site not in self.samples:
            raise KeyError(f"no site {site!r}; the posterior has samples of {sorted(self.samples)}.")
        values = self.samples[site].reshape(self.num_samples, math.prod(self.batch_shape), -1)
        counts = [len(np.unique(values[:, n], axis=0)) for n in range(values.shape[1])]
        return np.array(counts).reshape(self.batch_shape)

    @property
    def impossible(self) -> Array:
        """How many of the samples have weight zero, of shape ``batch_shape``: a hard condition of the program or a mask
        excludes them. They count in :attr:`log_evidence` and :attr:`ess`, and k̂ is that of the others."""
        self._need_weights("impossible")
        return np.isneginf(self.log_weights).sum(0)

    @property
    def khat(self) -> Array:
        """Pareto k̂ of the weights (Vehtari et al. 2024): below 0.7 they can be relied on, if no mode
        was missed. −inf for equal weights; NaN where there are too few samples, by enumeration, and by SMC,
        whose weights resampling has cut. Where
        few texts have most of the mass the weights are few distinct numbers, and k̂ can be far above 0.7
        although they are nearly equal: read it beside :attr:`ess`."""
        self._need_weights("khat")
        if self.source is not None:
            return self.source.khat
        if self.method in ("enumeration", "smc"):
            return np.full(self.batch_shape, np.nan)
        flat = self.log_weights.reshape(self.num_samples, -1)
        return np.array([pareto_k(column) for column in flat.T]).reshape(self.batch_shape)

    @property
    def tail(self) -> Tail | float:
        """The generalised Pareto law that k̂ is the shape of, or k̂ where there is no tail to fit; of a posterior
        without batch rows. See :func:`llmppl.posterior.pareto.pareto_tail`."""
        self._need_weights("tail")
        if self.source is not None:
            return self.source.tail
        return pareto_tail(self.log_weights)

    @property
    def elbo(self) -> Array:
        """Mean log-weight, the evidence lower bound of the guide, nats; of the exact posterior by
        enumeration it is log Z itself. NaN by SMC, whose weights are not those of one guide's samples."""
        self._need_weights("elbo")
        if self.source is not None:
            return self.source.elbo
        if self.method == "enumeration":
            return self.log_evidence
        if self.method == "smc":
            return np.full(self.batch_shape, np.nan)
        return np.asarray(self.log_weights.mean(0))

    @property
    def elbo_error(self) -> Array:
        """Standard error of :attr:`elbo`, nats."""
        self._need_weights("elbo_error")
        if self.source is not None:
            return self.source.elbo_error
        if self.method == "enumeration":
            return np.zeros(self.batch_shape)
        if self.num_samples < 2 or self.method == "smc":
            return np.full(self.batch_shape, np.nan)
        with np.errstate(invalid="ignore"):  # a weight of zero: the ELBO is −inf, its error undefined
            return np.asarray(self.log_weights.std(0, ddof=1) / math.sqrt(self.num_samples))

    # --- samples -----------------------------------------------------------------------------------

    @declared
    def resample(self, num_samples: int | None = None, seed: int = 0) -> Posterior:
        """Equally weighted samples: systematic resampling by the weights, row by row.

        The evidence is kept, every new log-weight is :attr:`log_evidence`, and so is what the weights say of its error
        and of themselves: equal weights do not make copies of one draw many. Draws of an exact posterior are
        independent ones of it. Draws of MCMC are equally weighted
        already; of them this takes some, as one chain.

        :param num_samples: how many; as many as there are by default.
        """
        index = self.resampling_index(num_samples, seed)
        evidence = self.log_evidence if self.weighted else np.zeros(self.batch_shape)
        return replace(
            self.taken(index),
            log_weights=np.broadcast_to(evidence, index.shape).copy(),
            method="importance" if self.weighted else self.method,
            source=self._weighted_source,
            ancestors=None,
            ess_history=None,
            num_chains=1,
            acceptance=None,
        )

    @property
    def _weighted_source(self) -> Posterior | None:
        """What the weights of resampled draws come from, where they are no exact ones."""
        return self.source if self.source is not None else self if self.method in ("importance", "smc") else None

    @declared
    def resampling_index(self, num_samples: int | None = None, seed: int = 0) -> Array:
        """Which samples :meth:`resample` draws, ``(num_samples,) + batch_shape``."""
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
        return index.reshape((count, *self.batch_shape))

    def taken(self, index: Array) -> Posterior:
        """Everything that each sample has, at an index ``(K',) + batch_shape``; weights are taken along."""
        columns = ("samples", "token_log_p", "token_log_q", "log_likelihood")
        chosen: dict[str, Any] = {
            column: {name: self._take(value, index) for name, value in getattr(self, column).items()}
            for column in columns
        }
        return replace(
            self,
            **chosen,
            log_weights=self._take(self.log_weights, index),
            log_joint=self._take(self.log_joint, index),
            ancestors=None if self.ancestors is None else self._take(self.ancestors, index),
        )

    def _take(self, value: Array, index: Array) -> Array:
        rows = len(self.batch_shape)
        lead = value.shape[1 : 1 + rows]
        if lead != self.batch_shape:
            raise ValueError(f"a site of shape {value.shape} does not follow the batch shape {self.batch_shape}.")
        expanded = index.reshape(index.shape + (1,) * (value.ndim - 1 - rows))
        return np.take_along_axis(value, expanded, axis=0)

    @declared
    def decode(self, site: str) -> Any:
        """The texts of a site as strings: ``K`` of them, nested by batch row where there are rows; of an
        observed site its text, or one for each of its rows.

        :raises KeyError: no such text site.
        """
        values = {**self.observed, **self.samples}
        if site not in values:
            raise KeyError(f"no site {site!r}; the posterior has {sorted(values)}.")
        if site not in self.decoders:
            where = "samples" if site in self.samples else "observed"
            raise KeyError(f"site {site!r} is no text; its values are in posterior.{where}[{site!r}].")
        return decoded(values[site], self.decoders[site])

    @declared
    def top(self, site: str, count: int = 10) -> list[tuple[str, float]]:
        """The distinct texts of a site with the largest total weight, for a posterior without rows."""
        if self.batch_shape:
            raise ValueError("top() needs a posterior without batch rows. Ask for one row: posterior.row(0).")
        total: dict[str, float] = {}
        weights = np.zeros(self.num_samples) if self.method == "decoding" else self.weights
        for text, weight in zip(self.decode(site), weights, strict=True):
            total[text] = total.get(text, 0.0) + float(weight)
        return sorted(total.items(), key=lambda item: -item[1])[:count]

    def row(self, *index: int) -> Posterior:
        """The posterior of one batch row."""
        if len(index) != len(self.batch_shape):
            raise IndexError(f"batch_shape is {self.batch_shape}: pass {len(self.batch_shape)} numbers.")
        place: Any = (slice(None), *index)
        columns = ("samples", "token_log_p", "token_log_q", "log_likelihood")
        chosen: dict[str, Any] = {
            column: {name: value[place] for name, value in getattr(self, column).items()} for column in columns
        }
        chosen |= {
            name: None if getattr(self, name) is None else getattr(self, name)[place]
            for name in ("ancestors", "ess_history", "acceptance")
        }
        # A text without its last dimension: one shared by all rows can have as many tokens as there are rows.
        numbers = set(self.dims) - set(self.decoders)
        leads = {n: v.shape if n in numbers else v.shape[:-1] for n, v in self.observed.items()}
        observed = {n: v[index] if leads[n][: len(index)] == self.batch_shape else v for n, v in self.observed.items()}
        names = self.observations
        return replace(
            self,
            **chosen,
            log_weights=self.log_weights[place],
            log_joint=self.log_joint[place],
            observed=observed,
            observations=names if isinstance(names, str) else names[index[-1]],
            plates=(),
            source=None if self.source is None else self.source.row(*index),
        )

    # --- out ---------------------------------------------------------------------------------------

    def summary(self) -> str:
        """The numbers and the heaviest texts, for reading."""
        lines = [repr(self)]
        if self.batch_shape:
            return lines[0]
        lines += [f"  doubt: {reason}" for reason in self.doubts]
        for site in self.texts:
            lines.append(f"  {site}:")
            lines += [f"    {weight:6.1%}  {text!r}" for text, weight in self.top(site, 5)]
        return "\n".join(lines)

    @declared
    def to_arviz(
        self,
        num_samples: int | None = None,
        seed: int = 0,
        weighted: bool = False,
        coords: Mapping[str, Any] | None = None,
        prior: Replicates | None = None,
        posterior_predictive: Replicates | None = None,
    ) -> Any:
        """The posterior for ArviZ, resampled or with its weights; see :func:`llmppl.display.arviz_data.to_arviz`."""
        return to_arviz(self, num_samples, seed, weighted, coords, prior, posterior_predictive)

    @declared
    def to_netcdf(
        self, path: str | os.PathLike[str], num_samples: int | None = None, seed: int = 0, weighted: bool = False
    ) -> None:
        """Write :meth:`to_arviz` to a netCDF file, whole or not at all; ``arviz.from_netcdf`` reads it.

        :raises OSError: with the path and the mend; what was there is as it was.
        """
        data = self.to_arviz(num_samples, seed, weighted)
        # Made elsewhere: HDF5 cannot end in good order on a disk that is full.
        with tempfile.TemporaryDirectory() as elsewhere:
            file = Path(elsewhere) / "posterior.nc"
            data.to_netcdf(str(file))
            written_whole(path, lambda temporary: shutil.copyfile(file, temporary))

    def plot(self, ax: Any = None) -> Any:
        """Sorted weights against equal ones; see :func:`llmppl.display.plots.plot_weights`."""
        return plot_weights(self, ax)

    def __repr__(self) -> str:
        sites = ", ".join(f"{name}{list(value.shape[1:])}" for name, value in self.samples.items())
        rows = f", batch_shape={self.batch_shape}" if self.batch_shape else ""
        head = f"Posterior({self.num_samples} samples of {sites}{rows}, {self.method}"
        if self.method == "enumeration":
            return f"{head}: log evidence {_span(self.log_evidence)} exactly)"
        if self.method == "decoding":
            return f"{head}: log joint {_span(self.log_joint)}; points, no weights)"
        if self.method == "mcmc":
            return (
                f"{head}: {self.num_chains} chains, accepted {_span(self.acceptance)}, "  # type: ignore[arg-type]
                f"ESS {_span(self.ess, 1)} of {self.num_samples}, R̂ {_span(self.rhat, 3)}; no evidence)"
            )
        if self.complete:
            counts = ", ".join(f"{_span(self.distinct_texts(site), 0)} {site} texts" for site in self.texts)
            return f"{head}: log evidence {_span(self.log_evidence)} exactly over the guide's support, {counts})"
        if self.method == "smc":
            return (
                f"{head}: log evidence {_span(self.log_evidence)} ± {_span(self.log_evidence_error)}, "
                f"smallest ESS {_span(self.ess, 1)} of {self.num_samples} before resampling, "
                f"{_span(self.distinct_ancestors, 0)} distinct ancestors"
                + "".join(f", {_span(self.distinct_texts(site), 0)} distinct {site} texts" for site in self.texts)
                + (f". NOT TO BE TRUSTED: {'; '.join(self.doubts)}" if self.doubts else "")
                + ")"
            )
        return (
            f"{head}: log evidence {_span(self.log_evidence)} ± {_span(self.log_evidence_error)}, "
            f"ELBO {_span(self.elbo)} ± {_span(self.elbo_error)}, ESS {_span(self.ess, 1)} of {self.num_samples}, "
            f"k̂ {_span(self.khat)}"
            + (f", {_span(self.impossible, 0)} draws impossible" if self.impossible.any() else "")
            + (f". NOT TO BE TRUSTED: {'; '.join(self.doubts)}" if self.masked else "")
            + ")"
            # Of importance sampling the numbers speak for themselves, but for what no weight can show.
        )

    def _repr_html_(self) -> str:
        return posterior_html(self)


def _logsumexp(values: Array) -> Array:
    largest = values.max(0)
    shift = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(shift + np.log(np.exp(values - shift).sum(0)))


def _span(value: Array, digits: int = 2) -> str:
    """One number, or the range of several."""
    if value.size == 1:
        return f"{value.item():.{digits}f}"
    return f"{np.nanmin(value):.{digits}f}..{np.nanmax(value):.{digits}f}" if not np.isnan(value).all() else "nan"
