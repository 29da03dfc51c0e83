"""What a ranking model is given: the rows of some users, packed end to end.

Shapes: N rows, S slots, V signs, P scored rows; R rows of one user.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from specforge.layers.documents import Documents
from specforge.layers.slots import SlotBags


@dataclass(frozen=True)
class RowMeta:
    """What rows are: two stores of equal meta fit one model."""

    slots: int
    """S: slots are numbered 1 to S in a file, 0 to S - 1 in a bag."""


@dataclass(frozen=True)
class UserRows:
    """The rows of one user in the order of time; R may be 0."""

    sign_V: np.ndarray
    """int64: the signs of the first row, slot by slot, then those of the next. A sign from 2^63 on is negative."""
    count_RS: np.ndarray
    """Signs of each bag, int16."""
    label_R: np.ndarray
    """bool: clicked."""
    scored_R: np.ndarray
    """bool: counts in the loss of a training, or is predicted in an evaluation. The other rows are history only."""

    def __len__(self) -> int:
        return len(self.label_R)


@dataclass(frozen=True)
class RankingBatch:
    """N rows of one or more users; no user sees another.

    Shapes: label_N float32, 0 or 1; scored_N bool; scored_rows int64 [P], the same rows by index, known to the host before any device.
    """

    samples: tuple[int, ...]
    """Numbers of the users in their store, in the order of the documents."""
    ids: tuple[str, ...]
    """Their ids, for messages."""
    documents: Documents
    bags: SlotBags
    label_N: torch.Tensor
    scored_N: torch.Tensor
    scored_rows: torch.Tensor

    @classmethod
    def pack(cls, samples: Sequence[int], users: Sequence[UserRows], ids: Sequence[str] = ()) -> Self:
        """
        Args:
            users: at least one, of which each may be empty.
        """
        scored_N = np.concatenate([user.scored_R for user in users])
        return cls(
            tuple(samples),
            tuple(ids),
            Documents(tuple(len(user) for user in users)),
            SlotBags.of(np.concatenate([user.sign_V for user in users]), np.concatenate([user.count_RS for user in users])),
            torch.from_numpy(np.concatenate([user.label_R for user in users]).astype(np.float32)),
            torch.from_numpy(scored_N),
            torch.from_numpy(np.flatnonzero(scored_N)),
        )

    @classmethod
    def empty(cls, meta: RowMeta) -> Self:
        """A batch that weighs nothing: one row without signs, not scored. It keeps a rank without users in step."""
        nothing = np.zeros(1, dtype=bool)
        return cls.pack([], [UserRows(np.zeros(0, dtype=np.int64), np.zeros((1, meta.slots), dtype=np.int16), nothing, nothing)])

    @property
    def num_scored(self) -> int:
        """P."""
        return len(self.scored_rows)

    def to(self, device: torch.device) -> Self:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """In page-locked memory, from which a GPU copies while the host goes on."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], Any]) -> Self:
        bags = replace(self.bags, sign_V=change(self.bags.sign_V), begin_B=change(self.bags.begin_B))
        return replace(self, bags=bags, **{name: change(getattr(self, name)) for name in ("label_N", "scored_N", "scored_rows")})
