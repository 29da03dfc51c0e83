"""The shape of what is verified at once: the last committed token as root, drafted tokens below it.

Shapes: B sequences, N nodes (node 0 is the root), K drafts of a chain.
"""

from dataclasses import dataclass
from typing import Self

import torch


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
        node_N = torch.arange(draft_tokens + 1, device=device)
        visible_NN = node_N <= node_N[:, None]
        return cls(*(x.expand(rows, *x.shape) for x in (node_N - 1, node_N, visible_NN)))

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
