"""Events with a probability and an outcome, in sums: how well they are ranked (AUC), and how far their probabilities can be trusted.

Everything is formed from sums in 4,096 bins, equally wide in logit(p), so neither batches, ranks nor their order matter.
ECE = sum_b |sum_b p - sum_b right| / n over 15 groups of neighbouring bins with about equally many events.

Shapes: X events, B bins, G groups.
"""

import torch

BINS = 4096
ECE_GROUPS = 15
_LIMIT = 32.0
"""Largest |logit| with a bin of its own."""


def histogram(probability_X: torch.Tensor, right_X: torch.Tensor) -> torch.Tensor:
    """Sums [B, 4] of events in bins of logit(p): how many, how many right, probabilities, squared errors. float64."""
    right_X = right_X.double()
    logit_X = torch.logit(probability_X, eps=1e-15)
    bin_X = ((logit_X + _LIMIT) * (BINS / (2 * _LIMIT))).long().clamp(0, BINS - 1)
    rows_X4 = torch.stack([torch.ones_like(right_X), right_X, probability_X, (probability_X - right_X) ** 2], 1)
    return rows_X4.new_zeros(BINS, 4).index_add_(0, bin_X, rows_X4)


def logit_of_bins() -> torch.Tensor:
    """The middle of each bin, [B]."""
    return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 * _LIMIT / BINS) - _LIMIT


def auc(sums_B4: torch.Tensor) -> torch.Tensor:
    """P(a right event is more probable than a wrong one), ties counted half; NaN unless both kinds exist. [..., B, 4] -> [...]."""
    right, wrong = sums_B4[..., 1], sums_B4[..., 0] - sums_B4[..., 1]
    below = wrong.cumsum(-1) - wrong / 2
    return (right * below).sum(-1) / (right.sum(-1) * wrong.sum(-1))


def pcoc(sums_B4: torch.Tensor) -> torch.Tensor:
    """Predicted over observed: sum of probabilities / number right."""
    return sums_B4[..., 2].sum(-1) / sums_B4[..., 1].sum(-1)


def expected_calibration_error(sums_B4: torch.Tensor) -> torch.Tensor:
    groups_G3 = reliability(sums_B4)
    return (groups_G3[..., 2] - groups_G3[..., 1]).abs().sum(-1) / sums_B4[..., 0].sum(-1)


def reliability(sums_B4: torch.Tensor) -> torch.Tensor:
    """Of each of the groups of the ECE: events, right ones, sum of probabilities. [..., B, 4] -> [..., G, 3]."""
    count = sums_B4[..., 0]
    middle = count.cumsum(-1) - count / 2
    group = (middle * ECE_GROUPS / count.sum(-1).clamp_min(1)[..., None]).long().clamp_max(ECE_GROUPS - 1)
    zeros = sums_B4.new_zeros(*count.shape[:-1], ECE_GROUPS, 3)
    return zeros.scatter_add(-2, group[..., None].expand(*group.shape, 3), sums_B4[..., :3])


def brier(sums_B4: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the probability."""
    return sums_B4[..., 3].sum(-1) / sums_B4[..., 0].sum(-1)
