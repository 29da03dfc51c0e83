"""Learning rate as a pure function of the step."""

import math

from specforge.config.schema import TrainConfig


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of optimiser step `step` (0-based): linear warm-up, then cosine or linear to zero, or constant.

    Warm-up reaches the full rate at step `warmup_steps - 1`; the decay would reach zero at step `total_steps`.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.learning_rate * decay[config.schedule]
