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

from specforge.distributed.attempt import fresh_store
from specforge.distributed.launcher import read_place
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
        """Join the group that torchrun, srun or mpirun describes in the environment; without one, a world of this process alone.

        Which ranks share a node is asked of the ranks. A collective that waits longer than `timeout_s` fails.

        Raises:
            ConfigError: the environment is incomplete, or there are fewer devices than ranks on this node.
        """
        place = read_place(os.environ)
        on_cuda = torch.cuda.is_available()
        neighbours = [place.rank]
        if place.size > 1:
            os.environ.update(place.variables)
            if not dist.is_initialized():
                timeout = timedelta(seconds=timeout_s)
                store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
                fresh = fresh_store(store, rank, size, timeout)
                backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
                dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=timeout)
            nodes = [""] * place.size
            dist.all_gather_object(nodes, place.node)
            neighbours = [rank for rank, node in enumerate(nodes) if node == place.node]
        local_rank = neighbours.index(place.rank)
        device = _bind_device(local_rank) if on_cuda else torch.device("cpu")
        return cls(place.rank, place.size, local_rank, len(neighbours), device)

    def apart(self) -> "World":
        """The same ranks in a group of their own on the CPU, for a thread that works beside the training. All ranks call it together."""
        group = dist.new_group(backend="gloo") if self.size > 1 else None
        return replace(self, device=torch.device("cpu"), group=group)

    def leave(self) -> None:
        """End what `join` began, on every rank; a world of one has nothing to end."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def mesh(self, sharding: str) -> DeviceMesh:
        """The device mesh of `train.sharding`: 1-D to shard, (replicas, shards) for hybrid and plain replication."""
        if sharding == "shard":
            return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("shard",))
        shards = self._ranks_per_node() if sharding == "hybrid" else 1
        return init_device_mesh(self.device.type, (self.size // shards, shards), mesh_dim_names=("replicate", "shard"))

    def _ranks_per_node(self) -> int:
        """Raises ConfigError on every rank unless consecutive ranks fill equal nodes."""
        places = self.gather_objects((self.local_rank, self.local_size))
        if any(place != (rank % self.local_size, self.local_size) for rank, place in enumerate(places)):
            sizes = sorted({size for _, size in places})
            raise ConfigError(
                f"train.sharding='hybrid': the nodes of these {self.size} ranks hold {sizes} of them, or ranks of one node do not "
                "follow each other; start equally many on every node, node by node, or use train.sharding=shard."
            )
        return self.local_size

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.sum_(torch.zeros(1))

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Add `values` (any shape and device) over all ranks, in place; they travel on this rank's device."""
        if self.size > 1:
            travelling = values.to(self.device)
            dist.all_reduce(travelling, group=self.group)
            if travelling is not values:
                values.copy_(travelling)
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


def _bind_device(local_rank: int) -> torch.device:
    """This rank's CUDA device: the only one it sees, or that of its number on the node."""
    visible = torch.cuda.device_count()
    if local_rank >= visible > 1:
        raise ConfigError(
            f"local rank {local_rank}: only {visible} CUDA devices are visible; start at most {visible} processes on this node, "
            "or show each process one device of its own."
        )
    device = torch.device("cuda", local_rank if visible > 1 else 0)
    torch.cuda.set_device(device)
    torch.cuda.init()  # a device mesh would otherwise choose a device of its own
    return device
