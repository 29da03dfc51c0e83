"""Root mean square normalisation without a weight: a norm's weight belongs to the columns of the projection that follows."""

from typing import Any

import torch
from torch.nn import functional as F


def normalise(x_RH: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in the data type of `x`; the mean is taken in float32 at least."""
    if not torch.is_grad_enabled():
        return F.rms_norm(x_RH, x_RH.shape[-1:], eps=eps)
    return _Normalise.apply(x_RH, eps)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RH: torch.Tensor, eps: float) -> torch.Tensor:
        wide = torch.promote_types(x_RH.dtype, torch.float32)
        norm_R1 = torch.linalg.vector_norm(x_RH, dim=-1, keepdim=True, dtype=wide)
        inverse_R1 = norm_R1.square_().div_(x_RH.shape[-1]).add_(eps).rsqrt_()
        y_RH = (x_RH * inverse_R1).to(x_RH.dtype)
        ctx.save_for_backward(y_RH, inverse_R1)
        return y_RH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_RH,) = grads
        y_RH, inverse_R1 = ctx.saved_tensors
        along_R1 = (grad_RH * y_RH).mean(-1, keepdim=True, dtype=inverse_R1.dtype)
        return torch.addcmul(grad_RH, y_RH, along_R1, value=-1).mul_(inverse_R1).to(grad_RH.dtype), None
