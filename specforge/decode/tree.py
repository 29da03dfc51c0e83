"""What is verified at once: the last committed token as root, drafted tokens below it; and how such trees are asked for.

Shapes: B sequences, N nodes (node 0 is the root), K drafts of a chain.
"""

from dataclasses import dataclass
from functools import cache
from typing import Self

import torch

from specforge.errors import ConfigError


@dataclass(frozen=True)
class Tree:
    """Nodes in an order in which parents come first. A chain is the tree in which node n hangs below node n - 1."""

    parent_BN: torch.Tensor
    """Node above, int64; -1 for the root."""
    depth_BN: torch.Tensor
    """Distance to the root, int64."""
    visible_BNN: torch.Tensor
    """Whether the node of the column is the node of the row or lies above it: bool."""

    @classmethod
    def chain(cls, rows: int, draft_tokens: int, device: torch.device) -> Self:
        return cls(*_chain(rows, draft_tokens, device))

    @classmethod
    def of(cls, parent_BN: torch.Tensor, max_depth: int) -> Self:
        """Depth and visibility worked out from the parents; no node lies deeper than `max_depth`."""
        rows, nodes = parent_BN.shape
        visible_BNN = torch.eye(nodes, dtype=torch.bool, device=parent_BN.device).repeat(rows, 1, 1)
        above_BN, depth_BN = parent_BN, torch.zeros_like(parent_BN)
        for _ in range(max_depth):
            inside_BN, column_BN = above_BN >= 0, above_BN.clamp_min(0)
            column_BN1 = column_BN[..., None]
            visible_BNN.scatter_(2, column_BN1, visible_BNN.gather(2, column_BN1) | inside_BN[..., None])
            depth_BN = depth_BN + inside_BN
            above_BN = torch.where(inside_BN, parent_BN.gather(1, column_BN), -1)
        return cls(parent_BN, depth_BN, visible_BNN)


@cache
def _chain(rows: int, draft_tokens: int, device: torch.device) -> list[torch.Tensor]:
    node_N = torch.arange(draft_tokens + 1, device=device)
    return [x.expand(rows, *x.shape) for x in (node_N - 1, node_N, node_N <= node_N[:, None])]


@dataclass(frozen=True)
class TreeShape:
    """How far and how wide a tree grows, and how much of it is verified."""

    depth: int
    top_k: int
    """Beams of a depth, and children that each of them is given."""
    nodes: int
    """Drafted tokens that are verified."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """`4x2x10`: depth, top_k and nodes."""
        sizes = text.split("x")
        if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
            raise ConfigError(f"tree {text!r}: must be three numbers, DEPTHxTOP_KxNODES, such as 4x2x10.")
        return cls(*map(int, sizes))

    def __str__(self) -> str:
        return f"{self.depth}x{self.top_k}x{self.nodes}"

    def __post_init__(self) -> None:
        candidates = self.top_k + max(self.depth - 1, 0) * self.top_k**2
        if min(self.depth, self.top_k) < 1 or not self.depth <= self.nodes <= candidates:
            raise ConfigError(
                f"tree depth={self.depth}, top_k={self.top_k}, nodes={self.nodes}: depth and top_k must be at least 1, nodes between "
                f"depth and the {candidates} candidates, top_k + (depth - 1) * top_k^2."
            )
