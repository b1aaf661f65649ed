"""What a program says of something finite, averaged over the latents that lead there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.inference.blocks import block_size
from llmppl.programs.plates import in_data_plate, in_particles
from llmppl.programs.structure import Program, plate_nesting, structure
from llmppl.text.arguments import check_count, check_programs
from llmppl.text.declared import declared


@dataclass(frozen=True)
class Prediction:
    """Probabilities of a finite site's values, averaged over sampled latents.

    :param options: the values: strings of a choice, numbers of other distributions.
    :param probabilities: ``batch_shape + (n,)``.
    :param error: their Monte Carlo standard errors; NaN of a single sample.
    :param num_samples: ``K``.
    """

    options: list[Any]
    probabilities: np.ndarray
    error: np.ndarray
    num_samples: int

    @property
    def best(self) -> Any:
        """The most probable value, one for each row of the batch, in nested lists."""
        return _named(self.probabilities.argmax(-1), self.options)

    def __repr__(self) -> str:
        if self.probabilities.ndim > 1:
            rows = " x ".join(map(str, self.probabilities.shape[:-1]))
            return f"Prediction({rows} rows, options={self.options}, {self.num_samples} samples)"
        shown = (
            f"{o!r}: {p:.3f} ± {e:.3f}" for o, p, e in zip(self.options, self.probabilities, self.error, strict=True)
        )
        return f"Prediction({', '.join(shown)}, {self.num_samples} samples)"


@declared
def predict(
    model: Program, site: str, num_samples: int = 16, guide: Program | None = None, vectorize_data: bool = False
) -> Callable[..., Prediction]:
    r"""The posterior predictive of a finite site: a function of the program's arguments, without that of the site.

    .. math:: p(y|x) = \mathbb E_{z \sim p(z|x)}\, p(y|x, z) \approx \frac1K\sum_k p(y|x, z_k)

    Unbiased, and every value's probability counts, not only that of a value that was drawn: Rao-Blackwell's estimate.

    :param site: a site whose values can be listed, such as ``lm.choice``; a program of :mod:`llmppl.models` draws it
        where its argument is left out.
    :param num_samples: ``K``.
    :param guide: draws the latents instead, of what it is told, and the program says the rest; not told the site, as it
        is unknown (Hu et al. 2024, sec. 4.4). No weights are taken: a guide that was trained on the posterior given
        the site's values then has learned what the program has not.
    :param vectorize_data: the returned function takes lists in place of its arguments, as that of
        :func:`~llmppl.importance` does.
    :raises ValueError: no such site, or one whose values cannot be listed.
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
        parts, fn = [], None
        with torch.no_grad():
            for trace in drawn_traces(model, guide, site, num_samples, block_size(model, args, kwargs), args, kwargs):
                fn = trace.nodes[site]["fn"]
                values = fn.enumerate_support(expand=False)
                probabilities = fn.log_prob(values).exp()  # (n, K) + batch_shape
                count = fn.batch_shape[0]
                parts.append(probabilities.expand(len(values), count, *probabilities.shape[2:]).movedim(0, -1))
        drawn = torch.cat(parts).double().cpu().numpy()
        return Prediction(_options(fn), drawn.mean(0), _error(drawn), num_samples)

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


def _error(drawn: np.ndarray) -> np.ndarray:
    if len(drawn) == 1:
        return np.full(drawn.shape[1:], np.nan)
    return np.asarray(drawn.std(0, ddof=1) / np.sqrt(len(drawn)))


def _named(index: np.ndarray, options: list[Any]) -> Any:
    return options[int(index)] if index.ndim == 0 else [_named(row, options) for row in index]
