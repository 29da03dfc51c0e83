"""The EAGLE-3 draft: fused target features and a token embedding in, one decoder layer, draft-vocabulary logits out.

Row t of a document carries the feature of token t and the embedding of token t+1, at RoPE position t, and predicts
token t+2 (arXiv 2503.01840). A later step of training-time test feeds the row's own output and the next true token.

Shapes: T packed tokens, R rows of a step, H hidden, A captured layers, h query heads, g key heads, D head width.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from specforge.data.vocabulary import DraftVocabulary
from specforge.layers.attention import causal_bias, prefix_and_own_attention
from specforge.layers.documents import Documents, QueryBlock, query_blocks
from specforge.layers.flex import block_mask, flex_prefix_and_own_attention
from specforge.layers.norm import normalise
from specforge.layers.rotary import Rotary, pair_rows, rotate
from specforge.layers.rows import take_rows, to_device
from specforge.layers.shared import Shared, linear
from specforge.models.decoder import DenseWeights, LayerOutput, MixtureWeights, OutputWeights, after_attention, mixture_of
from specforge.models.draft_config import DraftConfig


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(DraftConfig):
    draft_vocab_size: int
    head_trained: bool
    fc_norm: bool
    norm_before_fc: bool
    norm_output: bool


@dataclass(frozen=True)
class StepRows:
    """The rows of one step and where they sit."""

    token_R: torch.Tensor
    """Packed token index of each row, int64, ascending."""
    angle_R1C: torch.Tensor
    """What `Rotary` gives for the position of each row."""
    blocks: list[QueryBlock]
    biases: list[torch.Tensor]
    """The causal border of each block."""
    mask: BlockMask | None = None
    """In place of blocks and borders, for the compiled kernel."""

    @classmethod
    def of(cls, documents: Documents, rows_R: np.ndarray, angle_R1C: torch.Tensor, dtype: torch.dtype, flex: bool) -> Self:
        token_R = to_device(rows_R, angle_R1C.device)
        if flex and len(rows_R):
            return cls(token_R, angle_R1C, [], [], block_mask(documents, rows_R, angle_R1C.device))
        blocks = query_blocks(documents, rows_R)
        return cls(token_R, angle_R1C, blocks, [causal_bias(block, token_R, dtype) for block in blocks])


@dataclass(frozen=True, kw_only=True)
class LayerWeights(OutputWeights):
    """A layer's projections; the weights of the norms before them are multiplied into their columns."""

    qkv_XH: Shared
    """q, scaled, k and v below each other, of the hidden state."""
    embedding_XH: torch.Tensor | None
    """The same of the embedding; None in layers that see none."""


@dataclass
class LayerState:
    """What a layer works out once for a batch, and the keys and values that its steps add.

    Half of the first layer's input is the embedding of a true token, which many steps feed; its share of q, k and v is computed
    once a token.
    """

    weights: LayerWeights
    embedded_TX: torch.Tensor | None
    """Share of the embedding of token t+1 in q, k, v; None in layers that see no embedding."""
    prefix_T2gD: Shared
    own_k_RhD: list[Shared] = field(default_factory=list)
    own_v_RhD: list[Shared] = field(default_factory=list)
    """Of the steps after the first, repeated for each query head."""
    shares_RE: list[torch.Tensor] = field(default_factory=list)
    """How each step's rows were divided among the experts, where there are some."""

    def keep(self, rows: torch.Tensor) -> None:
        self.own_k_RhD = [Shared(take_rows(k.tensor, rows)) for k in self.own_k_RhD]
        self.own_v_RhD = [Shared(take_rows(v.tensor, rows)) for v in self.own_v_RhD]

    def add(self, k_RgD: torch.Tensor, v_RgD: torch.Tensor, heads: int) -> None:
        for own, part_RgD in ((self.own_k_RhD, k_RgD), (self.own_v_RhD, v_RgD)):
            own.append(Shared(part_RgD[:, :, None].expand(len(k_RgD), -1, heads // part_RgD.shape[1], -1).flatten(1, 2)))


class Eagle3Layer(nn.Module):
    """A Llama decoder layer; the first one attends from [norm(embedding); norm(feature)], twice as wide."""

    def __init__(self, config: Eagle3Config, first: bool) -> None:
        super().__init__()
        hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        width = 2 * hidden if first else hidden
        self.head_dim, self.heads, self.groups, self.eps = config.head_dim, heads, groups, config.rms_norm_eps
        self.checkpointing = False
        self.input_layernorm = nn.RMSNorm(hidden, config.rms_norm_eps) if first else None
        self.hidden_norm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(width, groups * config.head_dim, bias=False)
        self.v_proj = nn.Linear(width, groups * config.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.head_dim, hidden, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.moe = mixture_of(config) if config.experts else None
        if self.moe is None:
            self.gate_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
            self.up_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
            self.down_proj = nn.Linear(config.intermediate_size, hidden, bias=False)

    def weights(self) -> LayerWeights:
        q, k = (pair_rows(projection.weight, self.head_dim) for projection in (self.q_proj, self.k_proj))
        qkv = torch.cat([q * self.head_dim**-0.5, k, self.v_proj.weight])
        norms = [self.hidden_norm] if self.input_layernorm is None else [self.input_layernorm, self.hidden_norm]
        *embedding_XH, qkv_XH = (part * norm.weight for part, norm in zip(qkv.chunk(len(norms), 1), norms, strict=True))
        norm = self.post_attention_layernorm
        return LayerWeights(
            qkv_XH=Shared(qkv_XH),
            embedding_XH=embedding_XH[0] if embedding_XH else None,
            output_HZ=Shared(self.o_proj.weight),
            feed_forward=DenseWeights.of(self, norm) if self.moe is None else MixtureWeights.of(self.moe, norm),
        )

    def queries_keys_values(
        self, normed_RH: torch.Tensor, weights: LayerWeights, embedded_RX: torch.Tensor | None, angle_R1C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [R, h, D], scaled, and k, v [R, g, D] of `normalise`d states; overwrites `embedded_RX`."""
        qkv_RX = linear(normed_RH, weights.qkv_XH, embedded_RX)
        qk_RhD, v_RgD = qkv_RX.unflatten(-1, (-1, self.head_dim)).split([self.heads + self.groups, self.groups], 1)
        q_RhD, k_RgD = rotate(qk_RhD, angle_R1C).split([self.heads, self.groups], 1)
        return q_RhD, k_RgD, v_RgD

    def mix(
        self, hidden_RH: torch.Tensor, q_RhD: torch.Tensor, state: LayerState, rows: StepRows, taught_R: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer from its queries on. `taught_R`: rows whose shares are kept, int64; None: all."""
        own_k, own_v = tuple(state.own_k_RhD), tuple(state.own_v_RhD)  # as they are now: a second pass must not see later steps

        def run(hidden_RH: torch.Tensor, q_RhD: torch.Tensor) -> LayerOutput:
            if rows.mask is None:
                mixed_RhD = prefix_and_own_attention(q_RhD, state.prefix_T2gD, own_k, own_v, rows.blocks, rows.biases)
            else:
                k_RhD, v_RhD = ([each.tensor for each in own] for own in (own_k, own_v))
                mixed_RhD = flex_prefix_and_own_attention(q_RhD, state.prefix_T2gD.tensor, k_RhD, v_RhD, rows.mask)
            return after_attention(hidden_RH, mixed_RhD, state.weights, self.eps)

        if self.checkpointing and torch.is_grad_enabled():
            hidden_RH, share_RE = checkpoint(run, hidden_RH, q_RhD, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden_RH, share_RE = run(hidden_RH, q_RhD)
        if share_RE is not None:
            state.shares_RE.append(share_RE if taught_R is None else take_rows(share_RE, taught_R))
        return hidden_RH


class Eagle3Draft(nn.Module):
    """The trained network. `d2t` and `t2d` are part of its state, so the vocabulary can never be rebuilt differently."""

    d2t: torch.Tensor
    t2d: torch.Tensor
    config_type: ClassVar[type[Eagle3Config]] = Eagle3Config

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

    def final_norm(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        return normalise(hidden_RH, self.config.rms_norm_eps) * self.norm.weight

    def first_step(
        self, fused_TH: torch.Tensor, embedded_TH: torch.Tensor, everywhere: StepRows, rows: StepRows
    ) -> tuple[torch.Tensor, list[LayerState]]:
        """Step 0: keys and values of every token, outputs [R, H] (before the final norm) of the given rows only.

        Layers below the last one run `everywhere` (all T tokens), since the next layer's keys come from them.
        """
        hidden, states = fused_TH, list[LayerState]()
        for depth, layer in enumerate(self.stack):
            weights, embedded_TX, own_TX = layer.weights(), None, None
            if weights.embedding_XH is not None:
                embedded_TX = F.linear(normalise(embedded_TH, layer.eps), weights.embedding_XH)
                own_TX = embedded_TX.clone()
            q_RhD, k_TgD, v_TgD = layer.queries_keys_values(normalise(hidden, layer.eps), weights, own_TX, everywhere.angle_R1C)
            states.append(LayerState(weights, embedded_TX, Shared(torch.stack([k_TgD, v_TgD], 1))))
            if depth == len(self.layers) - 1:
                q_RhD, hidden = take_rows(q_RhD, rows.token_R), take_rows(hidden, rows.token_R)
                hidden = layer.mix(hidden, q_RhD, states[-1], rows)
            else:
                hidden = layer.mix(hidden, q_RhD, states[-1], everywhere, rows.token_R)
        return hidden, states

    def next_step(
        self, hidden_RH: torch.Tensor, normed_RH: torch.Tensor, fed_R: torch.Tensor, rows: StepRows, states: list[LayerState]
    ) -> torch.Tensor:
        """A later step: the rows' own outputs, plain and `normalise`d, go in as features; each layer gains one key per row.

        `fed_R` says which of the first layer's embeddings each row is fed. What all rows are fed may be given once.
        """
        hidden = normed_RH * self.norm.weight if self.config.norm_output else hidden_RH
        for layer, state in zip(self.stack, states, strict=True):
            embedded_RX = None if state.embedded_TX is None else take_rows(state.embedded_TX, fed_R)
            if hidden is not hidden_RH:
                normed_RH = normalise(hidden, layer.eps)
            q_RhD, k_RgD, v_RgD = layer.queries_keys_values(normed_RH, state.weights, embedded_RX, rows.angle_R1C)
            state.add(k_RgD, v_RgD, layer.heads)
            hidden = layer.mix(hidden, q_RhD, state, rows)
        return hidden
