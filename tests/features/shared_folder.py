"""Processes beside a test, which end with it."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess

import torch


@contextlib.contextmanager
def processes(count: int, work: Callable[[], None]) -> Iterator[Sequence[BaseProcess]]:
    """`count` forked processes that do `work` on one thread; those still there at the end are killed."""

    def run() -> None:
        torch.set_num_threads(1)
        work()

    started = [multiprocessing.get_context("fork").Process(target=run) for _ in range(count)]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()
