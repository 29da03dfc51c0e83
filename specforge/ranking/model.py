"""The ranking model: rows of a user's history in, one logit a row out: will the user click?

The shape is that of the ranking model of the CTI contest of 2026, itself a kin of GRAB (arXiv 2602.01865) and HSTU (arXiv 2402.17152):
each bag of signs becomes the sum of their rows in one table, the bags of a row are normalised and projected side by side, and layers with
causal attention within each user and a mixture of experts read that. There are no positions: the mask alone tells earlier rows from later
ones.

Only scored rows reach the head, and in the last layer they alone are computed after attention, since no other row is heard of again.

Shapes: N rows of all users, P scored rows, S slots, d width of a slot, D width of the model, h heads, E experts.
"""

from typing import NamedTuple, cast

import torch
from torch import nn

from specforge.layers.attention_choice import resolve
from specforge.layers.moe import Mixture, SparseMoE, balance_loss
from specforge.layers.packed import PackedLayout
from specforge.layers.packed_attention import PackedAttention, prepare
from specforge.layers.rows import take_rows
from specforge.layers.slots import SlotBags, SlotEmbedding
from specforge.ranking.batch import RankingBatch
from specforge.ranking.shape import CTRConfig

LARGEST_LOGIT = 15.0
TABLE_SCALE = 0.16
"""Of what the table of signs begins with. Behind the norm its scale says nothing but how much a step moves it: at 1 the AUC on the made-up
world was 0.002 lower after 200 steps."""


class Scores(NamedTuple):
    logit_P: torch.Tensor
    """Of the scored rows, in their order, within +-`LARGEST_LOGIT`; float32 at least."""
    balance: torch.Tensor
    """`balance_loss` of the rows that a layer computes, averaged over the layers; scalar, 0 without a scored row."""
    overflow: torch.Tensor
    """Picks that found no place with their expert, int64 []; always 0 but for moe=capacity. Whoever calls reports it."""


class RepEncoder(nn.Module):
    """[N, D] of the signs of N rows."""

    def __init__(self, config: CTRConfig) -> None:
        super().__init__()
        self.slots = SlotEmbedding(config.slots)
        with torch.no_grad():
            self.slots.table.mul_(TABLE_SCALE)
        self.norm = nn.LayerNorm(config.slots.slots * config.slots.width)
        self.project = nn.Linear(config.slots.slots * config.slots.width, config.width)

    def forward(self, bags: SlotBags) -> torch.Tensor:
        x_ND: torch.Tensor = self.project(self.norm(self.slots(bags)))
        return x_ND


class FeedForward(nn.Module):
    """The mixture of experts of the normalised rows."""

    def __init__(self, config: CTRConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.moe = SparseMoE(config.width, config.inner, config.experts, config.top_k)

    def forward(self, x_ND: torch.Tensor, noise_NE: torch.Tensor | None) -> Mixture:
        mixture: Mixture = self.moe(self.norm(x_ND), noise_NE)
        return mixture


class Layer(nn.Module):
    """Attention and feed-forward, each of normalised rows and added to them."""

    def __init__(self, config: CTRConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x_ND: torch.Tensor, attention: PackedAttention, noise_NE: torch.Tensor | None, wanted_P: torch.Tensor | None
    ) -> tuple[torch.Tensor, Mixture]:
        """
        Args:
            noise_NE: of the gate, see `SparseMoE`.
            wanted_P: the rows whose output is wanted, int64; None: all.
        """
        q_NhC, k_NhC, v_NhC = self.qkv(self.norm(x_ND)).unflatten(1, (3, self.heads, -1)).unbind(1)
        attended_ND = attention(q_NhC * q_NhC.shape[2] ** -0.5, k_NhC, v_NhC).flatten(1)
        if wanted_P is not None:
            x_ND, attended_ND = take_rows(x_ND, wanted_P), take_rows(attended_ND, wanted_P)
            noise_NE = None if noise_NE is None else noise_NE.index_select(0, wanted_P)
        x_ND = x_ND + self.out(attended_ND)
        mixture = self.feed_forward(x_ND, noise_NE)
        return x_ND + mixture.out_TD, mixture


class CTRModel(nn.Module):
    """
    Args:
        attn: an implementation of packed attention that the device has, or `auto`.
    """

    def __init__(self, config: CTRConfig, attn: str = "auto") -> None:
        super().__init__()
        self.config, self.attn = config, attn
        self.encoder = RepEncoder(config)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.layers)])
        self.head = nn.Linear(config.width, 1)

    @property
    def stack(self) -> list[Layer]:
        """The layers, typed."""
        return [cast(Layer, layer) for layer in self.layers]

    def forward(self, batch: RankingBatch, noise_LNE: torch.Tensor | None = None) -> Scores:
        """
        Args:
            noise_LNE: standard normal numbers for the gates of each layer; None: the gates draw them in training, and have none elsewhere.
        """
        x_ND = self.encoder(batch.bags)
        chosen = resolve(self.attn, x_ND.device, x_ND.dtype, torch.is_grad_enabled())
        attention = prepare(chosen.name, PackedLayout(batch.documents, x_ND.device))
        mixtures = []
        for number, layer in enumerate(self.stack, start=1):
            noise_NE = None if noise_LNE is None else noise_LNE[number - 1]
            x_ND, mixture = layer(x_ND, attention, noise_NE, batch.scored_rows if number == len(self.layers) else None)
            mixtures.append(mixture)
        logit_P = self.head(x_ND)[:, 0]
        logit_P = logit_P.to(torch.promote_types(logit_P.dtype, torch.float32)).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        balance = logit_P.new_zeros(())
        if batch.num_scored:  # the last layer's importance is 0 otherwise, where std has no gradient
            balance = torch.stack([balance_loss(mixture.importance_E) for mixture in mixtures]).mean()
        return Scores(logit_P, balance, torch.stack([mixture.overflow for mixture in mixtures]).sum())
