"""The DFlash draft: mask tokens in, a whole block of tokens out in one forward (arXiv 2602.06036).

A block holds the anchor's token and B - 1 mask tokens, at the positions of the anchor and behind it. Its rows attend to the target's
features of the tokens before the anchor, which are fused once and are keys and values of every layer, and to each other. The rows are
those of Qwen3-style layers; embedding and head are the target's.

Shapes: T packed tokens, R rows (A blocks of B), H hidden, F = captured layers * H, h query heads, g key heads, D head width.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from specforge.layers.block_attention import BlockMask, block_attention
from specforge.layers.head_norm import normalise_and_rotate
from specforge.layers.moe import SparseMoE
from specforge.layers.norm import normalise
from specforge.layers.rotary import Rotary, pair_rows
from specforge.layers.rows import take_rows
from specforge.layers.shared import Shared, linear
from specforge.models.decoder import DenseWeights, MixtureWeights, OutputWeights, after_attention, mixture_of
from specforge.models.draft_config import DraftConfig

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class DFlashConfig(DraftConfig):
    block_size: int
    """B, the anchor included."""
    mask_token_id: int
    layer_types: tuple[str, ...]
    sliding_window: int
    """W of the layers of type sliding_attention; 0 where there are none."""


@dataclass(frozen=True)
class Blocks:
    """Where the rows of a batch's blocks stand and what they see."""

    angle_T1C: torch.Tensor
    """What `Rotary` gives for the position of each token."""
    angle_R1C: torch.Tensor
    """The same for each row."""
    masks: dict[str, BlockMask]
    """By type of layer."""
    wanted_N: torch.Tensor
    """The rows whose output is wanted, int64."""


class Outputs(NamedTuple):
    hidden_NH: torch.Tensor
    """Of the wanted rows, after the final norm."""
    shares_NE: list[torch.Tensor]
    """How each layer divided them among its experts; empty where feed-forwards are dense."""


@dataclass(frozen=True, kw_only=True)
class LayerWeights(OutputWeights):
    """A layer's projections; the weights of the norms before them are multiplied into their columns."""

    qkv_XH: Shared
    """q, k and v below each other, of the rows' hidden state."""
    context_YH: Shared
    """k and v of the fused features."""
    head_norm_nD: torch.Tensor
    """Weight of the norm of each of the h query heads, scaled, and g key heads, in the order of `pair_rows`."""


class Attention(nn.Module):
    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * width, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * width, hidden, bias=False)
        self.q_norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(width, config.rms_norm_eps)


class FeedForward(nn.Module):
    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class DFlashLayer(nn.Module):
    """A Qwen3 decoder layer, whose rows see the fused features beside each other."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.head_dim, self.heads, self.groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.eps = config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: FeedForward | SparseMoE = mixture_of(config) if config.experts else FeedForward(config)

    def weights(self, context_norm_H: torch.Tensor) -> LayerWeights:
        """`context_norm_H`: the weight of the norm that all layers' context has passed."""
        own, mlp, norm = self.self_attn, self.mlp, self.post_attention_layernorm
        q, k = (pair_rows(projection.weight, self.head_dim) for projection in (own.q_proj, own.k_proj))
        query_norm_D, key_norm_D = (pair_rows(norm.weight, self.head_dim) for norm in (own.q_norm, own.k_norm))
        return LayerWeights(
            qkv_XH=Shared(torch.cat([q, k, own.v_proj.weight]) * self.input_layernorm.weight),
            context_YH=Shared(torch.cat([k, own.v_proj.weight]) * context_norm_H),
            head_norm_nD=torch.cat([(query_norm_D * self.head_dim**-0.5).expand(self.heads, -1), key_norm_D.expand(self.groups, -1)]),
            output_HZ=Shared(own.o_proj.weight),
            feed_forward=MixtureWeights.of(mlp, norm) if isinstance(mlp, SparseMoE) else DenseWeights.of(mlp, norm),
        )

    def context_keys_values(self, normed_TH: torch.Tensor, weights: LayerWeights, angle_T1C: torch.Tensor) -> torch.Tensor:
        """Keys and values [T, 2, g, D] of `normalise`d fused features."""
        k_TgD, v_TgD = linear(normed_TH, weights.context_YH).unflatten(-1, (2, self.groups, self.head_dim)).unbind(1)
        return torch.stack([normalise_and_rotate(k_TgD, weights.head_norm_nD[self.heads :], angle_T1C, self.eps), v_TgD], 1)

    def project(self, hidden_RH: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
        """q, k and v beside each other [R, X]."""
        return linear(normalise(hidden_RH, self.eps), weights.qkv_XH)

    def queries_keys_values(
        self, qkv_RX: torch.Tensor, weights: LayerWeights, angle_R1C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [R, h, D], scaled, and keys and values [2, R, g, D] of `project`ed rows."""
        qk_RnD, v_RgD = qkv_RX.unflatten(-1, (-1, self.head_dim)).split([self.heads + self.groups, self.groups], 1)
        q_RhD, k_RgD = normalise_and_rotate(qk_RnD, weights.head_norm_nD, angle_R1C, self.eps).split([self.heads, self.groups], 1)
        return q_RhD, torch.stack([k_RgD, v_RgD])


class DFlashDraft(nn.Module):
    """The trained network, its tensors named as the serving engines name them."""

    config_type: ClassVar[type[DFlashConfig]] = DFlashConfig

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(len(config.aux_layer_ids) * config.target_hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(DFlashLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.head_dim, config.max_position_embeddings, config.rope_parameters)

    @property
    def stack(self) -> list[DFlashLayer]:
        return [layer for layer in self.layers if isinstance(layer, DFlashLayer)]

    def fuse(self, aux_XF: torch.Tensor) -> torch.Tensor:
        """Captured layers [..., F], low to high, -> [..., H], `normalise`d: the weight of `hidden_norm` is in every layer's projection."""
        return normalise(self.fc(aux_XF.to(self.fc.weight.dtype)), self.config.rms_norm_eps)

    def spread(self, x_EX: torch.Tensor) -> torch.Tensor:
        """Something of A anchors, and in a last row of the mask token, to all rows of the A blocks: [R, X]."""
        anchor_A1X, mask_11X = x_EX[:-1, None], x_EX[-1:, None]
        mask_1kX = mask_11X.expand(-1, self.config.block_size - 1, -1)  # first, so that its gradient is summed over whole blocks
        return torch.cat([anchor_A1X, mask_1kX.expand(len(anchor_A1X), -1, -1)], 1).flatten(0, 1)

    def forward(self, aux_TF: torch.Tensor, embedded_EH: torch.Tensor, blocks: Blocks) -> Outputs:
        """`embedded_EH` are the anchors' tokens and, last, the mask token.

        All masked rows are alike before they are rotated, so the first layer projects one of them.
        """
        config, hidden, context_TH = self.config, self.spread(embedded_EH), self.fuse(aux_TF)
        shares = list[torch.Tensor]()
        for depth, (layer, kind) in enumerate(zip(self.stack, config.layer_types, strict=True)):
            weights = layer.weights(self.hidden_norm.weight)
            context_T2gD = Shared(layer.context_keys_values(context_TH, weights, blocks.angle_T1C))
            qkv_RX = layer.project(hidden, weights) if depth else self.spread(layer.project(embedded_EH, weights))
            q_RhD, own_2RgD = layer.queries_keys_values(qkv_RX, weights, blocks.angle_R1C)
            by_block = (-1, config.block_size)
            mixed_ABhD = block_attention(q_RhD.unflatten(0, by_block), own_2RgD.unflatten(1, by_block), context_T2gD, blocks.masks[kind])
            mixed_RhD = mixed_ABhD.flatten(0, 1)
            last = depth == config.num_hidden_layers - 1
            if last:
                hidden, mixed_RhD = take_rows(hidden, blocks.wanted_N), take_rows(mixed_RhD, blocks.wanted_N)
            hidden, share_RE = after_attention(hidden, mixed_RhD, weights, layer.eps)
            if share_RE is not None:
                shares.append(share_RE if last else take_rows(share_RE, blocks.wanted_N))
        return Outputs(self.final_norm(hidden), shares)

    def final_norm(self, hidden_XH: torch.Tensor) -> torch.Tensor:
        return normalise(hidden_XH, self.config.rms_norm_eps) * self.norm.weight
