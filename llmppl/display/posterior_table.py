"""A posterior's texts as a table: weight, log-joint, and every token coloured by guide against prior."""

from __future__ import annotations

import html
from typing import NamedTuple

import numpy as np

from llmppl.display.protocols import Samples
from llmppl.display.style import FRAGMENT
from llmppl.display.token_marks import coloured, legend, number, pieces, scores_table


def posterior_table(posterior: Samples, site: str, count: int = 20) -> str:
    """The distinct texts of a site with the largest total weight, as HTML.

    Texts are the same where their tokens are. Each row has the weight of all samples with this text, the
    largest log-joint among them, and the text, which unfolds to its tokens' log-probabilities. A token's
    colour says how far the guide's log-probability is above (solid line) or below (dashed line) the
    prior's, where the posterior holds both.

    :param count: rows, at most.
    :raises ValueError: a posterior with batch rows, or ``count`` below 1.
    :raises KeyError: no such text site.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    groups = distinct(posterior, site)
    shown = groups[:count]
    largest = max((group.weight for group in groups), default=0.0)
    scored = site in posterior.token_log_p and site in posterior.token_log_q
    body = "".join(_row(posterior, site, group, largest) for group in shown)
    mass = sum(group.weight for group in shown)
    weighted = posterior.method != "decoding"
    share = f", {mass:.1%} of the mass" if weighted else ""
    caption = f"{html.escape(site)}: {len(shown)} of {len(groups)} distinct texts{share}"
    return (
        f'{FRAGMENT}<div class="llmppl"><table class="posterior"><caption>{caption}</caption><thead><tr>'
        '<th class="weight">weight</th><th>log joint</th><th class="text">text</th></tr></thead>'
        f"<tbody>{body}</tbody></table>{legend() if scored else ''}</div>"
    )


class Group(NamedTuple):
    """The samples with one text: their total weight, and which of them has most."""

    weight: float
    log_joint: float
    sample: int


def distinct(posterior: Samples, site: str) -> list[Group]:
    """The distinct token sequences of a site, heaviest first; of equal weight, the first drawn first.

    :raises ValueError: a posterior with batch rows.
    :raises KeyError: no such text site.
    """
    if posterior.batch_shape:
        raise ValueError(
            f"this needs a posterior without batch rows, and batch_shape is {posterior.batch_shape}. "
            "Ask for one row: posterior.row(0)."
        )
    if site not in posterior.texts:
        raise KeyError(f"no latent text site {site!r}; the posterior has {posterior.texts}.")
    values = posterior.samples[site].reshape(posterior.num_samples, -1)
    weights = np.zeros(posterior.num_samples) if posterior.method == "decoding" else posterior.weights
    _, first, which = np.unique(values, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    total = np.bincount(which, weights, len(first))
    groups = []
    for n, weight in enumerate(total):
        members = np.flatnonzero(which == n)
        joint = posterior.log_joint[members]
        heaviest = members[np.lexsort((members, -joint, -weights[members]))[0]]
        groups.append((Group(float(weight), float(joint.max()), int(heaviest)), int(first[n])))
    # Answers of decoding have no weight; the better joint stands above.
    groups.sort(key=lambda item: (-item[0].weight, -item[0].log_joint, item[1]))
    return [group for group, _ in groups]


def _row(posterior: Samples, site: str, group: Group, largest: float) -> str:
    # A sample of a site inside a plate of the program holds several texts.
    texts = posterior.samples[site][group.sample]
    width = texts.shape[-1]
    scores = [
        posterior_scores[site][group.sample].reshape(-1, width) if site in posterior_scores else None
        for posterior_scores in (posterior.token_log_p, posterior.token_log_q)
    ]
    lines = []
    for n, ids in enumerate(texts.reshape(-1, width)):
        log_p, log_q = (None if part is None else part[n] for part in scores)
        found = pieces(ids, posterior.decoders[site])
        marked = "".join(coloured(piece, log_p, log_q) for piece in found)
        if log_p is None or log_q is None:
            lines.append(f'<div class="marked">{marked}</div>')
        else:
            lines.append(
                f'<details><summary class="marked">{marked}</summary>{scores_table(found, log_p, log_q)}</details>'
            )
    if posterior.method == "decoding":
        weight = '<td class="weight">n/a</td>'
    else:
        part = group.weight / largest if largest > 0 else 0.0
        weight = f'<td class="weight">{group.weight:.1%}{bar(part)}</td>'
    return f'<tr>{weight}<td>{number(group.log_joint)}</td><td class="text">{"".join(lines)}</td></tr>'


def bar(share: float) -> str:
    """A bar of some share of the width that it has."""
    return f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>'
