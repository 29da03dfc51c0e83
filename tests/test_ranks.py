"""The harness itself: what it returns, and that no failure passes unseen."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from specforge.distributed.world import World
from tests.ranks import Collectives, RankError, raise_first_error, run_ranks, start_ranks, wait_for_ranks


@pytest.mark.parametrize("size", [1, 2, 4])
def test_values_come_back_in_rank_order(size: int) -> None:
    def rank_and_size(world: World, offset: int) -> tuple[int, int, bool]:
        time.sleep(0.05 * (world.size - world.rank))  # the last rank is the first to finish
        return world.rank + offset, world.size, dist.is_initialized()

    assert run_ranks(rank_and_size, 10, world=size) == [(10 + rank, size, size > 1) for rank in range(size)]


def test_ranks_add_up_and_return_tensors() -> None:
    totals = run_ranks(lambda world: world.sum_(torch.tensor([1.0, float(world.rank)])), world=4)
    assert [total.tolist() for total in totals] == [[4.0, 6.0]] * 4


def test_first_failure_is_raised_with_its_traceback() -> None:
    def rank_one_divides_by_zero(world: World) -> None:
        if world.rank == 1:
            _divide(1, 0)
        world.barrier()

    with pytest.raises(RankError, match=r"rank 1 failed:(.|\n)*_divide\(1, 0\)(.|\n)*ZeroDivisionError"):
        run_ranks(rank_one_divides_by_zero)


def test_a_failure_does_not_wait_for_peers_that_sleep(tmp_path: Path) -> None:
    processes = start_ranks(lambda world: _divide(1, 0) if world.rank else _sleep_forever(), world=2, folder=tmp_path)
    try:
        assert wait_for_ranks(processes, timeout_s=60.0) == []
        processes[1].join()
        began_s = time.monotonic()
        assert wait_for_ranks(processes, timeout_s=60.0) == []  # nor does one that was over before anybody looked
        assert time.monotonic() - began_s < 30
    finally:
        processes[0].kill()
        processes[0].join()


def test_of_two_failures_the_earlier_is_the_cause(tmp_path: Path) -> None:
    for rank, failed_s in ((0, 200), (1, 100), (2, 300)):
        (tmp_path / f"error-{rank}").write_text(f"error of rank {rank}")
        os.utime(tmp_path / f"error-{rank}", (failed_s, failed_s))
    with pytest.raises(RankError, match=r"rank 1 failed:\nerror of rank 1"):
        raise_first_error(tmp_path)


def test_dead_rank_is_reported() -> None:
    with pytest.raises(RankError, match=r"rank 0 of 1 ended without a word, exit code -9"):
        run_ranks(lambda world: os.kill(os.getpid(), signal.SIGKILL), world=1)


def test_hanging_rank_is_killed_at_the_timeout(tmp_path: Path) -> None:
    def rank_one_hangs(world: World) -> None:
        (tmp_path / str(world.rank)).write_text(str(os.getpid()))
        if world.rank == 1:
            _sleep_forever()

    with pytest.raises(RankError, match=r"ranks \[1\] of 2 did not finish within 3 s(.|\n)*in _sleep_forever"):
        run_ranks(rank_one_hangs, timeout_s=3.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "1").read_text()), 0)


def test_collectives_are_counted_by_name() -> None:
    def counts(world: World) -> tuple[list[int], list[int]]:
        with Collectives() as sums:
            world.sum_(torch.ones(3))
            world.sum_(torch.ones(3))
        model = nn.Linear(4, 4)
        fully_shard(model, mesh=world.mesh("shard"))
        with Collectives() as step:
            model(torch.ones(1, 4)).sum().backward()
        return [sums.all_reduces, sums.total], [step.all_gathers, step.reduce_scatters, step.all_reduces, step.total]

    assert run_ranks(counts) == [([2, 2], [1, 1, 0, 2])] * 2


def _divide(numerator: int, denominator: int) -> float:
    return numerator / denominator


def _sleep_forever() -> None:
    while True:
        time.sleep(0.1)
