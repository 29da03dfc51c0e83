"""The embedded target: the one real model that every installation has."""

from pathlib import Path

import torch

import specforge
from specforge.features.target import Target

FOLDER = Path(specforge.__file__).parent / "demo" / "target"


def load_embedded(device: torch.device) -> Target:
    return Target.load(FOLDER, "float32", device)
