"""Small ranking models with sharp weights, and users with every kind of row."""

from collections.abc import Sequence

import numpy as np
import torch

from specforge.layers.slots import SlotConfig
from specforge.ranking.batch import RankingBatch, UserRows
from specforge.ranking.model import CTRModel
from specforge.ranking.shape import CTRConfig

SLOTS, ROWS = 5, 64
LENGTHS = {"ragged": (7, 0, 1, 40, 2, 19), "one": (23,), "single rows": (1, 1, 1), "nobody first": (0, 3, 0)}


def make_shape(**other: int) -> CTRConfig:
    return CTRConfig(
        **{"slots": SlotConfig(SLOTS, ROWS, 6, "modulo"), "width": 16, "layers": 2, "heads": 4, "inner": 24, "experts": 4, "top_k": 2}
        | other
    )


def make_model(seed: int = 0, gain: float = 2.0, **other: int) -> CTRModel:
    """In evaluation mode; matrices are `gain` times what a layer begins with, so that attention, gates and logits are far from even."""
    torch.manual_seed(seed)
    model = CTRModel(make_shape(**other)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "table" not in name:
                parameter.mul_(gain)
    return model


def make_user(length: int, seed: int, scored: float = 0.5) -> UserRows:
    """Bags of 0 to 3 signs of 64 bits, some of them twice, negative, 0 or far beyond the table."""
    rng = np.random.default_rng(seed)
    count_RS = rng.integers(0, 4, (length, SLOTS)).astype(np.int16)
    sign_V = rng.choice([0, 1, 1, ROWS - 1, ROWS, -1, 2**62, *rng.integers(-(2**63), 2**63 - 1, 40)], count_RS.sum())
    return UserRows(sign_V, count_RS, rng.random(length) < 0.4, rng.random(length) < scored)


def make_batch(lengths: Sequence[int], seed: int = 0, scored: float = 0.5) -> RankingBatch:
    users = [make_user(length, 100 * seed + number, scored) for number, length in enumerate(lengths)]
    return RankingBatch.pack(range(len(users)), users, [f"u{number}" for number in range(len(users))])
