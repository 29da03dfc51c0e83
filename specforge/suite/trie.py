"""Rows with common beginnings as one prefix tree, and its division into forwards that compute every token once.

Nodes stand depth first, so the subtree below node i is i .. exit[i] - 1, and node k is node q or above it iff k <= q < exit[k]: one
integer a node is the whole mask.

Shapes: M nodes, R rows, Q predictions (a row's token and the node before it).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trie:
    token_M: np.ndarray
    """int32."""
    depth_M: np.ndarray
    """Place in the row, int32."""
    parent_M: np.ndarray
    """Node above, int32; -1: none."""
    exit_M: np.ndarray
    """First node behind the subtree, int32."""
    path_R: list[np.ndarray]
    """Nodes of each row's tokens."""

    def __len__(self) -> int:
        return len(self.token_M)


@dataclass(frozen=True)
class Piece:
    """Nodes of one forward, on top of a path that earlier pieces left in the cache."""

    past: int
    """Tokens of that path."""
    nodes: np.ndarray
    """Ascending."""
    kept: bool
    """Whether these nodes, a chain, lengthen the path."""


def build(rows: Sequence[np.ndarray]) -> Trie:
    """The trie of rows [S] int32 each, in one pass over them in order."""
    keys = [row.astype(">i4").tobytes() for row in rows]
    path = np.empty(0, dtype=np.int32)
    before = np.empty(0, dtype=np.int32)
    total = sum(map(len, rows))
    token_M, depth_M, parent_M, exit_M = np.empty((4, total), dtype=np.int32)
    path_R: list[np.ndarray] = [path] * len(rows)
    size = 0
    for index in sorted(range(len(rows)), key=keys.__getitem__):
        row = rows[index]
        shared = _shared(before, row)
        exit_M[path[shared:]] = size
        new = np.arange(size, size + len(row) - shared, dtype=np.int32)
        token_M[new], depth_M[new] = row[shared:], np.arange(shared, len(row))
        path, before, size = np.concatenate([path[:shared], new]), row, size + len(new)
        parent_M[new] = np.concatenate([[-1], path])[shared:-1]
        path_R[index] = path
    exit_M[path] = size
    return Trie(token_M[:size], depth_M[:size], parent_M[:size], exit_M[:size], path_R)


def pieces(trie: Trie, budget: int) -> list[Piece]:
    """Forwards of about `budget` nodes each that visit every node once.

    Neighbouring subtrees share a forward. A subtree above the budget stays whole if only its stem is long; else its stem goes into the
    cache and what hangs below is divided in the same way.
    """
    found: list[Piece] = []
    waiting_stems = [(0, 0, len(trie), 0)]
    while waiting_stems:
        stem, fork, stop, past = waiting_stems.pop()
        if stem < fork:
            found.append(Piece(past, np.arange(stem, fork), kept=True))
        past += fork - stem
        together, size, stems = list[np.ndarray](), 0, []
        root = fork
        while root < stop:
            end = int(trie.exit_M[root])
            fork = _fork(trie, root, end) if end - root > budget else end
            if end - fork > budget:
                stems.append((root, fork, end, past))
            elif end - root > budget:
                found.append(Piece(past, np.arange(root, end), kept=False))
            else:
                if size + end - root > budget:
                    found.append(Piece(past, np.concatenate(together), kept=False))
                    together, size = [], 0
                together.append(np.arange(root, end))
                size += end - root
            root = end
        if together:
            found.append(Piece(past, np.concatenate(together), kept=False))
        waiting_stems += reversed(stems)  # the stem that is on top writes behind `past`, where no other one has work left
    return found


def _fork(trie: Trie, root: int, end: int) -> int:
    """The node behind the stem of a subtree: behind the chain at its beginning."""
    fork = root + 1
    while fork < end and trie.exit_M[fork] == end:
        fork += 1
    return fork


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length
