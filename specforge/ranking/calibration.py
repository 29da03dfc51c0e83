"""Calibration of a ranking model: one number, added to every logit, so that predicted clicks are as many as clicks.

A shift keeps the order of all rows, so AUC stays, and it is the head's bias, so it costs nothing in use. It is fitted on held-out users and
stored beside the weights; `load_ranking_model` adds it.

Shapes: P scored rows.
"""

import math
from pathlib import Path

import torch

from specforge import files
from specforge.distributed import World
from specforge.errors import CheckpointError, DataError

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
