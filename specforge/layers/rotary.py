"""Rotary position embedding with every scaling rule that transformers knows."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class Rotary(nn.Module):
    """Cosines and sines of positions, for one head width and one set of RoPE parameters."""

    def __init__(self, head_dim: int, max_positions: int, rope_parameters: dict[str, Any]) -> None:
        super().__init__()
        config = LlamaConfig(
            head_dim=head_dim,
            hidden_size=head_dim,
            num_attention_heads=1,
            max_position_embeddings=max_positions,
            rope_parameters=rope_parameters,
        )
        self.tables = LlamaRotaryEmbedding(config)

    def forward(self, x: torch.Tensor, position_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [T, 1, D] in the data type of `x`."""
        cos_1TD, sin_1TD = self.tables(x, position_T[None])
        return cos_1TD[0, :, None], sin_1TD[0, :, None]


def rotate(x_ThD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotate the two halves of each of the first `heads` heads (the layout of Llama, "neox style") and copy the rest.

    The angles are constants without gradient.
    """
    return _Rotate.apply(x_ThD, cos_T1D, sin_T1D, heads)


class _Rotate(torch.autograd.Function):
    """The transpose of a rotation is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x_ThD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor, heads: int) -> torch.Tensor:
        ctx.save_for_backward(cos_T1D, sin_T1D)
        ctx.heads = heads
        return _rotated(x_ThD, cos_T1D, sin_T1D, heads, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos_T1D, sin_T1D = ctx.saved_tensors
        return _rotated(grads[0], cos_T1D, sin_T1D, ctx.heads, -1), None, None, None


def _rotated(x_ThD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor, heads: int, sign: int) -> torch.Tensor:
    out_ThD = torch.empty_like(x_ThD)
    out_ThD[:, heads:] = x_ThD[:, heads:]
    torch.mul(x_ThD[:, :heads], cos_T1D, out=out_ThD[:, :heads])
    (first, second), (out_first, out_second) = (t[:, :heads].chunk(2, -1) for t in (x_ThD, out_ThD))
    sin_first, sin_second = sin_T1D.chunk(2, -1)
    out_first.addcmul_(second, sin_first, value=-sign)
    out_second.addcmul_(first, sin_second, value=sign)
    return out_ThD
