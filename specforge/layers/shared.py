"""A tensor that many operations read, and one place where they add up its gradient.

Autograd writes the gradient of each reader to memory of its own and adds them up afterwards. Readers that know of each other add
their product to the sum as they compute it.

Shapes: R rows, I inputs, O outputs.
"""

from typing import Any

import torch
from torch.nn import functional as F


class GradientSum:
    total: torch.Tensor | None = None

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self.total = left @ right if self.total is None else self.total.addmm_(left, right)

    def add_scaled(self, weight: torch.Tensor, x: torch.Tensor) -> None:
        self.total = weight * x if self.total is None else self.total.addcmul_(weight, x)


class Shared:
    """`tensor` is for autograd functions that add its gradient to `grad` in their backward, and return None for it.

    The tensor's own history is given the sum once all of them are done; plain operations may read it as well. A function keeps
    `grad` alone, since the tensor's history would make a circle that only the garbage collector opens.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self.grad = GradientSum()
        self.tensor: torch.Tensor = _Share.apply(x, self.grad)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, grad: GradientSum) -> torch.Tensor:
        ctx.grad = grad
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        (plain,), total = grads, ctx.grad.total
        ctx.grad.total = None
        if plain is None or total is None:
            return plain if total is None else total, None
        return total + plain, None


def linear(x_RI: torch.Tensor, weight_OI: Shared, onto_RO: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T: [R, O]; in place on top of what `onto_RO` holds, if that is given."""
    if onto_RO is None and not torch.is_grad_enabled():
        return F.linear(x_RI, weight_OI.tensor)
    return _Linear.apply(x_RI, weight_OI.tensor, weight_OI.grad, onto_RO)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RI: torch.Tensor, weight_OI: torch.Tensor, grad: GradientSum, onto_RO: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x_RI, weight_OI)
        ctx.grad = grad
        if onto_RO is None:
            return F.linear(x_RI, weight_OI)
        ctx.mark_dirty(onto_RO)
        return onto_RO.addmm_(x_RI, weight_OI.T)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None]:
        (x_RI, weight_OI), (grad_RO,) = ctx.saved_tensors, grads
        if ctx.needs_input_grad[1]:
            ctx.grad.add_product(grad_RO.T, x_RI)
        return grad_RO @ weight_OI if ctx.needs_input_grad[0] else None, None, None, grad_RO if ctx.needs_input_grad[3] else None
