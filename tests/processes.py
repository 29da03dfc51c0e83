"""Forked processes that a test kills or waits for."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from tqdm import tqdm

PATIENCE_S = 30


def fork(fn: Callable[[], Any]) -> BaseProcess:
    """Run `fn` in a forked process of one thread; it may be killed at any moment."""

    def work() -> None:
        torch.set_num_threads(1)  # before any operator: the parent's thread pool did not survive the fork
        tqdm.set_lock(threading.RLock())  # the one that forks share stays taken when one of them is killed
        fn()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def wait_until(condition: Callable[[], Any]) -> None:
    """Poll until `condition` holds, `PATIENCE_S` at most."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
