"""Calibration of a ranking model: one number, added to every logit, so that predicted clicks are as many as clicks.

A shift keeps the order of all rows, so AUC stays, and it is the head's bias, so it costs nothing in use. It is fitted on held-out users and
stored beside the weights; `load_ranking_model` adds it.

Shapes: P scored rows.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specforge import files
from specforge.distributed import World
from specforge.errors import CheckpointError, DataError
from specforge.eval.calibration import is_for_fit
from specforge.ranking.evaluate import Predictions
from specforge.ranking.metrics import ClickSums
from specforge.ranking.store import UserStore

FILE = "calibration.json"
FORMAT_VERSION = 1
_STEPS = 60
"""Halvings of an interval of 64 that leave less than 1e-16."""


def fit_shift(logit_P: torch.Tensor, label_P: torch.Tensor, world: World) -> float:
    """The shift b with sum sigmoid(logit + b) = sum of clicks over the rows of all ranks, equal on all of them.

    It is the maximum of the likelihood, too: the derivative by b is the difference of the two sums.

    Raises:
        DataError: all rows of all ranks were clicked, or none, for which no shift is large enough.
    """
    logit_P, label_P = logit_P.double(), label_P.double()
    clicks, rows = world.sum_(torch.stack([label_P.sum(), torch.full_like(label_P.sum(), len(label_P))])).tolist()
    if not 0 < clicks < rows:
        raise DataError(f"calibration: {clicks:g} of {rows:g} held-out rows were clicked; it needs both kinds, give more users.")
    low, high = -32.0, 32.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        predicted = world.sum_(torch.sigmoid(logit_P + middle).sum().reshape(1)).item()
        low, high = (middle, high) if predicted < clicks else (low, middle)
    return (low + high) / 2


def fit_and_measure(store: UserStore, predictions: Predictions, world: World) -> tuple[float, dict[str, Any]]:
    """The shift fitted on one half of the held-out users, and on the other half `eval/calibration/raw/pcoc` and so on without it,
    `eval/calibration/shifted/pcoc` and so on with it; equal on all ranks."""
    for_fit_U = np.array([is_for_fit(name) for name in store.ids])
    label_P, fits_P = store.label_N[predictions.row_P], for_fit_U[predictions.user_P]
    shift = fit_shift(predictions.logit_P[fits_P], torch.from_numpy(label_P[fits_P]), world)
    numbers: dict[str, Any] = {"eval/calibration/shift": shift}
    user_P, measured_P = predictions.user_P[~fits_P], torch.from_numpy(label_P[~fits_P])
    for version, added in (("raw", 0.0), ("shifted", shift)):
        sums = ClickSums(("all",), len(store))
        sums.add(predictions.logit_P[~fits_P] + added, measured_P, np.zeros(len(user_P), dtype=np.int64), user_P)
        found = sums.numbers(world)
        numbers |= {f"eval/calibration/{version}/{name}": found[name] for name in ("gauc", "pcoc", "ece", "ne", "scored_rows")}
    return shift, numbers


def write_shift(folder: Path, shift: float) -> None:
    """Store the calibration beside the weights."""
    files.write_json(folder / FILE, {"format_version": FORMAT_VERSION, "shift": shift})


def read_shift(folder: Path) -> float:
    """What is added to the head's bias; 0 where the folder holds no calibration.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return 0.0
    stored = files.read_object(path, CheckpointError, format_version=int, shift=float)
    if stored["format_version"] != FORMAT_VERSION or not math.isfinite(stored["shift"]):
        raise CheckpointError(f"{path}: must hold format_version {FORMAT_VERSION} and a finite shift; calibrate the checkpoint again.")
    return float(stored["shift"])
