"""Answers of a program in its own words, or by the evidence of given ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from pyro import poutine

from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.inference.blocks import block_size
from llmppl.inference.predictive import (
    Prediction,
    check_nothing_behind,
    drawn_traces,
    ess_of,
    normalised,
    other_evidence,
    weighed,
)
from llmppl.programs.plates import in_data_plate
from llmppl.programs.structure import Program, structure
from llmppl.text.arguments import check_count, check_programs
from llmppl.text.declared import declared


@declared
def answer(
    model: Program,
    site: str = "answer",
    options: Sequence[str] | None = None,
    normalise: Callable[[str], Hashable] | None = None,
    num_samples: int = 64,
    guide: Program | None = None,
    vectorize_data: bool = False,
) -> Callable[..., Prediction]:
    r"""What a program answers, averaged over the latents that lead there: a function of its arguments, without that of
    the answer.

    With ``options``, by their evidence: :math:`p(y|x) \propto \frac1K\sum_k p(y|x, z_k)` for each of them, latents
    drawn from the program or a guide, and normalised over the options (Sun et al. 2025, arXiv 2510.23925, choose the
    answer of largest estimated evidence; here its probability has an error). With ``normalise``, by drawing: the
    program draws an answer for each :math:`z_k`, and those that are the same once normalised count together
    (self-consistency, Wang et al. 2023, arXiv 2203.11171, as an estimate with its error). Draws of the program are
    weighed by whatever else it observes or holds as a factor; for ``options`` that must stand before the answer.

    :param site: the text of the answer, which the program draws where its argument is left out.
    :param options: answers as the site writes them, the stop included; one or more.
    :param normalise: from an answer as written to what counts as the same: ``lambda text: text.strip(" .")``.
    :param num_samples: ``K``.
    :param guide: draws the latents before the answer, not told it; as of :func:`~llmppl.predict`. The answer is the
        program's.
    :param vectorize_data: as of :func:`~llmppl.predict`.
    :returns: a function that gives a :class:`~llmppl.inference.predictive.Prediction`: options, or what ``normalise``
        has made of the answers, the most probable first.
    :raises ValueError: neither ``options`` nor ``normalise``, or both; an option that the site cannot write; with
        ``options``, an observation or factor behind the site; no draw that the observations permit; a normaliser that
        raises, or gives what cannot be counted, with the answer.
    """
    check_programs(model=model)
    if guide is not None:
        check_programs(guide=guide)
    check_count(num_samples=num_samples)
    if (options is None) == (normalise is None):
        raise ValueError(
            "answers are counted by options= or by normalise=. Give one of them: the answers to choose from, or a "
            "function that makes equal answers equal, e.g. normalise=str.strip."
        )
    if options is not None and (isinstance(options, str) or not len(options)):
        raise ValueError(f"options={options!r} must be a list of answers, at least one.")
    if vectorize_data:
        model, guide = in_data_plate(model), None if guide is None else in_data_plate(guide)

    def run(*args: Any, **kwargs: Any) -> Prediction:
        sites = structure(model, args, kwargs)
        _check_answer(sites, site)
        if options is not None and guide is None:
            check_nothing_behind(sites, site)
        with torch.no_grad():
            traces = list(drawn_traces(model, guide, site, num_samples, block_size(model, args, kwargs), args, kwargs))
            log_weights = [other_evidence(trace, site, guide is not None) for trace in traces]
        nodes = [trace.nodes[site] for trace in traces]
        shares = normalised(log_weights, (num_samples, *nodes[0]["fn"].batch_shape[1:]))
        if options is not None:
            return _by_evidence(nodes, list(options), site, shares)
        assert normalise is not None
        return _by_draws(nodes, normalise, shares)

    return run


def _by_evidence(nodes: list[Any], options: list[str], site: str, shares: np.ndarray) -> Prediction:
    """Each option's share of the evidence.

    :param shares: normalised weights of the draws, ``(K,) + batch_shape``.
    """
    found = []
    for node in nodes:
        fn = node["fn"]
        columns = []
        for option in options:
            value = fn.lm.encode(option)
            if not bool(fn.support.check(value)):
                raise ValueError(
                    f"options: {option!r} is no text of site {site!r}, {fn.support}. Write it as the site does: with "
                    "its stop token at the end, within max_tokens."
                )
            with torch.no_grad():
                columns.append(fn.log_prob(value).expand(fn.batch_shape))
        found.append(torch.stack(columns, -1))
    logs = torch.cat(found).double().cpu().numpy()  # (K,) + batch_shape + (n,)
    largest = logs.max((0, -1), keepdims=True)
    drawn = np.exp(logs - np.where(np.isneginf(largest), 0.0, largest))
    mean = (shares[..., None] * drawn).sum(0)
    total = mean.sum(-1, keepdims=True)
    if not (total > 0).all():
        raise ValueError(f"options={options} have no probability at all at site {site!r}. Check how they are written.")
    probabilities = mean / total
    # Of a ratio of means, by the delta method.
    error = weighed((drawn - probabilities * drawn.sum(-1, keepdims=True)) / total, shares)[1]
    return Prediction(list(options), probabilities, error, len(drawn), ess_of(shares))


def _by_draws(nodes: list[Any], normalise: Callable[[str], Hashable], shares: np.ndarray) -> Prediction:
    rows: list[np.ndarray] = []
    known: dict[Hashable, int] = {}
    for node in nodes:
        value = node["value"].expand(*node["fn"].batch_shape, node["fn"].event_shape[0])
        texts = node["fn"].lm.decode(value.flatten(0, -2))
        labels = [known.setdefault(_normalised(normalise, text), len(known)) for text in texts]
        rows.append(np.array(labels).reshape(value.shape[:-1]))
    drawn = np.concatenate(rows)  # (K,) + batch_shape
    found, error = weighed(np.stack([drawn == n for n in range(len(known))], -1).astype(float), shares)
    order = np.argsort(-found.reshape(-1, len(known)).mean(0), kind="stable")
    names = list(known)
    return Prediction([names[n] for n in order], found[..., order], error[..., order], len(drawn), ess_of(shares))


def _normalised(normalise: Callable[[str], Hashable], text: str) -> Hashable:
    try:
        found = normalise(text)
        hash(found)
    except Exception as error:  # whatever the user's function raises
        raise ValueError(
            f"normalise={getattr(normalise, '__name__', normalise)!r} fails on the answer {text!r}: "
            f"{type(error).__name__}: {error}. It must give something that can be counted of every text."
        ) from error
    return found


def _check_answer(sites: poutine.Trace, name: str) -> None:
    site = sites.nodes.get(name)
    known = [n for n, s in sites.nodes.items() if s["type"] == "sample" and not n.startswith("_")]
    if site is None or site["type"] != "sample":
        raise ValueError(f"site={name!r} is no site of the program, which has {known}.")
    if not isinstance(site["fn"], ConditionedText):
        raise ValueError(f"site={name!r} is a {type(site['fn']).__name__} and no text. Name one of {known}.")
    if site["is_observed"]:
        raise ValueError(f"site={name!r} is observed. Leave the argument out that it is observed by.")
