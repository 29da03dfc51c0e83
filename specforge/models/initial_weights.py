"""The random weights that a new draft starts from."""

import math

import torch
from torch import nn


@torch.no_grad()
def draw_weights(draft: nn.Module, seed: int) -> None:
    """Fill every matrix from a normal distribution of standard deviation 1/sqrt(inputs), less by sqrt(2) where it writes into the residual
    stream; experts alike, whose biases are 0; vectors stay."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in draft.named_parameters():
        if name.endswith(("bias_GI", "bias_GD", "gate.bias")):
            parameter.zero_()
        elif name.endswith(("up_GID", "down_GID")):
            residual = name.endswith("down_GID")
            std = 1 / math.sqrt(2 * parameter.shape[1] if residual else parameter.shape[2])
            parameter.normal_(0.0, std, generator=generator)
        elif parameter.dim() == 2:
            std = 1 / math.sqrt(parameter.shape[1])
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(0.0, std / math.sqrt(2) if residual else std, generator=generator)
