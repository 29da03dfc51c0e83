"""How well clicks are predicted: order (AUC, GAUC) and bias (PCOC, ECE, NE).

AUC = P(a click is scored above no click) + P(equal) / 2. GAUC is the mean AUC of the users who have both, weighted by their scored rows:
order within a user only. PCOC = predicted clicks / clicks. NE = log loss / entropy of the click rate (He et al. 2014, section 3): below 1
the prediction is worth more than the rate alone.

Shapes: P scored rows, G groups (users), L slices, B bins.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from specforge.distributed import World
from specforge.errors import DataError
from specforge.eval.binary import BINS, auc, expected_calibration_error, histogram, pcoc


def group_auc(group_P: np.ndarray, score_P: np.ndarray, label_P: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact AUC of each group, NaN where it lacks clicks or non-clicks, and its number of rows: float64 [G], int64 [G].

    By mid-ranks: U = (sum of the ranks of the clicks) - c (c + 1) / 2, over c clicks and all non-clicks.
    """
    order_P = np.lexsort((score_P, group_P))
    group_P, score_P, label_P = group_P[order_P], score_P[order_P], label_P[order_P].astype(bool)
    rows_G = np.bincount(group_P, minlength=groups)
    clicks_G = np.bincount(group_P, label_P, minlength=groups)
    starts_run_P = np.diff(score_P, prepend=np.nan) != 0
    starts_run_P |= np.diff(group_P, prepend=-1) != 0
    first_T = np.flatnonzero(starts_run_P)
    ties_T = np.diff(first_T, append=len(order_P))
    rank_P = np.repeat(first_T + (ties_T + 1) / 2, ties_T) - (np.cumsum(rows_G) - rows_G)[group_P]
    above_G = np.bincount(group_P, rank_P * label_P, minlength=groups) - clicks_G * (clicks_G + 1) / 2
    pairs_G = clicks_G * (rows_G - clicks_G)
    return np.divide(above_G, pairs_G, out=np.full(groups, np.nan), where=pairs_G > 0), rows_G


def auc_exact(score_P: np.ndarray, label_P: np.ndarray) -> float:
    """NaN without clicks or without non-clicks."""
    return float(group_auc(np.zeros(len(score_P), dtype=np.int64), score_P, label_P, 1)[0][0])


def bayes_auc(probability_P: np.ndarray) -> float:
    """The AUC to be expected of the true probabilities when labels are drawn with them: over all pairs i != j,
    sum p_i (1 - p_j) ([p_i > p_j] + [p_i = p_j] / 2) / sum p_i (1 - p_j)."""
    value_T, count_T = np.unique(probability_P.astype(np.float64), return_counts=True)
    click_T, none_T = count_T * value_T, count_T * (1 - value_T)
    own = (count_T * value_T * (1 - value_T)).sum()
    above = (click_T * (np.cumsum(none_T) - none_T / 2)).sum() - own / 2
    return float(above / (click_T.sum() * none_T.sum() - own))


class ClickSums:
    """Sums of scored rows, which add up over batches and ranks.

    Args:
        slices: names of the parts that rows fall into, each measured by itself too.
        groups: G. The rows of a group must be added at once, on one rank.
    """

    def __init__(self, slices: Sequence[str], groups: int) -> None:
        self._slices = slices
        self._bins_LB4 = torch.zeros(len(slices), BINS, 4, dtype=torch.float64)
        self._nats_L = torch.zeros(len(slices), dtype=torch.float64)
        self._gauc_2 = torch.zeros(2, dtype=torch.float64)
        self._parts_G = torch.zeros(groups, dtype=torch.float64)

    def add(self, logit_P: torch.Tensor, label_P: torch.Tensor, slice_P: np.ndarray, group_P: np.ndarray) -> None:
        """Logits of a click, and whether there was one."""
        logit_P, label_P = logit_P.double(), label_P.double()
        nats_P = F.binary_cross_entropy_with_logits(logit_P, label_P, reduction="none")
        self._nats_L.index_add_(0, torch.from_numpy(slice_P), nats_P)
        for number in range(len(self._slices)):
            inside_P = torch.from_numpy(slice_P == number)
            self._bins_LB4[number] += histogram(logit_P[inside_P].sigmoid(), label_P[inside_P])
        known, group_P = np.unique(group_P, return_inverse=True)
        auc_G, rows_G = group_auc(group_P, logit_P.numpy(), label_P.numpy(), len(known))
        both_G = ~np.isnan(auc_G)
        self._gauc_2 += torch.tensor([(auc_G * rows_G)[both_G].sum(), rows_G[both_G].sum()], dtype=torch.float64)
        self._parts_G[known] += 1

    def numbers(self, world: World) -> dict[str, Any]:
        """`auc`, `gauc`, `pcoc`, `ece`, `ne`, `avg_loss`, `ctr`, `scored_rows` of all ranks, and `SLICE/auc` and so on of the slices that
        have rows; equal on all ranks, one reduction. A ratio over nothing is NaN.

        Raises:
            DataError: a group was added in parts.
        """
        sums = torch.cat([self._bins_LB4.flatten(), self._nats_L, self._gauc_2, self._parts_G])
        flat, nats_L, gauc_2, parts_G = world.sum_(sums).split([self._bins_LB4.numel(), len(self._slices), 2, len(self._parts_G)])
        if (parts_G > 1).any():
            split = int(parts_G.argmax())
            raise DataError(
                f"user {split}: its rows came in {int(parts_G[split])} parts, of which none knows the order of the whole; "
                "give all scored rows of a user to one rank at once."
            )
        bins_LB4 = flat.view_as(self._bins_LB4)
        numbers = _measured(bins_LB4.sum(0), float(nats_L.sum()))
        numbers["gauc"] = float(gauc_2[0] / gauc_2[1])
        for name, bins_B4, nats in zip(self._slices, bins_LB4, nats_L.tolist(), strict=True):
            if bins_B4[:, 0].any():
                numbers |= {f"{name}/{key}": value for key, value in _measured(bins_B4, nats).items()}
        return numbers


def _measured(bins_B4: torch.Tensor, nats: float) -> dict[str, Any]:
    rows, clicks = bins_B4[:, :2].sum(0).tolist()
    ctr = clicks / rows
    entropy = -ctr * math.log(ctr) - (1 - ctr) * math.log(1 - ctr) if 0 < ctr < 1 else math.nan
    return {
        "auc": float(auc(bins_B4)), "pcoc": float(pcoc(bins_B4)), "ece": float(expected_calibration_error(bins_B4)),
        "ne": nats / rows / entropy, "avg_loss": nats / rows, "ctr": ctr, "scored_rows": int(rows),
    }  # fmt: skip
