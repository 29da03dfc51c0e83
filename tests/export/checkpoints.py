"""Real checkpoints of tiny drafts with sharp random weights, so that no norm is 1 and no correction 0."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from specforge.config.schema import TrainConfig
from specforge.distributed import World
from specforge.features.store import LocalFeatureStore
from specforge.training.backend import FSDPTrainingBackend
from specforge.training.checkpoint import CheckpointManager
from specforge.training.state import TrainState
from tests.methods.test_contract import make

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


def sharpen(method: Any, spread: float = 0.3) -> Any:
    torch.manual_seed(7)
    for parameter in method.draft.parameters():
        parameter.data.add_(torch.randn_like(parameter) * spread)
    return method


def save(world: World, name: str, target_path: Path, folder: Path, run: Path, options: dict[str, Any]) -> None:
    """A checkpoint `r-step0` of a draft that was sharpened and not trained, written by all ranks of `world`."""
    save_method(world, name, sharpen(make(name, target_path, LocalFeatureStore(folder), **options)), target_path, run)


def save_method(world: World, name: str, method: Any, target_path: Path, run: Path) -> None:
    config, stored = method.config_dict(), asdict(method.options)
    backend = FSDPTrainingBackend(method, TrainConfig(), world)
    manager = CheckpointManager(run, world, keep=0)
    settings = {"method": {"name": name, "options": stored}, "model": {"target_path": str(target_path)}, "target_fingerprint": None}
    manager.save(TrainState("r"), backend, config, settings)
    manager.wait()
