"""Training: the loop, the layout over ranks, and what survives a crash."""

from specforge.training.backend import FSDPTrainingBackend
from specforge.training.checkpoint import CheckpointManager
from specforge.training.controller import TrainerController

__all__ = ["CheckpointManager", "FSDPTrainingBackend", "TrainerController"]
