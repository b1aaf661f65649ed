"""Where a posterior's mass branches: its texts as a tree of prefixes."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass, field

from llmppl.display.posterior_table import bar, distinct
from llmppl.display.protocols import Samples
from llmppl.display.style import FRAGMENT
from llmppl.display.token_marks import pieces, visible

OPEN = 0.1
"""Branches with at least this mass are unfolded at first."""


@dataclass
class Node:
    """Texts that begin alike.

    :param text: what this node adds to its parent's; empty for texts that end where others go on.
    :param mass: their total weight.
    :param count: how many distinct texts they are.
    """

    text: str
    mass: float
    count: int
    children: list[Node] = field(default_factory=list)


def prefix_tree(posterior: Samples, site: str, smallest: float = 0.02) -> str:
    """The texts of a site as a tree, as HTML: a node is a run of tokens without a branch, with its mass.

    The masses of a node's children sum to its own. Children stand by mass; those below ``smallest`` are
    gathered in one line where there are two of them or more.

    :param smallest: the least mass of a branch with a line of its own.
    :raises ValueError: a posterior with batch rows or without weights, or a site with several texts in a
        sample.
    :raises KeyError: no such text site.
    """
    root = build(posterior, site)
    lines = "".join(_lines(root, smallest))
    caption = f"{html.escape(site)}: {root.count} distinct texts, by how they begin"
    return f'{FRAGMENT}<div class="llmppl tree"><p class="caption">{caption}</p>{lines}</div>'


def build(posterior: Samples, site: str) -> Node:
    """The prefix tree of the texts with positive weight, chains of single children merged."""
    if posterior.method == "decoding":
        raise ValueError("answers of decoding have no weights, so there is no mass to draw a tree of.")
    groups = [group for group in distinct(posterior, site) if group.weight > 0]
    values = posterior.samples[site]
    if values.ndim != 2:
        raise ValueError(
            f"a sample of site {site!r} holds several texts (shape {values.shape[1:]}), and a tree is of one. "
            "Use posterior_table()."
        )
    decoder = posterior.decoders[site]
    texts = [([piece.text for piece in pieces(values[group.sample], decoder)], group.weight) for group in groups]
    root = Node("", sum(weight for _, weight in texts), len(texts))
    # (node, its texts, how many of their pieces stand above it)
    waiting = [(root, texts, 0)]
    while waiting:
        node, members, depth = waiting.pop()
        while len(following := _following(members, depth)) == 1 and node is not root:
            (step,) = following
            if step is None:
                break
            node.text += step
            depth += 1
        if len(following) == 1 and None in following:
            continue
        for step, branch in following.items():
            child = Node(step or "", sum(weight for _, weight in branch), len(branch))
            node.children.append(child)
            if step is not None:
                waiting.append((child, branch, depth + 1))
        node.children.sort(key=lambda child: (-child.mass, child.text))
    return root


Texts = list[tuple[list[str], float]]


def _following(members: Texts, depth: int) -> dict[str | None, Texts]:
    """Texts by their next piece; None for those that end here."""
    found: dict[str | None, Texts] = {}
    for text, weight in members:
        found.setdefault(text[depth] if depth < len(text) else None, []).append((text, weight))
    return found


def _lines(root: Node, smallest: float) -> Iterator[str]:
    """Nested ``<details>``; a stack, since texts can be longer than Python recurses."""
    waiting: list[str | tuple[Node, int]] = [(root, -1)]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
            continue
        node, depth = item
        kept = [child for child in node.children if child.mass >= smallest]
        small = [child for child in node.children if child.mass < smallest]
        if len(small) == 1:
            kept, small = node.children, []
        inside: list[str | tuple[Node, int]] = [(child, depth + 1) for child in kept]
        if small:
            mass = sum(child.mass for child in small)
            inside.append(f'<div class="leaf more">{_line(mass, f"{len(small)} more, {_percent(mass)}")}</div>')
        if node is root:
            waiting += reversed(inside)
        elif not node.children:
            yield f'<div class="leaf">{_line(node.mass, _label(node))}</div>'
        else:
            opened = " open" if node.mass >= OPEN else ""
            # Deeper than this a phone has no room to indent.
            place = ' class="deep"' if depth >= 6 else ""
            yield f"<details{place}{opened}><summary>{_line(node.mass, _label(node))}</summary><div>"
            waiting += ["</div></details>", *reversed(inside)]


def _label(node: Node) -> str:
    return f'<span class="marked">{visible(node.text)}</span>' if node.text else '<em class="ends">ends here</em>'


def _line(mass: float, label: str) -> str:
    share = f'<span class="mass">{_percent(mass)}{bar(min(mass, 1.0))}</span>'
    return f'<span class="line">{share}<span>{label}</span></span>'


def _percent(mass: float) -> str:
    return "&lt;0.1 %" if 0 < mass < 0.0005 else f"{100 * mass:.1f} %"
