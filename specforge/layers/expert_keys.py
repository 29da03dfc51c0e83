"""Weights of experts under a key each, as checkpoints of other programs have them, and stacked, as `SparseMoE` has them.

A key of one expert is `experts.3.fc1.weight`, as `torch.nn.Linear` stores it: fc1 [I, D] and fc2 [D, I], each with a bias.
"""

import re
from collections.abc import Mapping

import torch

from specforge.errors import CheckpointError

STACKED = {"up_GID": "fc1.weight", "up_bias_GI": "fc1.bias", "down_GID": "fc2.weight", "down_bias_GD": "fc2.bias"}
_OF_EXPERT = re.compile(r"(?P<mixture>(?:.*\.)?)experts\.(?P<expert>\d+)\.(?P<rest>fc[12]\.(?:weight|bias))")


def stack_experts(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with each mixture's experts stacked; all other keys as they are.

    Raises:
        CheckpointError: a mixture lacks a key of one of its experts, or these differ in shape.
    """
    found: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    stacked = {}
    for key, tensor in state.items():
        if match := _OF_EXPERT.fullmatch(key):
            found.setdefault(match["mixture"], {})[int(match["expert"]), match["rest"]] = tensor
        else:
            stacked[key] = tensor
    for mixture, tensors in found.items():
        experts = range(max(expert for expert, _ in tensors) + 1)
        for name, rest in STACKED.items():
            missing = next((expert for expert in experts if (expert, rest) not in tensors), None)
            if missing is not None:
                key = f"{mixture}experts.{missing}.{rest}"
                raise CheckpointError(f"{key}: is missing, but experts up to {experts[-1]} are there; give the checkpoint in full.")
            weights = [tensors[expert, rest] for expert in experts]
            if odd := [expert for expert, weight in enumerate(weights) if weight.shape != weights[0].shape]:
                raise CheckpointError(
                    f"{mixture}experts.{odd[0]}.{rest}: has the shape {list(weights[odd[0]].shape)}, that of expert 0 "
                    f"{list(weights[0].shape)}; experts of a mixture must be alike, take another checkpoint."
                )
            stacked[mixture + name] = torch.stack([weight.T for weight in weights] if name == "down_GID" else weights)
    return stacked


def unstack_experts(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `stack_experts`."""
    unstacked = {}
    for key, tensor in state.items():
        mixture, _, name = key.rpartition(".")
        if name not in STACKED:
            unstacked[key] = tensor
            continue
        for expert, weight in enumerate(tensor):
            whole = ".".join([*filter(None, [mixture]), "experts", str(expert), STACKED[name]])
            unstacked[whole] = weight.T.contiguous() if name == "down_GID" else weight.contiguous()
    return unstacked
