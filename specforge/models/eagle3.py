"""The EAGLE-3 draft: fused target features and a token embedding in, one decoder layer, draft-vocabulary logits out.

Row t of a document carries the feature of token t and the embedding of token t+1, at RoPE position t, and predicts
token t+2 (arXiv 2503.01840). A later step of training-time test feeds the row's own output and the next true token.

Shapes: T packed tokens, R rows of a step, H hidden, A captured layers, h query heads, g key heads, D head width.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from specforge.data.vocabulary import DraftVocabulary
from specforge.layers.attention import prefix_and_own_attention
from specforge.layers.documents import QueryBlock
from specforge.layers.rotary import Rotary, rotate


@dataclass(frozen=True, kw_only=True)
class Eagle3Config:
    """Shape of the draft; `as_dict` is what a checkpoint's `config.json` holds."""

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    vocab_size: int
    draft_vocab_size: int
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    aux_layer_ids: tuple[int, ...]
    """Indices into Hugging Face `hidden_states`, ascending."""
    head_trained: bool
    fc_norm: bool
    norm_before_fc: bool
    norm_output: bool


@dataclass
class StepRows:
    """The rows of one step and where they sit."""

    token_R: torch.Tensor
    """Packed token index of each row, int64, ascending."""
    position_R: torch.Tensor
    """RoPE position, int64."""
    blocks: list[QueryBlock]
    keep: torch.Tensor | None
    """Which rows of the step before go on (int64 indices); None: all of them."""


@dataclass
class LayerKeys:
    """Keys and values of one layer over the steps of one batch."""

    prefix_k_TgD: torch.Tensor
    prefix_v_TgD: torch.Tensor
    own_k_R1gD: list[torch.Tensor] = field(default_factory=list)
    own_v_R1gD: list[torch.Tensor] = field(default_factory=list)

    def keep(self, rows: torch.Tensor) -> None:
        self.own_k_R1gD = [k[rows] for k in self.own_k_R1gD]
        self.own_v_R1gD = [v[rows] for v in self.own_v_R1gD]


class Eagle3Layer(nn.Module):
    """A Llama decoder layer; the first one attends from [norm(embedding); norm(feature)], twice as wide."""

    def __init__(self, config: Eagle3Config, first: bool) -> None:
        super().__init__()
        hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        width = 2 * hidden if first else hidden
        self.head_dim = config.head_dim
        self.input_layernorm = nn.RMSNorm(hidden, config.rms_norm_eps) if first else None
        self.hidden_norm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(width, groups * config.head_dim, bias=False)
        self.v_proj = nn.Linear(width, groups * config.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.head_dim, hidden, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.gate_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, hidden, bias=False)

    def attention_input(self, hidden_RH: torch.Tensor, embedded_RH: torch.Tensor) -> torch.Tensor:
        normed = self.hidden_norm(hidden_RH)
        return normed if self.input_layernorm is None else torch.cat([self.input_layernorm(embedded_RH), normed], -1)

    def keys_and_values(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        return k, self.v_proj(x).unflatten(-1, (-1, self.head_dim))

    def attend(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: LayerKeys, rows: StepRows) -> torch.Tensor:
        q_RhD = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        own_k = torch.cat(keys.own_k_R1gD, 1) if keys.own_k_R1gD else None
        own_v = torch.cat(keys.own_v_R1gD, 1) if keys.own_v_R1gD else None
        mixed = prefix_and_own_attention(q_RhD, keys.prefix_k_TgD, keys.prefix_v_TgD, own_k, own_v, rows.token_R, rows.blocks)
        return self.o_proj(mixed.flatten(1))

    def feed_forward(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        x = self.post_attention_layernorm(hidden_RH)
        return hidden_RH + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Eagle3Draft(nn.Module):
    """The trained network. `d2t` and `t2d` are part of its state, so the vocabulary can never be rebuilt differently."""

    d2t: torch.Tensor
    t2d: torch.Tensor

    def __init__(self, config: Eagle3Config, vocabulary: DraftVocabulary) -> None:
        super().__init__()
        self.config = config
        fused = len(config.aux_layer_ids) * config.target_hidden_size
        eps = config.rms_norm_eps
        self.fc_norm = nn.ModuleList(nn.RMSNorm(config.target_hidden_size, eps) for _ in config.aux_layer_ids) if config.fc_norm else None
        self.input_norm = nn.RMSNorm(fused, eps) if config.norm_before_fc else None
        self.fc = nn.Linear(fused, config.hidden_size, bias=False)
        self.layers = nn.ModuleList(Eagle3Layer(config, first=i == 0) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False) if config.head_trained else None
        self.rotary = Rotary(config.head_dim, config.max_position_embeddings, config.rope_parameters)
        self.register_buffer("d2t", torch.from_numpy(np.ascontiguousarray(vocabulary.d2t)))
        self.register_buffer("t2d", torch.from_numpy(np.ascontiguousarray(vocabulary.t2d)))

    @property
    def stack(self) -> list[Eagle3Layer]:
        return [layer for layer in self.layers if isinstance(layer, Eagle3Layer)]

    def fuse(self, aux_TF: torch.Tensor) -> torch.Tensor:
        """Captured layers [T, A*H], low to high, -> [T, H]."""
        aux_TF = aux_TF.to(self.fc.weight.dtype)
        if self.fc_norm is not None:
            parts = aux_TF.chunk(len(self.fc_norm), -1)
            aux_TF = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        return self.fc(aux_TF if self.input_norm is None else self.input_norm(aux_TF))

    def first_step(
        self, fused_TH: torch.Tensor, embedded_TH: torch.Tensor, everywhere: StepRows, rows: StepRows
    ) -> tuple[torch.Tensor, list[LayerKeys]]:
        """Step 0: keys and values of every token, outputs [R, H] (before the final norm) of the given rows only.

        Layers below the last one run `everywhere` (all T tokens), since the next layer's keys come from them.
        """
        cos_T, sin_T = self.rotary(fused_TH, everywhere.position_R)
        hidden, caches = fused_TH, list[LayerKeys]()
        for depth, layer in enumerate(self.stack):
            x_TX = layer.attention_input(hidden, embedded_TH)
            caches.append(LayerKeys(*layer.keys_and_values(x_TX, cos_T, sin_T)))
            last = depth == len(self.layers) - 1
            if last:
                x_TX, hidden = x_TX[rows.token_R], hidden[rows.token_R]
                hidden = hidden + layer.attend(x_TX, cos_T[rows.token_R], sin_T[rows.token_R], caches[-1], rows)
            else:
                hidden = hidden + layer.attend(x_TX, cos_T, sin_T, caches[-1], everywhere)
            hidden = layer.feed_forward(hidden)
        return hidden, caches

    def next_step(self, hidden_RH: torch.Tensor, embedded_RH: torch.Tensor, rows: StepRows, caches: list[LayerKeys]) -> torch.Tensor:
        """A later step: the rows' own outputs go in as features; each layer gains one key per row."""
        cos_R, sin_R = self.rotary(hidden_RH, rows.position_R)
        hidden = self.norm(hidden_RH) if self.config.norm_output else hidden_RH
        for layer, keys in zip(self.stack, caches, strict=True):
            if rows.keep is not None:
                keys.keep(rows.keep)
            x_RX = layer.attention_input(hidden, embedded_RH)
            k_RgD, v_RgD = layer.keys_and_values(x_RX, cos_R, sin_R)
            keys.own_k_R1gD.append(k_RgD[:, None])
            keys.own_v_R1gD.append(v_RgD[:, None])
            hidden = hidden + layer.attend(x_RX, cos_R, sin_R, keys, rows)
            hidden = layer.feed_forward(hidden)
        return hidden
