"""A diagnosis of a guide as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from llmppl.display.figures import Figures
from llmppl.display.plots import plot_calibration, plot_gaps, plot_ladder, plot_tail, plot_weights
from llmppl.display.posterior_html import numbers_table
from llmppl.display.posterior_table import posterior_table
from llmppl.display.prefix_tree import prefix_tree
from llmppl.display.protocols import Diagnosed, Gaps, Samples
from llmppl.display.style import FRAGMENT, PAGE
from llmppl.display.token_marks import number

MARKS = {"certified": "✓", "suggested": "~", "failed": "✗", "unknown": "?"}

GLOSSARY = {
    "weight": "A sample's share of the posterior: joint density over the guide's density, normalised.",
    "log joint": "log p(x, z) of a text z and what was observed, x. In nats, like every other logarithm here.",
    "log Z, log evidence": "log p(x), the joint summed over all texts. What the other numbers are measured against.",
    "log Ẑ": "The estimate of log Z by the mean weight. Below log Z in expectation; ± is its standard error, "
    "too small where k̂ is above 0.7.",
    "ELBO": "Mean log-weight. log Z − ELBO is KL(q‖p), the divergence of the guide from the posterior: the inference "
    "gap.",
    "lower and upper bound": "Of log Z, in expectation. The upper one needs data simulated from the program, whose "
    "latent texts are known; for other data there is none.",
    "approximation and amortization gap": "The inference gap of the best guide of this family for one observation "
    "alone, and what the shared guide loses on top.",
    "ESS": "Effective sample size: how many equally weighted draws these samples are worth. It does not see a mode "
    "that no sample fell into.",
    "k̂": "Shape of the weights' tail. Below 0.7 the weights can be relied on, if no mode was missed. Where a few texts "
    "have most of the mass it can be far above although the weights are nearly equal.",
    "calibration": "Simulated observations, whose latent texts are posterior draws, are compared with the samples: "
    "the ranks are uniform if the posterior is right. A curve that leaves the band rejects it.",
    "certified, suggested, failed, unknown": "Proved up to the stated error; consistent with the samples, which may "
    "miss modes; contradicted by a number; not asked or not answerable.",
}


def report_page(
    diagnosis: Diagnosed,
    title: str = "How far is this guide from the posterior?",
    observations: Sequence[Mapping[str, str]] | None = None,
    gaps: Gaps | None = None,
    about: Mapping[str, object] | None = None,
    count: int = 12,
) -> str:
    """One self-contained HTML page: the verdict first, then bounds, gaps, calibration, weights, and the
    posterior of every observation.

    :param diagnosis: what :func:`llmppl.diagnostics.diagnose` returns; rows of its posterior are the
        observations.
    :param observations: by observation, the texts it consists of, by name; by default the observed sites'.
    :param gaps: what :func:`llmppl.diagnostics.gap_report` returns.
    :param about: how it was made, by name: model, guide, samples, seed, date.
    :param count: texts in each posterior's table, at most.
    :raises ValueError: ``observations`` of another number than the posterior's rows.
    """
    rows = _rows(diagnosis.posterior)
    if observations is not None and len(observations) != len(rows):
        raise ValueError(
            f"observations has {len(observations)} entries, and the posterior has {len(rows)} rows. Give one a row."
        )
    figures = Figures()
    numbers = numbers_table({str(n): row for n, row in enumerate(rows)}, links=True)
    sections = [
        _verdict(diagnosis),
        *_figures(diagnosis, rows, gaps, figures),
        _section("Numbers", f'<div class="llmppl scroll">{numbers}</div>'),
        "<h2>Observations</h2>",
    ]
    for n, row in enumerate(rows):
        texts = _observed(row) if observations is None else observations[n]
        sections.append(_observation(n, row, texts, count, figures))
    sections += [_section("What the numbers mean", _definitions(GLOSSARY, "glossary"))]
    if about:
        sections.append(_section("How it was made", _definitions(about, "about")))
    body = "\n".join(sections).replace(FRAGMENT, "")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{PAGE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _verdict(diagnosis: Diagnosed) -> str:
    items = []
    for finding in diagnosis.findings:
        value = number(finding.number) if isinstance(finding.number, (int, float)) else str(finding.number or "")
        shown = f"<p>{html.escape(value)}</p>" if value else ""
        advice = f'<p class="advice">→ {html.escape(str(finding.advice))}</p>' if finding.advice else ""
        items.append(
            f'<li class="{finding.status}"><span class="status">{MARKS[finding.status]} {finding.status}</span>'
            f"<p><b>{html.escape(finding.claim)}</b></p>{shown}{advice}</li>"
        )
    return f'<p class="verdict">{html.escape(diagnosis.verdict)}</p>\n<ul class="findings">{"".join(items)}</ul>'


def _rows(posterior: Samples | list[Samples]) -> list[Samples]:
    """One posterior for each observation: of a run with rows, or of one run each."""
    several = posterior if isinstance(posterior, list) else [posterior]
    return [one.row(*place) for one in several for place in np.ndindex(one.batch_shape)]


def _figures(diagnosis: Diagnosed, rows: Sequence[Samples], gaps: Gaps | None, figures: Figures) -> Iterator[str]:
    bounds, calibration = diagnosis.bounds, diagnosis.calibration
    drawn: dict[str, str] = {}
    if bounds is not None:
        drawn["bounds"] = figures(
            lambda ax: plot_ladder(bounds, ax=ax),
            "The ladder of bounds. Thin bars: standard error over observations; thick: of the distance to the lower "
            "bound.",
        )
    if gaps is not None:
        drawn["gaps"] = figures(lambda ax: plot_gaps(gaps, ax), "The inference gap and its parts, means with s.e.")
    if all(row.weighted for row in rows):
        drawn["weights"] = figures(
            partial(_draw_weights, rows), "Weights of each observation's samples, largest first."
        )
    if drawn:
        yield _section(", ".join(drawn).capitalize(), _grid(drawn.values()))
    if calibration is not None:
        ranks = (
            figures(partial(_draw_calibration, calibration, name), f"Ranks of {name} among the samples.")
            for name in calibration.names
        )
        yield _section("Calibration", _grid(ranks))


def _grid(figures: Iterable[str]) -> str:
    return f'<div class="figures">{"".join(figures)}</div>'


def _draw_weights(rows: Sequence[Samples], ax: Any) -> None:
    for row in rows:
        plot_weights(row, ax)
    # One entry for equal weights, however many rows.
    ax.legend(*(entries[:1] for entries in ax.get_legend_handles_labels()))


def _draw_calibration(calibration: Any, name: str, ax: Any) -> Any:
    return plot_calibration(calibration, name, ax)


def _observation(n: int, row: Samples, texts: Mapping[str, str], count: int, figures: Figures) -> str:
    parts = [_definitions(texts, "observed")] if texts else []
    for site in row.texts:
        parts.append(f'<div class="scroll">{posterior_table(row, site, count)}</div>')
        if row.samples[site].ndim == 2 and row.method != "decoding":
            parts.append(f"<h3>Where the mass branches</h3>{prefix_tree(row, site)}")
    if row.method == "importance":
        parts.append(
            figures(lambda ax: plot_tail(row, ax), "How often a weight exceeds a value, and the fit behind k̂.")
        )
    first = next(iter(texts.values()), "")
    name = f"{n}: {first}" if len(first) < 60 else f"{n}: {first[:57]}…"
    opened = " open" if n == 0 else ""
    return (
        # The anchor stands inside: a link to it unfolds what it is in.
        f'<details class="observation"{opened}><summary>{html.escape(name)}</summary>'
        f'<div id="row-{n}">{"".join(parts)}</div></details>'
    )


def _observed(row: Samples) -> dict[str, str]:
    texts = {site: row.decode(site) for site in row.observed if site in row.decoders}
    return {site: text if isinstance(text, str) else " ¦ ".join(map(str, text)) for site, text in texts.items()}


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{content}</section>"


def _definitions(items: Mapping[str, object], name: str) -> str:
    lines = (f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in items.items())
    return f'<dl class="{name}">{"".join(lines)}</dl>'
