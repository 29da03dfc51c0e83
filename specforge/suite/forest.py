"""A task's rows as a prefix tree on a device: the forwards that it is divided into, and what each of them predicts.

Shapes: M nodes of a piece, X predictions of a piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from specforge.decode.tree import Tree
from specforge.suite.resident import OnDevice
from specforge.suite.tokens import TaskTokens
from specforge.suite.trie import Piece, Trie, build, pieces


@dataclass(frozen=True)
class TreePiece(OnDevice):
    """Nodes of one forward, behind `past` tokens that earlier pieces left in the cache."""

    past: int
    kept: bool
    """Whether they, a chain, stay in the cache."""
    ids_1M: torch.Tensor
    depth_1M: torch.Tensor
    """Below the path in the cache."""
    parent_1M: torch.Tensor
    """-1: none in this piece."""
    exit_M: torch.Tensor
    """First node of the piece behind the subtree."""
    node_X: torch.Tensor
    """Which nodes predict."""
    token_X: torch.Tensor
    place_X: torch.Tensor
    """Places among the predictions of the task."""

    @property
    def slots(self) -> int:
        return self.ids_1M.shape[1]

    def tree(self) -> Tree:
        node_M = torch.arange(self.slots, device=self.ids_1M.device)
        visible_MM = (node_M <= node_M[:, None]) & (node_M[:, None] < self.exit_M)
        return Tree(self.parent_1M, self.depth_1M, visible_MM[None])


@dataclass(frozen=True)
class Forest:
    pieces: list[TreePiece]
    unique_tokens: int
    longest: int
    """Tokens of the longest row."""

    @property
    def capacity(self) -> int:
        """Slots of the cache that its pieces need."""
        return max(piece.past + piece.slots for piece in self.pieces)

    @property
    def slots(self) -> int:
        return sum(piece.slots for piece in self.pieces)


def trie_of(tokens: TaskTokens, examples: Sequence[int]) -> Trie:
    """What there is to read of some examples: the last token of a row is predicted and never read, nor is a row of which nothing is."""
    return build([tokens.row(row)[:-1] for row in _rows(tokens, examples)])


def _rows(tokens: TaskTokens, examples: Sequence[int]) -> list[int]:
    return [row for example in examples for row in tokens.rows_of(example) if tokens.first_R[row] < tokens.lengths_R[row]]


def plant(tokens: TaskTokens, examples: Sequence[int], budget: int, trie: Trie | None = None) -> Forest:
    """The forest of some examples, in pieces of about `budget` nodes; `trie` is theirs, where it is there already."""
    rows = _rows(tokens, examples)
    if trie is None:
        trie = trie_of(tokens, examples)
    node, token, place = (list[np.ndarray]() for _ in range(3))
    for row, path in zip(rows, trie.path_R, strict=True):
        first = int(tokens.first_R[row])
        node.append(path[first - 1 :])
        token.append(tokens.row(row)[first:])
        place.append(tokens.prediction_start_R1[row] + np.arange(len(path) + 1 - first))
    divided = pieces(trie, budget)
    piece_of_M = np.empty(len(trie), dtype=np.int64)
    for number, piece in enumerate(divided):
        piece_of_M[piece.nodes] = number
    node_X, token_X, place_X = np.concatenate(node), np.concatenate(token), np.concatenate(place)
    piece_of_X = piece_of_M[node_X]
    order = np.lexsort((node_X, piece_of_X))
    borders = np.searchsorted(piece_of_X[order], np.arange(len(divided) + 1))
    planted = [
        _piece(trie, piece, *(array[order[begin:end]] for array in (node_X, token_X, place_X)))
        for piece, (begin, end) in zip(divided, pairwise(borders.tolist()), strict=True)
    ]
    return Forest(planted, len(trie), max(len(tokens.row(row)) for row in rows))


def _piece(trie: Trie, piece: Piece, node_X: np.ndarray, token_X: np.ndarray, place_X: np.ndarray) -> TreePiece:
    nodes = piece.nodes
    parent_M = np.searchsorted(nodes, trie.parent_M[nodes])
    inside_M = nodes[np.minimum(parent_M, len(nodes) - 1)] == trie.parent_M[nodes]
    arrays = {
        "ids_1M": trie.token_M[nodes][None],
        "depth_1M": trie.depth_M[nodes][None] - piece.past,
        "parent_1M": np.where(inside_M, parent_M, -1)[None],
        "exit_M": np.searchsorted(nodes, trie.exit_M[nodes]),
        "node_X": np.searchsorted(nodes, node_X),
        "token_X": token_X,
        "place_X": place_X,
    }
    return TreePiece(piece.past, piece.kept, **{name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()})
