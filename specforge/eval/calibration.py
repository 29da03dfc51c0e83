"""How far a draft's confidence can be trusted: ranking (AUC), bias (PCOC), calibration (ECE), error (Brier); and its scaling.

A drafted token is an event (probability, right). At position k of the chain the *conditional* events are the drafts k whose
prefix 1..k-1 is right, with probability c_k. The *survival* events are all drafts (start s, position k), with probability
a_k = c_1 ... c_k and label "prefix 1..k right". Sum a_k over sum of labels is then (mean accepted length predicted) / (mean
accepted length measured): PCOC is the bias of the number that a scheduler of draft lengths works with.

Everything is formed from the sums of `eval.binary`, so neither batches, ranks nor their order matter.

Shapes: X starts, K positions, B bins, G temperatures tried at once.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from specforge.distributed import World
from specforge.eval.acceptance import answers, compare
from specforge.eval.binary import auc, brier, expected_calibration_error, histogram, logit_of_bins, pcoc, reliability
from specforge.models.calibration import EPSILON, Calibration

_SMALLEST_SCALE = 1e-2
_LARGEST_TEMPERATURE = 16.0


def is_for_fit(sample_id: str) -> bool:
    """Whether scalings are fitted on this sample, or measured: one half each."""
    return hashlib.sha256(f"calibration {sample_id}".encode()).digest()[0] % 2 == 0


@dataclass(frozen=True)
class Chains:
    """Drafted chains, one row a start."""

    probability_XK: torch.Tensor
    """Confidence of each draft, float64."""
    right_XK: torch.Tensor
    """Whether it is the target's arg-max; nowhere true beyond `exists_XK`."""
    exists_XK: torch.Tensor
    """Whether there is such a draft: true for the first columns of a row, then false."""

    @classmethod
    def of(cls, loss_mask_S: np.ndarray, argmax_S: np.ndarray, proposals_SK: np.ndarray, confidences_SK: torch.Tensor) -> Self:
        """The chains of one sample; see `acceptance.count_sample`. A chain ends where nothing was proposed."""
        rows = []
        for first, last in answers(loss_mask_S):
            exists_SK, right_SK = compare(proposals_SK, np.roll(argmax_S, 1), first, last)
            exists_SK = np.logical_and.accumulate(exists_SK & (proposals_SK[first:last] >= 0), axis=1)
            rows.append(cls(confidences_SK[first:last].double(), torch.from_numpy(right_SK & exists_SK), torch.from_numpy(exists_SK)))
        return cls.join(rows, proposals_SK.shape[1])

    @classmethod
    def join(cls, parts: Sequence["Chains"], positions: int) -> Self:
        """One table of several; of none, an empty one."""
        empty = torch.empty(0, positions)
        return cls(
            torch.cat([empty.double(), *(part.probability_XK for part in parts)]),
            torch.cat([empty.bool(), *(part.right_XK for part in parts)]),
            torch.cat([empty.bool(), *(part.exists_XK for part in parts)]),
        )

    def scaled(self, calibration: Calibration) -> "Chains":
        return replace(self, probability_XK=calibration.apply(self.probability_XK))

    @property
    def survived_XK(self) -> torch.Tensor:
        """Whether drafts 1..k are all right."""
        return self.right_XK.long().cumprod(1).bool()

    def sums(self) -> torch.Tensor:
        """Additive statistics [K + 1, B, 4]: the conditional events of each position, then the survival events."""
        survived_XK = self.survived_XK
        reached_XK = self.exists_XK.clone()
        reached_XK[:, 1:] &= survived_XK[:, :-1]
        columns = zip(self.probability_XK.T, self.right_XK.T, reached_XK.T, strict=True)
        conditional = [histogram(probability_X[reached_X], right_X[reached_X]) for probability_X, right_X, reached_X in columns]
        survival_XK = self.probability_XK.cumprod(1)
        return torch.stack([*conditional, histogram(survival_XK[self.exists_XK], survived_XK[self.exists_XK])])


def measure(versions: Mapping[str, Chains], world: World) -> dict[str, Any]:
    """`VERSION/auc` and so on of the survival, `VERSION/per_position_auc` of each conditional; equal on all ranks, one reduction."""
    sums = world.sum_(torch.stack([chains.sums() for chains in versions.values()]))
    numbers: dict[str, Any] = {}
    for name, value_XK in (("auc", auc(sums)), ("pcoc", pcoc(sums)), ("ece", expected_calibration_error(sums)), ("brier", brier(sums))):
        for version, values in zip(versions, value_XK.tolist(), strict=True):
            numbers |= {f"{version}/{name}": values[-1], f"{version}/per_position_{name}": values[:-1]}
    return numbers


def groups(versions: Mapping[str, Chains], world: World) -> dict[str, list[list[list[float]]]]:
    """What a reliability diagram shows of each version: `[K + 1][groups][events, right ones, sum of probabilities]`, the survival last."""
    sums = world.sum_(torch.stack([chains.sums() for chains in versions.values()]))
    return dict(zip(versions, reliability(sums).tolist(), strict=True))


def fit(chains: Chains, world: World) -> dict[str, Calibration]:
    """Both scalings, from the starts of all ranks; equal on all of them."""
    return {"platt": fit_platt(chains, world), "temperature": fit_temperatures(chains, world)}


def fit_platt(chains: Chains, world: World) -> Calibration:
    """A scale and a bias a position, by the likelihood of the conditional events; positions without events keep (1, 0)."""
    fitted = [_logistic(*counts_B4.unbind(1)[:2]) for counts_B4 in world.sum_(chains.sums())[:-1]]
    return Calibration(tuple(scale for scale, _ in fitted), tuple(bias for _, bias in fitted))


def _logistic(count_B: torch.Tensor, right_B: torch.Tensor) -> tuple[float, float]:
    """Scale and bias of the likeliest right ~ sigmoid(scale * logit + bias), pulled to (1, 0) by the weight of one event."""
    limit = math.log((1 - EPSILON) / EPSILON)
    logit_B = logit_of_bins().clamp(-limit, limit)
    design_B2 = torch.stack([logit_B, torch.ones_like(logit_B)], 1)
    start_2 = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def cost(weight_2: torch.Tensor) -> torch.Tensor:
        margin_B = design_B2 @ weight_2
        nats = count_B * torch.nn.functional.softplus(margin_B) - right_B * margin_B
        return nats.sum() + (weight_2 - start_2).square().sum() / 2

    def descend(weight_2: torch.Tensor, free: slice) -> torch.Tensor:
        """Newton's method in the coordinates `free`, each step halved until it helps."""
        for _ in range(100):
            chance_B = torch.sigmoid(design_B2 @ weight_2)
            slope_2 = design_B2.T @ (count_B * chance_B - right_B) + weight_2 - start_2
            curve_22 = design_B2.T @ (design_B2 * (count_B * chance_B * (1 - chance_B))[:, None]) + torch.eye(2, dtype=torch.float64)
            step_2 = torch.zeros_like(weight_2)
            step_2[free] = torch.linalg.solve(curve_22[free, free], slope_2[free])
            while step_2.abs().max() > 1e-9 and cost(weight_2 - step_2) > cost(weight_2):
                step_2 /= 2
            weight_2 = weight_2 - step_2
            if step_2.abs().max() <= 1e-9:
                break
        return weight_2

    weight_2 = descend(start_2, slice(0, 2))
    if weight_2[0] < _SMALLEST_SCALE:  # the cost is convex, so its minimum under the bound lies on the bound
        weight_2 = descend(torch.tensor([_SMALLEST_SCALE, 0.0], dtype=torch.float64), slice(1, 2))
    scale, bias = weight_2.tolist()
    return scale, bias


def fit_temperatures(chains: Chains, world: World) -> Calibration:
    """Sequential temperature scaling (DSpark, arXiv 2607.05147): left to right, the temperature of position k is the one with the
    smallest ECE of the survival a_k, earlier ones frozen. Two grids, the second between the neighbours of the first one's best."""
    coarse_G = torch.linspace(-1, 1, 33, dtype=torch.float64) * math.log(_LARGEST_TEMPERATURE)
    fine_G = torch.linspace(-1, 1, 17, dtype=torch.float64) * (coarse_G[1] - coarse_G[0])
    before_X, scales = chains.probability_XK.new_ones(len(chains.probability_XK)), list[float]()
    columns = zip(torch.logit(chains.probability_XK, EPSILON).T, chains.survived_XK.T, chains.exists_XK.T, strict=True)
    for logit_X, survived_X, exists_X in columns:
        events = before_X[exists_X], logit_X[exists_X], survived_X[exists_X]
        log_temperature = _best(_best(0.0, coarse_G, *events, world), fine_G, *events, world)
        scales.append(math.exp(-log_temperature))
        before_X = before_X * torch.sigmoid(logit_X * scales[-1])
    return Calibration(tuple(scales), (0.0,) * len(scales))


def _best(centre: float, grid_G: torch.Tensor, before_X: torch.Tensor, logit_X: torch.Tensor, right_X: torch.Tensor, world: World) -> float:
    """The log temperature around `centre` with the smallest ECE; of equals, as where there are no events, the one nearest to 0."""
    grid = sorted((centre + grid_G).tolist(), key=abs)
    sums_GB4 = torch.stack([histogram(before_X * torch.sigmoid(logit_X * math.exp(-log)), right_X) for log in grid])
    return grid[int(expected_calibration_error(world.sum_(sums_GB4)).nan_to_num(0.0).argmin())]
