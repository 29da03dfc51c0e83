"""What an engine runs, whatever layout it was read from."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Network:
    """The shape of a draft."""

    kind: str
    """eagle3, peagle, dflash, domino or dspark."""
    hidden_state_ids: tuple[int, ...]
    """What it reads of the target: indices into Hugging Face `hidden_states`."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    draft_vocab: int
    max_positions: int
    eps: float
    rope: dict[str, Any]
    """`rope_type`, `rope_theta` and what the type adds."""
    feature: int
    """Width of one captured layer."""
    own: tuple[tuple[str, Any], ...]
    """What only this kind has, by name."""

    def __getitem__(self, name: str) -> Any:
        return dict(self.own)[name]

    @property
    def fused(self) -> int:
        """Width of all captured layers beside each other."""
        return len(self.hidden_state_ids) * self.feature


@dataclass(frozen=True)
class Served:
    """A draft and its tensors; `tables` are copies of the target's embedding and head, where the folder holds them."""

    network: Network
    tensors: dict[str, torch.Tensor]
    tables: dict[str, torch.Tensor]
