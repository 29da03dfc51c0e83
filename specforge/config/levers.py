"""Levers: what changes how fast a model answers, and at most a little what it answers. Each is one key, and all are in each result.

A measurement without its levers cannot be repeated, so `digest` goes with it.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from specforge.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Levers:
    """The defaults are the fastest that were measured, on a CPU, and change no answer by more than rounding does."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of weights and computation in use; a training has `train.precision`."""
    keep_fp32_modules: tuple[str, ...] = ()
    """Patterns of module names, as in a shell, that stay float32 in a smaller `dtype`."""
    expert_merge: bool = False
    """Make experts with nearly the same weights one, and report it."""
    merge_threshold: float = 0.9
    """Cosine of two experts' weights over which `expert_merge` makes them one, in (0, 1]."""
    signid_mode: Literal["clamp", "modulo"] = "modulo"
    """Which row of the table a sign beyond it has. Must be that of the training."""
    sync_timing: bool = True
    """Measure until the device has finished; without it a measurement shows how soon the host is free, and is never scored."""
    filter_test_users: bool = True
    """Leave out users without a scored row before their rows are parsed: nobody else sees them."""
    attn: Literal["auto", "loop", "padded", "bucket", "sdpa", "flex", "varlen"] = "auto"
    """Attention within each user; `sdpa`, a mask over all pairs of rows, is the slow reference."""
    moe: Literal["auto", "loop", "sorted", "dense", "grouped", "capacity"] = "auto"
    """The mixture of experts; `loop` is the slow reference, `capacity` may lose picks, which it counts."""
    fuse_embedding: bool = True
    """One lookup for all slots; without it one a slot, which is the slow reference."""
    compile: bool = False
    """torch.compile of the parts that are alike for all batches."""

    def __post_init__(self) -> None:
        if not 0 < self.merge_threshold <= 1:
            raise ConfigError(
                f"levers.merge_threshold={self.merge_threshold}: must lie in (0, 1]; 1 merges nothing, the contest's model took 0.9."
            )

    @classmethod
    def reference(cls) -> "Levers":
        """The slow forms against which all others are held."""
        return cls(filter_test_users=False, attn="sdpa", moe="loop", fuse_embedding=False)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of all keys and values: equal levers have equal ones, in every process."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]
