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


def rotate(x_ThD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head (the layout of Llama, "neox style")."""
    first, second = x_ThD.chunk(2, -1)
    return x_ThD * cos_T1D + torch.cat([-second, first], -1) * sin_T1D
