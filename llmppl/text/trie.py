"""The distinct prefixes of token rows, in an order that can be cut anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Trie:
    """Every distinct prefix of the rows is one node; nodes are numbered depth first.

    Whatever stands before a run of consecutive nodes and is seen from within it lies on one path, the
    ancestors of its first node. So a long trie is read in chunks that hand only one path on.

    :param paths: for each row the node of each of its tokens.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Trie:
        trie = cls(paths=[[] for _ in rows])
        before, path = list[int](), list[int]()
        for row, n in sorted((list(row), n) for n, row in enumerate(rows)):
            shared = 0
            for token, former in zip(row, before, strict=False):
                if token != former:
                    break
                shared += 1
            path = path[:shared]
            for depth in range(shared, len(row)):
                trie.parents.append(path[-1] if depth else -1)
                path.append(len(trie.tokens))
                trie.tokens.append(row[depth])
                trie.depths.append(depth)
            trie.paths[n] = path
            before = row
        return trie

    def __len__(self) -> int:
        return len(self.tokens)

    def ancestors(self, node: int) -> list[int]:
        """From the root down; the position of each is its depth."""
        path = []
        while (node := self.parents[node]) >= 0:
            path.append(node)
        return path[::-1]

    def visible(self, start: int, stop: int) -> np.ndarray:
        """What nodes ``start`` to ``stop`` see: a boolean ``(M, P + M)``, the ``P`` ancestors of
        ``start`` first, then the nodes themselves."""
        past = self.depths[start]
        seen = np.zeros((stop - start, past + stop - start), dtype=bool)
        for node in range(start, stop):
            parent, row = self.parents[node], seen[node - start]
            if parent >= start:
                row[:] = seen[parent - start]
            elif parent >= 0:
                row[: self.depths[parent] + 1] = True
            row[past + node - start] = True
        return seen
