"""Run a function as the ranks of a world, on CPU and gloo, and count the collectives that it issues."""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from specforge.distributed.world import World


class RankError(AssertionError):
    """A rank raised, died or hung; the message says which one and shows where."""


def run_ranks(fn: Callable[..., Any], *args: Any, world: int = 2, timeout_s: float = 60.0) -> list[Any]:
    """Call `fn(World, *args)` in `world` forked processes and return what the ranks returned, in rank order.

    The ranks share a gloo group; a world of one has none. As the processes are forked, `fn` may be a closure and `args`
    anything; what it returns must pickle. Only files in a temporary folder connect the processes, so that no two runs clash.

    Raises:
        RankError: with the traceback of the rank that failed first, or the stacks of those that hung.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        processes = start_ranks(fn, *args, world=world, folder=folder, timeout_s=timeout_s)
        try:
            unfinished = wait_for_ranks(processes, timeout_s + 0.5)  # by then the stacks are written
        finally:
            for process in processes:
                process.kill()
                process.join()
        raise_first_error(folder)
        if unfinished:
            stacks = "\n".join(f"rank {rank}:\n{_stack(folder, rank).read_text()}" for rank in unfinished)
            raise RankError(f"ranks {unfinished} of {world} did not finish within {timeout_s:g} s and were killed\n{stacks}")
        for rank, process in enumerate(processes):
            if not _value(folder, rank).exists():
                raise RankError(f"rank {rank} of {world} ended without a word, exit code {process.exitcode}")
        return [pickle.loads(_value(folder, rank).read_bytes()) for rank in range(world)]


def start_ranks(fn: Callable[..., Any], *args: Any, world: int, folder: Path, timeout_s: float = 60.0) -> list[BaseProcess]:
    """Start the ranks of `run_ranks` and leave them alone, for tests that kill some. What they return or raise lies in `folder`."""
    fork = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = [
        fork.Process(target=_run_rank, args=(fn, args, rank, world, folder, timeout_s)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


class Collectives(TorchDispatchMode):
    """Counts the collectives issued inside the context, by the name of their operator.

    Example:
        with Collectives() as seen:
            loss.backward()
        assert seen.reduce_scatters == 1
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and func._opname != "wait_tensor":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.counts.total()

    @property
    def all_gathers(self) -> int:
        return self._named("allgather")

    @property
    def reduce_scatters(self) -> int:
        return self._named("reducescatter")

    @property
    def all_reduces(self) -> int:
        return self._named("allreduce")

    def _named(self, kind: str) -> int:
        return sum(count for name, count in self.counts.items() if name.replace("_", "").startswith(kind))


def _run_rank(fn: Callable[..., Any], args: tuple[Any, ...], rank: int, size: int, folder: Path, timeout_s: float) -> None:
    torch.set_num_threads(1)  # before any operator: the parent's thread pool did not survive the fork
    tqdm.set_lock(threading.RLock())  # the one that forks share stays taken when one of them is killed
    with _stack(folder, rank).open("w") as stack:
        faulthandler.dump_traceback_later(timeout_s, file=stack)
        try:
            if size > 1:
                patience = timedelta(seconds=2 * timeout_s)  # a hang is ours to report, with its stack
                dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=patience)
            world = World(rank=rank, size=size, local_rank=rank, local_size=size, device=torch.device("cpu"))
            value = pickle.dumps(fn(world, *args))
            world.leave()
        except BaseException:
            _error(folder, rank).write_text(traceback.format_exc())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # unwinding could wait for peers that wait for this rank
        faulthandler.cancel_dump_traceback_later()
    _value(folder, rank).write_bytes(value)


def wait_for_ranks(processes: Sequence[BaseProcess], timeout_s: float) -> list[int]:
    """Wait until every process ended or one of them failed; return the ranks that outlived the time."""
    deadline = time.monotonic() + timeout_s
    while True:
        running = [process for process in processes if process.exitcode is None]
        if not running or any(process.exitcode for process in processes):
            return []
        if not connection.wait([process.sentinel for process in running], deadline - time.monotonic()):
            return [rank for rank, process in enumerate(processes) if process in running]


def raise_first_error(folder: Path) -> None:
    """A rank that fails takes its peers along, so the earliest error is the cause."""
    errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        raise RankError(f"rank {errors[0].name.removeprefix('error-')} failed:\n{errors[0].read_text()}")


def _value(folder: Path, rank: int) -> Path:
    return folder / f"value-{rank}"


def _error(folder: Path, rank: int) -> Path:
    return folder / f"error-{rank}"


def _stack(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}"
