"""The DSpark draft: DFlash, a bias of each row by the token before it, and how sure it is of each row (arXiv 2607.05147).

The Markov head adds W2 f to a row's logits, of rank R. With e = W1[x], x the token before the row, and h the row's output:

    vanilla  f = e
    gated    f = sigmoid(G [h; e]) * e
    rnn      f = tanh(o),  s' = sigmoid(g) * s + (1 - sigmoid(g)) * tanh(c),  (g, c, o) = J [s; e; h],  s = 0 before the first row

and the confidence head's sigmoid(w [h; e] + b) is the probability that a token drafted in this row is accepted.

Shapes: N rows that count of A blocks of B, H hidden, R rank.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from specforge.layers.rows import take_rows
from specforge.models.dflash import DFlashConfig, DFlashDraft


@dataclass(frozen=True, kw_only=True)
class DSparkConfig(DFlashConfig):
    markov_rank: int
    markov_head_type: str


class MarkovHead(nn.Module):
    """vanilla, and what the others have in common. Biases start at 0."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        self.rank = config.markov_rank
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.vocab_size, bias=False)

    def forward(self, embedded_NR: torch.Tensor, hidden_NH: torch.Tensor, cell_N: torch.Tensor, blocks: int) -> torch.Tensor:
        """f [N, R] of rows at the places `cell_N` of A x B."""
        return self.step(embedded_NR, hidden_NH, None)[0]

    def step(
        self, embedded_AR: torch.Tensor, hidden_AH: torch.Tensor, state_AR: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """f [A, R] of the next row of each block, and the state after it; None before the first."""
        return embedded_AR, None


class GatedMarkovHead(MarkovHead):
    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        self.gate_proj = biased(config.hidden_size + self.rank, self.rank)

    def step(
        self, embedded_AR: torch.Tensor, hidden_AH: torch.Tensor, state_AR: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.gate_proj(torch.cat([hidden_AH, embedded_AR], -1)).sigmoid() * embedded_AR, None


class RecurrentMarkovHead(MarkovHead):
    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        self.block_size = config.block_size
        self.joint_proj = biased(2 * self.rank + config.hidden_size, 3 * self.rank)

    def forward(self, embedded_NR: torch.Tensor, hidden_NH: torch.Tensor, cell_N: torch.Tensor, blocks: int) -> torch.Tensor:
        read_NX = self._read(embedded_NR, hidden_NH)
        read_RX = read_NX.new_zeros(blocks * self.block_size, read_NX.shape[1]).index_copy(0, cell_N, read_NX)
        features, state_AR = [], None
        for read_AX in read_RX.unflatten(0, (blocks, self.block_size)).unbind(1):
            feature_AR, state_AR = self._next(read_AX, state_AR)
            features.append(feature_AR)
        return take_rows(torch.stack(features, 1).flatten(0, 1), cell_N)

    def step(
        self, embedded_AR: torch.Tensor, hidden_AH: torch.Tensor, state_AR: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._next(self._read(embedded_AR, hidden_AH), state_AR)

    def _read(self, embedded_XR: torch.Tensor, hidden_XH: torch.Tensor) -> torch.Tensor:
        """What J adds of [e; h], for all rows at once."""
        return F.linear(torch.cat([embedded_XR, hidden_XH], -1), self.joint_proj.weight[:, self.rank :], self.joint_proj.bias)

    def _next(self, read_AX: torch.Tensor, state_AR: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if state_AR is None:
            state_AR = read_AX.new_zeros(len(read_AX), self.rank)
        keep_AR, new_AR, out_AR = (read_AX + F.linear(state_AR, self.joint_proj.weight[:, : self.rank])).chunk(3, -1)
        return out_AR.tanh(), torch.lerp(new_AR.tanh(), state_AR, keep_AR.sigmoid())


class ConfidenceHead(nn.Module):
    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        self.proj = biased(config.hidden_size + config.markov_rank, 1)

    def forward(self, embedded_XR: torch.Tensor, hidden_XH: torch.Tensor) -> torch.Tensor:
        """Logits [X], worked out in float32 at least."""
        x_XI, weight = torch.cat([hidden_XH, embedded_XR], -1), self.proj.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return F.linear(x_XI.to(wide), weight.to(wide), self.proj.bias.to(wide))[:, 0]


class DSparkDraft(DFlashDraft):
    config_type: ClassVar[type[DFlashConfig]] = DSparkConfig

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        self.markov_head = MARKOV_HEADS[config.markov_head_type](config)
        self.confidence_head = ConfidenceHead(config)


MARKOV_HEADS = {"vanilla": MarkovHead, "gated": GatedMarkovHead, "rnn": RecurrentMarkovHead}


def biased(width_in: int, width_out: int) -> nn.Linear:
    """A projection whose bias starts at 0."""
    layer = nn.Linear(width_in, width_out)
    nn.init.zeros_(layer.bias)
    return layer
