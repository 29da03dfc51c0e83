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

    def forward(self, num_positions: int) -> torch.Tensor:
        """cos + i sin of each pair of dimensions at positions 0, 1, ...: complex64 [positions, 1, D / 2]."""
        inverse_C = self.tables.inv_freq
        cos_1PD, sin_1PD = self.tables(inverse_C, torch.arange(num_positions, device=inverse_C.device)[None])
        return torch.complex(cos_1PD, sin_1PD)[0, :, None, : len(inverse_C)]


def rotate(x_ThD: torch.Tensor, angle_T1C: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (2i, 2i + 1) of each head, in float32 at least, where Llama rotates (i, i + D / 2): see `pair_rows`."""
    wide = torch.promote_types(x_ThD.dtype, torch.float32)
    pairs_ThC = torch.view_as_complex(x_ThD.to(wide).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs_ThC * angle_T1C).flatten(-2).to(x_ThD.dtype)


def pair_rows(weight_XH: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The rows of a Llama projection in the order that `rotate` wants; products of queries and keys stay the same."""
    return weight_XH.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
