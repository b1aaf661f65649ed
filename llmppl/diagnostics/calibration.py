"""Simulation-based calibration of a guide: are exact posterior draws ranked among its own as its own are?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from llmppl.diagnostics.ranks import CREDIBILITY, Functional, ranks_of
from llmppl.diagnostics.uniformity import MOST_POINTS, ecdf_band, uniformity_p_value
from llmppl.display.plots import plot_calibration
from llmppl.inference.importance import importance
from llmppl.inference.simulated_pairs import Array, Sampler, simulated_pair
from llmppl.network.random_states import randomness_kept
from llmppl.posterior.exactness import check_scores_given
from llmppl.programs.plates import in_data_plate
from llmppl.programs.structure import Program
from llmppl.text.arguments import check_programs
from llmppl.text.declared import declared

PROPOSALS = 10
"""Samples of importance sampling for each draw that is taken from them."""


class Coverage(NamedTuple):
    """How often credible sets of a level hold the simulated latent.

    :param coverage: share of the simulated pairs.
    :param lower, upper: exact binomial interval of it (Clopper and Pearson 1934).
    """

    level: float
    coverage: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.level:.0%} sets hold {self.coverage:.1%} ({self.lower:.1%} to {self.upper:.1%})"


@dataclass(frozen=True, repr=False)
class Calibration:
    """Ranks of simulated latents among draws, which are uniform where the draws are of the posterior.

    A low rank of log q(z|x) says that the guide finds the truth less probable than its own draws: it misses
    mass. Ranks in the middle too often: too wide; at both ends: too narrow.

    :param ranks: by functional, ``(S,)``, in (0, 1), ties broken at random. Those named ``credibility of
        <site>`` are the levels of the smallest credible sets of a finite site that hold the latent.
    :param num_draws: ``K`` draws for each pair; 0 where only credible sets are asked for.
    :param level: of all tests together.
    """

    ranks: Mapping[str, Array]
    num_draws: int
    level: float = 0.95

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.ranks)

    @property
    def simulations(self) -> int:
        """``S``, how many simulated pairs."""
        return len(next(iter(self.ranks.values())))

    def p_value(self, name: str) -> float:
        """Probability of ranks as far from uniform, if the draws are of the posterior: exact, by the largest
        departure of the ECDF (:func:`~llmppl.diagnostics.uniformity.uniformity_p_value`).

        :raises KeyError: no such functional.
        """
        return uniformity_p_value(self._of(name), self._num_points)

    def band(self, name: str) -> tuple[Array, Array, Array]:
        """Points in (0, 1), and the lower and upper end of the band of the ECDF there.

        The band holds at all points at once with probability ``1 - (1 - level)/len(names)``, so that all
        ECDFs stay in their bands with probability ``level`` (Bonferroni).

        :raises KeyError: no such functional.
        """
        return ecdf_band(len(self._of(name)), self._num_points, 1 - self._share)

    @property
    def rejected(self) -> tuple[str, ...]:
        """Functionals whose ECDF leaves its band."""
        return tuple(name for name in self.names if self.p_value(name) <= self._share)

    @property
    def passed(self) -> bool:
        """Whether no ECDF leaves its band. An exact posterior passes with probability ``level`` or more:
        Bonferroni's correction, each p-value against ``(1 - level)/len(names)``. Passing proves nothing of
        what these functionals cannot see, or too few simulations."""
        return not self.rejected

    def coverage(self, site: str, levels: Iterable[float] = (0.5, 0.8, 0.9, 0.95)) -> list[Coverage]:
        """Expected coverage of the guide's credible sets of a finite site (Hermans et al. 2022).

        :raises KeyError: no such finite site.
        """
        from scipy import stats  # slow to import

        values = self._of(CREDIBILITY + site)
        found = []
        for level in levels:
            count = int((values <= level).sum())
            interval = stats.binomtest(count, len(values)).proportion_ci(self.level)
            found.append(Coverage(level, count / len(values), float(interval.low), float(interval.high)))
        return found

    def plot(self, name: str, ax: Any = None) -> Any:
        """The ECDF of the ranks in its band; see :func:`llmppl.display.plots.plot_calibration`."""
        return plot_calibration(self, name, ax)

    @staticmethod
    def join(parts: Sequence[Calibration]) -> Calibration:
        """The simulated pairs of several calls as one.

        :raises ValueError: calls with different functionals, numbers of draws or levels; none.
        """
        if not parts:
            raise ValueError("Calibration.join needs at least one calibration. Pass a list of them.")
        first = parts[0]
        for part in parts[1:]:
            if (part.names, part.num_draws, part.level) != (first.names, first.num_draws, first.level):
                raise ValueError(
                    f"calibrations of {part.names} with {part.num_draws} draws at level {part.level} and of "
                    f"{first.names} with {first.num_draws} at {first.level} cannot be joined. "
                    "Make them by one calibrate()."
                )
        ranks = {name: np.concatenate([part.ranks[name] for part in parts]) for name in first.names}
        return Calibration(ranks, first.num_draws, first.level)

    @property
    def _share(self) -> float:
        return (1 - self.level) / len(self.names)

    @property
    def _num_points(self) -> int:
        return min(self.num_draws + 1, MOST_POINTS) if self.num_draws else MOST_POINTS

    def _of(self, name: str) -> Array:
        if name not in self.ranks:
            raise KeyError(f"no functional {name!r}; there are {list(self.names)}.")
        return self.ranks[name]

    def __repr__(self) -> str:
        drawn = f", {self.num_draws} draws each" if self.num_draws else ""
        verdict = "passed" if self.passed else "rejected by " + ", ".join(self.rejected)
        values = ", ".join(f"{name} p = {self.p_value(name):.2g}" for name in self.names)
        return (
            f"Calibration({self.simulations} simulated pairs{drawn}: {verdict} at level {self.level:g}, "
            f"p-values against {self._share:.2g}: {values})"
        )


@declared
def calibrate(
    model: Program,
    guide: Program,
    num_draws: int = 63,
    simulations: int = 200,
    functionals: Mapping[str, Functional] | None = None,
    sampler: str | Sampler = "guide",
    level: float = 0.95,
    seed: int = 0,
    vectorize_data: bool = False,
    progress: bool = True,
) -> Callable[..., Calibration]:
    r"""Simulation-based calibration [1]: a function of the program's arguments that returns a :class:`Calibration`.

    It draws :math:`(z^*, x^*)` from the program, so that :math:`z^*` is an exact posterior draw at
    :math:`x^*`, and ``K`` draws :math:`z_k` of the sampler there. If those are of the posterior too, the
    rank of :math:`f(z^*, x^*)` among the :math:`f(z_k, x^*)` is uniform for every functional. These are
    the length in tokens of each text, :math:`\log p(x, z)`, :math:`\log q(z|x)` and the user's own. The
    last but one finds what the guide misses, where lengths and often the joint do not: functionals have to
    depend on the data [2]. Ranks of :math:`\log q`, upside down, are the credibility of whole latents.
    Finite sites (choices) add the credibility of their value, without draws: see :func:`expected_coverage`.

    As in :func:`~llmppl.bounds` the observed values among the arguments say only what is observed and of
    what length, and the result holds on average over simulated observations. One call makes ``simulations``
    pairs, or so many for each row; :meth:`Calibration.join` joins calls. Each costs ``K + 1`` scores of both
    programs and ``K`` draws; draws other than the guide's are scored once more.

    A guide that lacks 10 % of most posteriors (8 % on average) was rejected in 40 of 40 runs with ``K = 63``
    and 200 pairs, the defaults, always by log q(z|x); in 37 with ``K = 31`` or with 150 pairs, in 32 with
    100 pairs, and in 20 with ``K = 20`` and 100 pairs. Alone log p(x, z) found it in a quarter of the runs,
    lengths in none. More pairs help more than more draws. The bands are those of [3].

    :param num_draws: ``K``.
    :param simulations: pairs for each call, and each row.
    :param functionals: by name, functions of latents ``(K,) + batch_shape + event_shape`` by site and of the
        simulated observations by site, that return ``(K,) + batch_shape``; called for draws and, with one
        particle, for :math:`z^*`.
    :param sampler: ``"guide"``; or ``"importance"``, draws by weight from 10 ``K`` of the guide; or a
        function of the program and the guide, told of the simulated observations, such as
        ``lambda model, guide: exact_posterior(model)``. From the :class:`~llmppl.Posterior` that the
        function it returns makes of the arguments, ``K`` are drawn.
    :param level: probability that an exact posterior passes.
    :param seed: of each call's random numbers, and of the number of the call: calls of one function differ.
    :param vectorize_data: as for :func:`~llmppl.importance`.
    :param progress: show a progress bar if it takes more than a few seconds.
    :raises ValueError: a factor in the program, a guide without an exact marginal density, a scaled site,
        functionals of the wrong shape or NaN.
    :raises TypeError: a guide that takes no ``observations=``.

    References

    [1] Talts, Betancourt, Simpson, Vehtari, Gelman (2018), `Validating Bayesian inference algorithms with
    simulation-based calibration`.
    [2] Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman, Vehtari (2023), `Simulation-based calibration
    checking for Bayesian computation: the choice of test quantities shapes sensitivity`.
    [3] Säilynoja, Bürkner, Vehtari (2022), `Graphical test for discrete uniformity and its applications in
    goodness-of-fit evaluation and multiple sample comparison`.
    """
    check_programs(model=model, guide=guide)
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}.")
    if sampler == "importance":
        chosen: Sampler | None = _weighted(PROPOSALS * num_draws)
    elif sampler == "guide":
        chosen = None
    elif callable(sampler):
        chosen = sampler
    else:
        raise ValueError(
            f"sampler={sampler!r} must be 'guide', 'importance', or a function of the program and the guide that "
            "returns a function of the program's arguments, e.g. lambda model, guide: importance(model, guide, 500)."
        )
    return _simulating(
        model, guide, num_draws, simulations, dict(functionals or {}), chosen, level, seed, vectorize_data, progress
    )


@declared
def expected_coverage(
    model: Program,
    guide: Program,
    simulations: int = 100,
    level: float = 0.95,
    seed: int = 0,
    vectorize_data: bool = False,
    progress: bool = True,
) -> Callable[..., Calibration]:
    r"""Expected coverage of a guide's credible sets at finite sites [1]: a function of the program's arguments.

    At simulated :math:`(z^*, x^*)`, and after the earlier latents in :math:`z^*`, the options of a choice
    are taken in the order of the guide's probability until the true one is in; one at the border is in
    with the probability that makes the level exact. Where the guide is the posterior, sets of every level
    hold the truth as often as the level says: :meth:`Calibration.coverage`, with the test and the band of
    :class:`Calibration` over all levels. It needs no draws. Parameters and errors as of :func:`calibrate`.

    :raises ValueError: also a program without a finite latent site.

    [1] Hermans, Delaunoy, Rozet, Wehenkel, Begy, Louppe (2022), `A crisis in simulation-based inference? Beware,
    your posterior approximations can be unfaithful`.
    """
    check_programs(model=model, guide=guide)
    return _simulating(model, guide, 0, simulations, {}, None, level, seed, vectorize_data, progress)


def call_seed(seed: int, call: int) -> int:
    """A seed for one of several calls, so that neither calls nor neighbouring seeds repeat each other."""
    return int(np.random.SeedSequence((seed, call)).generate_state(1)[0])


def _simulating(
    model: Program,
    guide: Program,
    num_draws: int,
    simulations: int,
    functionals: dict[str, Functional],
    sampler: Sampler | None,
    level: float,
    seed: int,
    vectorize_data: bool,
    progress: bool,
) -> Callable[..., Calibration]:
    if simulations < 1:
        raise ValueError(f"simulations must be at least 1, got {simulations}.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}. It is the probability to pass, e.g. 0.95.")
    check_scores_given(guide, "calibration")
    if vectorize_data:
        model, guide = in_data_plate(model), in_data_plate(guide)
    calls = 0

    def run(*args: Any, **kwargs: Any) -> Calibration:
        nonlocal calls
        state = call_seed(seed, calls)
        calls += 1
        generator = np.random.default_rng(state)
        parts = []
        with torch.no_grad(), randomness_kept(state):
            for _ in tqdm(range(simulations), desc="calibrate", disable=not progress, delay=5, leave=False):
                pair = simulated_pair(model, guide, args, kwargs, num_draws, generator, sampler)
                parts.append(Calibration(ranks_of(pair, functionals, generator), num_draws, level))
                if not parts[0].names:
                    raise ValueError(
                        "expected_coverage needs a latent site of finitely many options, as lm.choice makes, and the "
                        "guide has none. Use calibrate()."
                    )
        return Calibration.join(parts)

    return run


def _weighted(num_samples: int) -> Sampler:
    return lambda model, guide: importance(model, guide, num_samples, progress=False)
