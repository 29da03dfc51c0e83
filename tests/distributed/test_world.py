"""Real processes join as a launcher would start them; they find out by themselves who shares a node."""

import dataclasses
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from specforge.distributed import World
from specforge.errors import ConfigError
from tests.ranks import run_ranks


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def joined(ranks: World, environment: Callable[[int], dict[str, str]], act: Callable[[World], Any]) -> Any:
    """`act` in a world that was joined from `environment(rank)` alone."""
    ranks.barrier()  # nobody leaves while another still connects
    ranks.leave()
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_"))]:
        del os.environ[name]
    os.environ.update(environment(ranks.rank))
    world = World.join(timeout_s=30.0)
    try:
        return act(world)
    finally:
        world.leave()


def numbers(world: World) -> tuple[int, ...]:
    return world.rank, world.size, world.local_rank, world.local_size


def srun(nodes: Sequence[int], port: int) -> Callable[[int], dict[str, str]]:
    """The variables of srun where task r runs on node `nodes[r]`; LOCAL_RANK is not among them."""
    return lambda rank: {
        "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(len(nodes)), "SLURM_NODEID": str(nodes[rank]),
        "SLURM_LOCALID": str(nodes[:rank].count(nodes[rank])), "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ((0, 0, 1, 1), [(0, 2), (1, 2), (0, 2), (1, 2)]),
        ((0, 1, 0, 1), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((0, 0, 0, 1), [(0, 3), (1, 3), (2, 3), (0, 1)]),
    ],
)
def test_ranks_find_their_node(nodes: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    found = run_ranks(joined, srun(nodes, free_port()), numbers, world=4)
    assert found == [(rank, 4, *place) for rank, place in enumerate(expected)]


def test_without_local_rank_the_host_decides() -> None:
    port = free_port()
    launched = run_ranks(
        joined, lambda rank: {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}, numbers
    )
    assert launched == [(0, 2, 0, 2), (1, 2, 1, 2)]


def mesh_shape(world: World) -> tuple[int, ...] | str:
    try:
        return tuple(world.mesh("hybrid").shape)
    except ConfigError as error:
        return str(error)


def test_a_hybrid_mesh_is_nodes_by_ranks() -> None:
    assert run_ranks(joined, srun((0, 0, 1, 1), free_port()), mesh_shape, world=4) == [(2, 2)] * 4


@pytest.mark.parametrize(("nodes", "sizes"), [((0, 0, 0, 1), r"\[1, 3\]"), ((0, 1, 0, 1), r"\[2\]")], ids=["uneven", "scattered"])
def test_a_hybrid_mesh_of_other_nodes_is_refused_by_every_rank(nodes: tuple[int, ...], sizes: str) -> None:
    for message in run_ranks(joined, srun(nodes, free_port()), mesh_shape, world=4):
        with pytest.raises(ConfigError, match=f"sharding='hybrid': the nodes of these 4 ranks hold {sizes}"):
            raise ConfigError(message)


def test_join_tells_other_libraries() -> None:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
    found = run_ranks(joined, srun((0, 0), free_port()), lambda world: tuple(os.environ[name] for name in names))
    assert found == [("0", "2", "localhost"), ("1", "2", "localhost")]


def sum_elsewhere(world: World) -> tuple[list[float], str]:
    """A tensor of another device than the world's, here float32 storage that is a view of a larger one."""
    values = torch.arange(6.0).reshape(2, 3)[:, 1] + world.rank
    total = world.sum_(values)
    return total.tolist(), "in place" if total is values else "another tensor"


def test_sum_is_in_place() -> None:
    assert run_ranks(sum_elsewhere) == [([3.0, 9.0], "in place")] * 2


@pytest.mark.gpu
def test_a_host_tensor_is_added_on_the_bound_device() -> None:
    """One process is a group of its own here, so that NCCL runs on a machine with a single device."""
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"tcp://localhost:{free_port()}", rank=0, world_size=1)
    world = dataclasses.replace(World.join(), size=2)
    values = torch.ones(3)
    assert world.device.type == "cuda"
    assert world.sum_(values) is values
    world.leave()
