"""RankingEvaluator: one pass over users, each on one rank and in one batch. What it gives depends neither on ranks nor on batches.

Shapes: P scored rows of this rank, U users.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from specforge.data.packing import pack
from specforge.distributed import World
from specforge.errors import DataError
from specforge.ranking.batch import RankingBatch
from specforge.ranking.metrics import ClickSums, auc_exact
from specforge.ranking.store import UserStore

_HISTORY_FROM = (0, 4, 16, 64)
HISTORY_SLICES = ("history_0_3", "history_4_15", "history_16_63", "history_64_up")
"""Scored rows by how many rows of their user came before."""


@dataclass(frozen=True)
class Predictions:
    """Scored rows of this rank."""

    logit_P: torch.Tensor
    """float64, on the host."""
    row_P: np.ndarray
    """Places of the rows in the store."""
    user_P: np.ndarray
    history_P: np.ndarray
    """Rows of the user before this one."""


class RankingEvaluator:
    """
    Args:
        micro_batch_tokens: rows in one forward, exceeded only by a user with more.

    Raises:
        DataError: the store has no scored row.
    """

    def __init__(self, store: UserStore, world: World, *, micro_batch_tokens: int) -> None:
        if not store.scored.any():
            raise DataError("no row is scored, so there is nothing to evaluate; raise max_rows, or set the fourth column of rows to 1.")
        self.store, self._world = store, world
        mine = range(world.rank, len(store), world.size)
        lengths = store.lengths[world.rank :: world.size].tolist()
        packed = pack(lengths, max([micro_batch_tokens, *lengths]), 1)[0]
        self.batches = [[mine[place] for place in places] for places in packed if places]
        """Users of each forward."""

    def batch(self, users: list[int]) -> RankingBatch:
        return RankingBatch.pack(users, [self.store.read(user) for user in users], [self.store.ids[user] for user in users])

    def predict(self, forward: Callable[[RankingBatch], torch.Tensor]) -> Predictions:
        """
        Args:
            forward: logits of a batch's scored rows, in their order.
        """
        logits, rows, users = [torch.empty(0, dtype=torch.float64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        on_device = list[torch.Tensor]()
        for numbers in self.batches:
            batch = self.batch(numbers)
            on_device.append(forward(batch.to(self._world.device)).detach())
            for user in numbers:
                place = self.store.rows_of(user)
                rows.append(np.flatnonzero(self.store.scored_N[place]) + place.start)
                users.append(np.full(len(rows[-1]), user))
        if on_device:
            logits.append(torch.cat(on_device).cpu().double())
        row_P, user_P = np.concatenate(rows), np.concatenate(users)
        first_U = np.array([self.store.rows_of(user).start for user in range(len(self.store))])
        return Predictions(torch.cat(logits), row_P, user_P, row_P - first_U[user_P])

    def evaluate(self, forward: Callable[[RankingBatch], torch.Tensor]) -> dict[str, Any]:
        """`eval/auc`, `eval/auc_exact`, `eval/gauc`, `eval/pcoc`, `eval/ece`, `eval/ne`, `eval/avg_loss` in nats, and per slice
        `eval/SLICE/auc` and so on; equal on all ranks. `forward` as in `predict`."""
        return self.numbers(self.predict(forward))

    def numbers(self, predictions: Predictions) -> dict[str, Any]:
        """What `evaluate` gives, of predictions that all ranks have made."""
        label_P = torch.from_numpy(self.store.label_N[predictions.row_P])
        sums = ClickSums(HISTORY_SLICES, len(self.store))
        slice_P = np.searchsorted(_HISTORY_FROM, predictions.history_P, side="right") - 1
        sums.add(predictions.logit_P, label_P, slice_P, predictions.user_P)
        numbers = {"users": len(self.store), **sums.numbers(self._world), "auc_exact": self._auc_exact(predictions)}
        return {f"eval/{name}": value for name, value in numbers.items()}

    def _auc_exact(self, predictions: Predictions) -> float:
        """Every rank adds the logits of its rows to zeros in the places of the others'."""
        scored = np.flatnonzero(self.store.scored_N)
        logits = torch.zeros(len(scored), dtype=torch.float64)
        logits[np.searchsorted(scored, predictions.row_P)] = predictions.logit_P
        return auc_exact(self._world.sum_(logits).numpy(), self.store.label_N[scored])
