"""Slots of a token: each holds a bag of signs (hashes of 64 bits), which is the sum of the signs' rows in one table for all slots.

Row 0 is padding: it is zero, and learns nothing. Which row a sign has is a policy that must be the same in training and in use.
Bags lie token by token, and slot by slot within a token, so that one `embedding_bag` leaves the very matrix that a layer reads.

Shapes: N tokens with S slots, B = N * S bags, V signs in all bags, R rows of width d.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from specforge.errors import ConfigError, DataError
from specforge.layers.rows import to_device

POLICIES = ("clamp", "modulo")
IMPLEMENTATIONS = ("fused", "per_slot")


@dataclass(frozen=True)
class SlotConfig:
    """What a checkpoint stores of its slots.

    Raises:
        ConfigError: there is no such policy.
    """

    slots: int
    rows: int
    width: int
    signid_mode: str
    """`clamp`: signs beyond the table share its last row, negative ones are padding. `modulo`: the remainder, never negative."""

    def __post_init__(self) -> None:
        if self.signid_mode not in POLICIES:
            raise ConfigError(f"signid_mode={self.signid_mode!r}: there is no such policy; choose one of {', '.join(POLICIES)}.")

    def stored(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def refuse_other(self, stored: Mapping[str, Any]) -> None:
        """
        Raises:
            ConfigError: the checkpoint's slots are other ones.
        """
        for key, value in self.stored().items():
            if key not in stored or stored[key] != value:
                raise ConfigError(
                    f"{key}={value!r}: the checkpoint was trained with {stored.get(key)!r}, whose signs mean other rows; "
                    f"set {key}={stored.get(key)!r}."
                )


@dataclass(frozen=True)
class SlotBags:
    """The signs of N tokens and where each bag begins, laid out once on the host by whoever collates."""

    sign_V: torch.Tensor
    begin_B: torch.Tensor
    """First sign of each bag, and V at the end: int64 [N * S + 1]."""
    slots: int

    @classmethod
    def of(cls, sign_V: np.ndarray, count_NS: np.ndarray) -> Self:
        """
        Args:
            sign_V: int64; the bags of the first token, slot by slot, then those of the next. A sign from 2^63 on is negative.
            count_NS: signs of each bag.

        Raises:
            DataError: the counts are not those of the signs.
        """
        if count_NS.sum() != len(sign_V):
            raise DataError(f"count_NS: adds up to {count_NS.sum()}, but there are {len(sign_V)} signs; count each bag of the row.")
        begin_B = np.concatenate([[0], np.cumsum(count_NS, dtype=np.int64)]).astype(np.int64)
        return cls(torch.from_numpy(sign_V), torch.from_numpy(begin_B), count_NS.shape[1])

    def to(self, device: torch.device) -> Self:
        sign_V, begin_B = (to_device(each.numpy(), device) for each in (self.sign_V, self.begin_B))
        return type(self)(sign_V, begin_B, self.slots)

    @cached_property
    def by_slot(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The signs of each slot, and where its bags begin: what the plain form reads."""
        count_NS = self.begin_B.diff().unflatten(0, (-1, self.slots))
        slot_V = torch.arange(self.slots, device=self.sign_V.device).expand_as(count_NS).flatten().repeat_interleave(count_NS.flatten())
        return [(self.sign_V[slot_V == slot], F.pad(count_NS[:, slot].cumsum(0), (1, 0))) for slot in range(self.slots)]


class SlotEmbedding(nn.Module):
    """
    Raises:
        ConfigError: there is no such implementation.
    """

    def __init__(self, config: SlotConfig, implementation: str = "fused") -> None:
        super().__init__()
        if implementation not in IMPLEMENTATIONS:
            raise ConfigError(f"slots={implementation!r}: there is no such implementation; choose one of {', '.join(IMPLEMENTATIONS)}.")
        self.config, self.implementation = config, implementation
        self.table = nn.Parameter(torch.empty(config.rows, config.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            nn.init.normal_(self.table, std=self.config.width**-0.5)[0].zero_()

    def forward(self, bags: SlotBags) -> torch.Tensor:
        """[N, S * d]: the bags of a token side by side."""
        if self.implementation == "per_slot":
            return torch.cat([self._bags(sign_V, begin_N) for sign_V, begin_N in bags.by_slot], 1)
        read = self.table, self.row(bags.sign_V), bags.begin_B
        bag_Bd: torch.Tensor = _Bags.apply(*read) if torch.is_grad_enabled() else _summed(*read)[0]
        return bag_Bd.view(-1, bags.slots * self.config.width)

    def row(self, sign_V: torch.Tensor) -> torch.Tensor:
        """The table's row of each sign."""
        return sign_V.clamp(0, self.config.rows - 1) if self.config.signid_mode == "clamp" else sign_V.remainder(self.config.rows)

    def _bags(self, sign_V: torch.Tensor, begin_N: torch.Tensor) -> torch.Tensor:
        row_Vd = F.embedding(self.row(sign_V), self.table, padding_idx=0)
        return torch.segment_reduce(row_Vd, "sum", offsets=begin_N, initial=0)


def _summed(table: torch.Tensor, row_V: torch.Tensor, begin_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The bags, and what their backward reads. Without `detach` torch leaves a CPU's fast kernel, to prepare what the backward can make."""
    return torch.embedding_bag(table.detach(), row_V, begin_B, False, 0, False, None, True)


class _Bags(torch.autograd.Function):
    """`embedding_bag` that reads the padding row like any other, as `embedding` does, and gives it no gradient.

    With a padding index in the forward a CPU leaves its fast kernel: 9 times the time at 7168 bags.
    """

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, row_V: torch.Tensor, begin_B: torch.Tensor) -> torch.Tensor:
        bag_Bd, *of_bags = _summed(table, row_V, begin_B)
        ctx.save_for_backward(row_V, begin_B, *of_bags)
        ctx.rows = len(table)
        return bag_Bd

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_Bd,), (row_V, begin_B, *of_bags) = grads, ctx.saved_tensors
        # A running sum in bfloat16 stands still at 256 of its terms, and a popular sign is in more bags.
        wide_Bd = grad_Bd.to(torch.promote_types(grad_Bd.dtype, torch.float32))
        grad_Rd = torch.ops.aten._embedding_bag_backward(wide_Bd, row_V, begin_B, *of_bags, ctx.rows, False, 0, False, None, 0)
        return grad_Rd.to(grad_Bd.dtype), None, None
