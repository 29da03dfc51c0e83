"""Where the ranks of one job wait for each other without sitting in a collective.

Capturing features or answers takes the ranks unequal hours, and a collective gives up after minutes. They meet instead
through small files in a folder that all of them see. At world size 1 nothing is written.
"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from specforge import files
from specforge.distributed.world import World
from specforge.errors import FeatureError, SpecForgeError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.25
_SETTLED_S = 600.0


class PeerError(FeatureError):
    """Another rank of the job failed; the message is its own."""


class Rendezvous:
    """A context in which every rank tells its values and hears the others'; a rank that fails makes the others fail too.

    Entering is two short collectives, so all ranks must come together. Every file is written once. Each rank holds a lock
    while it is here, which its death releases; so nobody waits for the dead. What goes wrong on a rank after another one
    failed is taken for a consequence, and reported as the other's failure.
    """

    def __init__(self, parent: Path, world: World) -> None:
        self.world = world
        self.folder = parent
        self._launcher = os.getppid()

    def tell(self, name: str, value: Any = None) -> None:
        """Leave a JSON-like value for the other ranks."""
        if self.world.size > 1:
            files.write_json(self.folder / f"{name}.{self.world.rank}", value)

    def hear(self, name: str, rank: int = 0) -> Any:
        """The value that `rank` tells; waits for it.

        Raises:
            PeerError: another rank failed.
            FeatureError: `rank` died, or the launcher of this job is gone.
        """
        told = self.folder / f"{name}.{rank}"

        def has_told() -> bool:
            dead = self._is_gone(rank)  # asked first: it may tell, then leave
            if told.exists():
                return True
            if dead:
                self._raise_failure_of_a_peer()
                raise FeatureError(f"rank {rank} of this job ended without a word (was it killed?); start the job again.")
            return False

        self.poll(has_told, f"rank {rank}")
        return files.read_json(told, FeatureError)

    def meet(self, name: str, value: Any = None) -> list[Any]:
        """Every rank's value, in rank order; returns when all have told it."""
        if self.world.size == 1:
            return [value]
        self.tell(name, value)
        return [self.hear(name, rank) for rank in range(self.world.size)]

    def poll(self, condition: Callable[[], bool], what: str) -> None:
        """Return when `condition` holds; `what` is waited for. Raises as `hear` does."""
        pause_s = _FIRST_PAUSE_S
        while not condition():
            if self.world.size > 1:
                self._raise_failure_of_a_peer()
                if os.getppid() != self._launcher:
                    raise FeatureError(f"rank {self.world.rank}: the launcher of this job is gone, so {what} is no longer waited for.")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    @contextlib.contextmanager
    def holding(self, lock: files.Lock) -> Iterator[None]:
        """Hold `lock`, which another job may keep for hours; raises as `hear` does."""
        self.poll(lock.try_acquire, f"the job that holds {lock.path}")
        try:
            yield
        finally:
            lock.release()

    def __enter__(self) -> Self:
        if self.world.size > 1:
            self.folder = self.world.on_main(lambda: _make_folder(self.folder))
            self._alive = files.Lock(self._alive_path(self.world.rank))
            self._alive.acquire()
            self.world.barrier()  # from here on, a rank without a lock is dead
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.world.size == 1:
            return
        try:
            if value is not None:
                self.tell_failure(kind, value, trace)
                return
            self.tell("left")
            if self.world.is_main:
                for rank in range(1, self.world.size):
                    self.hear("left", rank)
                    self.poll(partial(self._is_gone, rank), f"rank {rank}")
        finally:
            self._alive.release()  # the last that this rank does in the folder
        if self.world.is_main:
            shutil.rmtree(self.folder)

    def tell_failure(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """An exit callback, for those who must tell a failure before they clean up what others still use."""
        if value is None or self.world.size == 1 or isinstance(value, PeerError):
            return
        self._raise_failure_of_a_peer(value)
        with contextlib.suppress(OSError):  # the disk may be full, or the folder gone: then the lock tells it
            self.tell("failed", str(value) if isinstance(value, SpecForgeError | OSError) else repr(value))

    def _raise_failure_of_a_peer(self, consequence: BaseException | None = None) -> None:
        with contextlib.suppress(FileNotFoundError):  # a rank that failed may have removed the folder around this one
            for name in sorted(os.listdir(self.folder)):
                kind, _, rank = name.partition(".")
                if kind == "failed" and rank != str(self.world.rank):
                    raise PeerError(f"rank {rank} failed: {files.read_json(self.folder / name, FeatureError)}") from consequence

    def _is_gone(self, rank: int) -> bool:
        return not files.is_held(self._alive_path(rank))

    def _alive_path(self, rank: int) -> Path:
        return self.folder / f"alive.{rank}"


def _make_folder(parent: Path) -> Path:
    folder = parent / f".meeting-{secrets.token_hex(8)}"
    _sweep(parent)
    folder.mkdir(parents=True)
    return folder


def _sweep(parent: Path) -> None:
    """Remove the meeting folders that failed jobs left. One in use is locked, or so young that its ranks may still come."""
    for folder in parent.glob(".meeting-*"):
        with contextlib.suppress(FileNotFoundError):  # its job, or another one that sweeps, removes it just now
            settled = time.time() - folder.stat().st_mtime > _SETTLED_S
            if settled and not any(files.is_held(alive) for alive in folder.glob("alive.*")):
                shutil.rmtree(folder)
