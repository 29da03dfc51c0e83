"""The gated feed-forward's nonlinearity on gate and up projections that lie side by side."""

from typing import Any

import torch
from torch.nn import functional as F


def swiglu(gate_up_R2I: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: [R, 2I] -> [R, I]. The input and silu(gate) are kept for the backward."""
    return _SwiGLU.apply(gate_up_R2I)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_R2I: torch.Tensor) -> torch.Tensor:
        gate_RI, up_RI = gate_up_R2I.chunk(2, -1)
        silu_RI = F.silu(gate_RI)
        ctx.save_for_backward(gate_up_R2I, silu_RI)
        return silu_RI * up_RI

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (gate_up_R2I, silu_RI), (grad_RI,) = ctx.saved_tensors, grads
        gate_RI, up_RI = gate_up_R2I.chunk(2, -1)
        grad_R2I = torch.empty_like(gate_up_R2I)
        grad_gate_RI, grad_up_RI = grad_R2I.chunk(2, -1)
        torch.mul(silu_RI, grad_RI, out=grad_up_RI)
        torch.ops.aten.silu_backward.grad_input(grad_RI * up_RI, gate_RI, grad_input=grad_gate_RI)
        return grad_R2I
