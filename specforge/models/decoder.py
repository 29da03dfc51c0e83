"""The half of a decoder layer that comes after attention, which all drafts have alike.

Shapes: R rows, H hidden, Z inputs of the output projection, I intermediate, of each expert or of the one feed-forward, E experts.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.func import functional_call

from specforge.layers.moe import SparseMoE
from specforge.layers.norm import normalise
from specforge.layers.shared import Shared, linear
from specforge.layers.swiglu import swiglu
from specforge.models.draft_config import DraftConfig


class Projections(Protocol):
    """Of a dense feed-forward."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear


@dataclass(frozen=True, kw_only=True)
class DenseWeights:
    """The weight of the norm before it is in the columns of gate_up."""

    gate_up_YH: Shared
    """Gate and up below each other, Y = 2 I."""
    down_HI: Shared

    @classmethod
    def of(cls, projections: Projections, norm: nn.RMSNorm) -> "DenseWeights":
        gate_up_YH = torch.cat([projections.gate_proj.weight, projections.up_proj.weight]) * norm.weight
        return cls(gate_up_YH=Shared(gate_up_YH), down_HI=Shared(projections.down_proj.weight))


@dataclass(frozen=True, kw_only=True)
class MixtureWeights:
    """A mixture and the tensors that stood in it, which a second pass in the backward must find although casts are gone by then."""

    norm_H: torch.Tensor
    mixture: SparseMoE
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, mixture: SparseMoE, norm: nn.RMSNorm) -> "MixtureWeights":
        return cls(norm_H=norm.weight, mixture=mixture, tensors=dict(mixture.named_parameters()))


@dataclass(frozen=True, kw_only=True)
class OutputWeights:
    output_HZ: Shared
    feed_forward: DenseWeights | MixtureWeights


class LayerOutput(NamedTuple):
    hidden_RH: torch.Tensor
    share_RE: torch.Tensor | None
    """How a mixture's gate divides each row among the experts; None of a dense feed-forward."""


def mixture_of(config: DraftConfig) -> SparseMoE:
    """Without noise, so that rows are routed alike in training, evaluation and decoding; it never reads a value back from its device."""
    width, inner = config.hidden_size, config.intermediate_size
    return SparseMoE(width, inner, config.experts, config.experts_per_token, sync_free=True, gate_noise=0.0)


def after_attention(hidden_RH: torch.Tensor, mixed_RhD: torch.Tensor, weights: OutputWeights, eps: float) -> LayerOutput:
    """Output projection and feed-forward, each added to what went in."""
    hidden_RH = hidden_RH + linear(mixed_RhD.flatten(1), weights.output_HZ)
    feed_forward, normed_RH = weights.feed_forward, normalise(hidden_RH, eps)
    if isinstance(feed_forward, DenseWeights):
        return LayerOutput(hidden_RH + linear(swiglu(linear(normed_RH, feed_forward.gate_up_YH)), feed_forward.down_HI), None)
    answer = functional_call(feed_forward.mixture, feed_forward.tensors, (normed_RH * feed_forward.norm_H,), tie_weights=False)
    return LayerOutput(hidden_RH + answer.out_TD, answer.share_TE)
