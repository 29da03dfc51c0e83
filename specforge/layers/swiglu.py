"""The gated feed-forward's nonlinearity on gate and up projections that lie side by side."""

from typing import Any

import torch


def swiglu(gate_up_R2I: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: [R, 2I] -> [R, I]. The input and sigmoid(gate) are kept for the backward."""
    return _SwiGLU.apply(gate_up_R2I)


class _SwiGLU(torch.autograd.Function):
    """With s = sigmoid(x), silu(x) = x s, and its derivative s + x s (1 - s) lies the share s of the way from silu(x) to 1."""

    @staticmethod
    def forward(ctx: Any, gate_up_R2I: torch.Tensor) -> torch.Tensor:
        gate_RI, up_RI = gate_up_R2I.chunk(2, -1)
        sigmoid_RI = gate_RI.sigmoid()
        ctx.save_for_backward(gate_up_R2I, sigmoid_RI)
        return (gate_RI * sigmoid_RI).mul_(up_RI)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (gate_up_R2I, sigmoid_RI), (grad_RI,) = ctx.saved_tensors, grads
        gate_RI, up_RI = gate_up_R2I.chunk(2, -1)
        grad_R2I = torch.empty_like(gate_up_R2I)
        grad_gate_RI, grad_up_RI = grad_R2I.chunk(2, -1)
        silu_RI = torch.mul(gate_RI, sigmoid_RI, out=grad_up_RI)
        torch.lerp(silu_RI, sigmoid_RI.new_ones(()), sigmoid_RI, out=grad_gate_RI).mul_(up_RI).mul_(grad_RI)
        grad_up_RI.mul_(grad_RI)
        return grad_R2I
