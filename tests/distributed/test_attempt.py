"""Workers that are started again on the store of their predecessors, as torchrun does it."""

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from specforge.distributed import World
from specforge.distributed.attempt import fresh_store
from tests.distributed.test_world import joined
from tests.ranks import run_ranks


def torchrun(port: int, attempt: int, size: int = 2) -> Any:
    return lambda rank: {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }  # fmt: skip


def total(world: World) -> float:
    return float(world.sum_(torch.tensor(world.rank + 1.0)))


def test_a_second_start_finds_its_own_peers() -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in range(2):
        assert run_ranks(joined, torchrun(agent.port, attempt), total, world=2, timeout_s=20.0) == [3.0, 3.0]


def hello_and_die(port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    fresh_store(store, 1, 3, timedelta(seconds=30))


def test_those_who_died_while_they_joined_are_not_waited_for() -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dead = multiprocessing.get_context("fork").Process(target=hello_and_die, args=(agent.port,))
    dead.start()
    while not agent.check(["hello/1"]):
        time.sleep(0.01)
    os.kill(dead.pid or 0, signal.SIGKILL)
    dead.join()
    assert run_ranks(joined, torchrun(agent.port, 1, size=3), total, world=3, timeout_s=20.0) == [6.0] * 3


def test_a_rank_that_does_not_come_is_named() -> None:
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not join within 0 s"):
        fresh_store(store, 0, 3, timedelta(seconds=0))
