"""Who takes part: rank, size and device of this process, and the few collectives that everything else is built from.

At size 1 there is no process group and every collective is the identity, so callers never branch on the world size.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from specforge.errors import ConfigError, SpecForgeError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")
    group: dist.ProcessGroup | None = None
    """The process group of the collectives; None: the one that `join` made."""

    @classmethod
    def join(cls, timeout_s: float = 1800.0) -> "World":
        """Join the group that torchrun describes in the environment; without one, a world of this process alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        if size > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
        return cls(int(os.environ.get("RANK", "0")), size, local_rank, local_size, device)

    def apart(self) -> "World":
        """The same ranks in a group of their own on the CPU, for a thread that works beside the training. All ranks call it together."""
        group = dist.new_group(backend="gloo") if self.size > 1 else None
        return replace(self, device=torch.device("cpu"), group=group)

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mesh(self, sharding: str) -> DeviceMesh:
        """The device mesh of `train.sharding`: 1-D to shard, (replicas, shards) for hybrid and plain replication."""
        if sharding == "shard":
            return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("shard",))
        shards = self.local_size if sharding == "hybrid" else 1
        if self.size % shards:
            raise ConfigError(
                f"train.sharding='hybrid': {self.size} ranks do not divide into nodes of {shards}; start equally many ranks on every node."
            )
        return init_device_mesh(self.device.type, (self.size // shards, shards), mesh_dim_names=("replicate", "shard"))

    def barrier(self) -> None:
        if self.size > 1:
            self.sum_(torch.zeros(1))

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Add `values` (any shape, CPU or this rank's device) over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's JSON-like value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def on_main(self, act: Callable[[], T]) -> T:
        """Rank 0's result of `act` on every rank; what it raises for the user, or the system refuses, is raised on every rank."""
        result: T | SpecForgeError | OSError | None = None
        if self.is_main:
            try:
                result = act()
            except (SpecForgeError, OSError) as error:
                result = error
        result = self.from_main(result)
        if isinstance(result, SpecForgeError | OSError):
            raise result
        return result

    def from_main(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]
