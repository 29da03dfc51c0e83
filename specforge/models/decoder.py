"""The half of a decoder layer that comes after attention, which all drafts have alike."""

from dataclasses import dataclass

import torch

from specforge.layers.norm import normalise
from specforge.layers.shared import Shared, linear
from specforge.layers.swiglu import swiglu


@dataclass(frozen=True, kw_only=True)
class OutputWeights:
    """Z inputs of the output projection, I intermediate; the weight of the norm before the feed-forward is in the columns of gate_up."""

    output_HZ: Shared
    gate_up_YH: Shared
    """Gate and up below each other, Y = 2 I."""
    down_HI: Shared


def after_attention(hidden_RH: torch.Tensor, mixed_RhD: torch.Tensor, weights: OutputWeights, eps: float) -> torch.Tensor:
    """Output projection and feed-forward, each added to what went in."""
    hidden_RH = hidden_RH + linear(mixed_RhD.flatten(1), weights.output_HZ)
    return hidden_RH + linear(swiglu(linear(normalise(hidden_RH, eps), weights.gate_up_YH)), weights.down_HI)
