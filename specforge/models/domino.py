"""The Domino draft: DFlash and a correction of each row by the tokens before it (arXiv 2605.29707).

A recurrent unit reads the embeddings of the anchor and of the drafts before a row. Its state s and the row's output z give what is
added to the logits, W2 SiLU(W1 [z; s]), to those of every row but the anchor's, which has nothing before it that it did not see.

Shapes: T tokens, A blocks, H hidden, G width of the state, E rank of the correction.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from specforge.layers.rows import take_rows
from specforge.models.dflash import DFlashConfig, DFlashDraft


@dataclass(frozen=True, kw_only=True)
class DominoConfig(DFlashConfig):
    gru_hidden_dim: int
    emb_dim: int


class PrefixGru(nn.Module):
    """`nn.GRU` of one layer without bias, and its tensors' names; that one keeps lists of its weights, past casts and sharding."""

    def __init__(self, width: int, state_width: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * state_width, width))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * state_width, state_width))

    def forward(self, embedded_TH: torch.Tensor, begin_A: torch.Tensor, length: int) -> torch.Tensor:
        """States [A, length, G] after each of `length` tokens from A distinct places on. Each token is projected once, for all blocks."""
        read_TX = F.pad(F.linear(embedded_TH, self.weight_ih_l0), (0, 0, 0, length))
        states = [read_TX.new_zeros(len(begin_A), self.weight_hh_l0.shape[1])]
        for place in range(length):
            states.append(self._next(take_rows(read_TX, begin_A + place), states[-1]))
        return torch.stack(states[1:], 1)

    def step(self, embedded_AH: torch.Tensor, state_AG: torch.Tensor | None) -> torch.Tensor:
        """The state after one more token; None: after the first."""
        if state_AG is None:
            state_AG = embedded_AH.new_zeros(len(embedded_AH), self.weight_hh_l0.shape[1])
        return self._next(F.linear(embedded_AH, self.weight_ih_l0), state_AG)

    def _next(self, read_AX: torch.Tensor, state_AG: torch.Tensor) -> torch.Tensor:
        reset_AG, keep_AG, new_AG = read_AX.chunk(3, -1)
        reset_state_AG, keep_state_AG, new_state_AG = F.linear(state_AG, self.weight_hh_l0).chunk(3, -1)
        candidate_AG = (new_AG + (reset_AG + reset_state_AG).sigmoid() * new_state_AG).tanh()
        return torch.lerp(candidate_AG, state_AG, (keep_AG + keep_state_AG).sigmoid())


class DominoDraft(DFlashDraft):
    config_type: ClassVar[type[DFlashConfig]] = DominoConfig

    def __init__(self, config: DominoConfig) -> None:
        super().__init__(config)
        self.prefix_gru = PrefixGru(config.hidden_size, config.gru_hidden_dim)
        squeeze = nn.Linear(config.hidden_size + config.gru_hidden_dim, config.emb_dim, bias=False)
        self.embed_proj = nn.Sequential(squeeze, nn.SiLU(), nn.Linear(config.emb_dim, config.vocab_size, bias=False))

    @property
    def correction_VE(self) -> torch.Tensor:
        """W2."""
        weight = self.embed_proj[2].weight  # not `get_parameter`: in bfloat16 on one device a cast of it stands here
        assert isinstance(weight, torch.Tensor)
        return weight

    def squeeze(self, hidden_XH: torch.Tensor, state_XG: torch.Tensor) -> torch.Tensor:
        """SiLU(W1 [z; s]), [X, E]."""
        return self.embed_proj[:2](torch.cat([hidden_XH, state_XG], -1))
