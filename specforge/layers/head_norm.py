"""Normalised heads: queries and keys divided by their root mean square, weighed and rotated, as Qwen3 has them."""

from typing import Any

import torch


def normalise_and_rotate(x_RnD: torch.Tensor, weight_nD: torch.Tensor, angle_R1C: torch.Tensor, eps: float) -> torch.Tensor:
    """`rotate(normalise(x, eps) * weight, angle)` in fewer passes over memory, in float32 at least."""
    return _NormaliseAndRotate.apply(x_RnD, weight_nD, angle_R1C, eps)


class _NormaliseAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RnD: torch.Tensor, weight_nD: torch.Tensor, angle_R1C: torch.Tensor, eps: float) -> torch.Tensor:
        wide = torch.promote_types(x_RnD.dtype, torch.float32)
        inverse_Rn1 = torch.linalg.vector_norm(x_RnD, dim=-1, keepdim=True, dtype=wide)
        inverse_Rn1.square_().div_(x_RnD.shape[-1]).add_(eps).rsqrt_()
        unit_RnD = x_RnD * inverse_Rn1
        pairs_RnC = _pairs(unit_RnD * weight_nD).mul_(angle_R1C)
        ctx.save_for_backward(unit_RnD, inverse_Rn1, weight_nD, angle_R1C)
        return torch.view_as_real(pairs_RnC).flatten(-2).to(x_RnD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        unit_RnD, inverse_Rn1, weight_nD, angle_R1C = ctx.saved_tensors
        (grad_RnD,) = grads
        turned_RnC = _pairs(grad_RnD.to(unit_RnD.dtype)) * angle_R1C.conj()
        grad_y_RnD = torch.view_as_real(turned_RnC).flatten(-2)
        product_RnD = grad_y_RnD * unit_RnD
        along_Rn1 = torch.linalg.vecdot(product_RnD, weight_nD.to(unit_RnD.dtype)).div_(unit_RnD.shape[-1])[..., None]
        grad_x_RnD = grad_y_RnD.mul_(weight_nD).addcmul_(unit_RnD, along_Rn1, value=-1).mul_(inverse_Rn1)
        return grad_x_RnD.to(grad_RnD.dtype), product_RnD.sum(0).to(weight_nD.dtype), None, None


def _pairs(x_RnD: torch.Tensor) -> torch.Tensor:
    """Neighbouring numbers as complex ones: a view [R, n, D / 2]."""
    return torch.view_as_complex(x_RnD.unflatten(-1, (-1, 2)))
