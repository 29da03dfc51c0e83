"""Muon in fp32: momentum whose matrix is replaced by its nearest orthogonal one.

`torch.optim.Muon` orthogonalises in bfloat16, which a laptop's processor multiplies some thirty times more slowly than float32.
Here matrices of one shape are stacked and orthogonalised together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # the odd polynomial whose iteration drives singular values towards one


def orthogonal(stack_NRC: Tensor, steps: int = 5) -> Tensor:
    """The matrices with all singular values near one, by Newton-Schulz iteration; wide matrices make it cheapest."""
    tall = stack_NRC.size(-2) > stack_NRC.size(-1)
    x_NRC = stack_NRC.mT if tall else stack_NRC
    x_NRC = x_NRC / (x_NRC.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = a * x_NRC + (b * gram_NRR + c * gram_NRR @ gram_NRR) @ x_NRC
    return x_NRC.mT if tall else x_NRC


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; a tall matrix takes steps longer by the root of its aspect ratio."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shaped: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shaped[matrix.shape].append((matrix, self._momentum(matrix, matrix.grad, group["momentum"])))
            for shape, pairs in shaped.items():
                updates_NRC = orthogonal(torch.stack([momentum_RC for _, momentum_RC in pairs]))
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (matrix, _), update_RC in zip(pairs, updates_NRC):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update_RC, alpha=-rate)

    def _momentum(self, matrix: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        """Nesterov's look ahead: the gradient mixed with its updated running mean."""
        state = self.state[matrix]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(matrix)
        state["mean"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["mean"], momentum)
