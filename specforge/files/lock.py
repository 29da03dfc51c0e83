"""Mutual exclusion between processes that share a folder."""

import errno
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from specforge.errors import SpecForgeError


class Lock:
    """Mutual exclusion between processes by a file that is there while somebody holds it.

    The kernel releases the lock when its holder ends, in whatever way; a file left behind is then taken over.

    Raises:
        SpecForgeError: there can be no lock at `path`, because the file system has none or may not be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as cause:
            raise _no_lock(self.path, cause) from cause
        try:
            # A file that its holder removed meanwhile locks nobody out.
            if _flock(descriptor, fcntl.LOCK_EX, self.path) and _is_at(descriptor, self.path):
                self._descriptor, descriptor = descriptor, -1
        finally:
            if descriptor != -1:
                os.close(descriptor)
        return self._descriptor is not None

    def acquire(self, poll_s: float = 0.1) -> None:
        while not self.try_acquire():
            time.sleep(poll_s)

    def release(self) -> None:
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Whether some process holds the `Lock` of `path`."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _flock(descriptor, fcntl.LOCK_SH, path)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, kind: int, path: Path) -> bool:
    """Lock an open file unless another process has locked it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as cause:
        raise _no_lock(path, cause) from cause
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError as cause:
        if cause.errno in (errno.ENOENT, errno.ESTALE):
            return False
        raise


def _no_lock(path: Path, cause: OSError) -> SpecForgeError:
    return SpecForgeError(
        f"{path}: cannot be locked ({cause.strerror}); choose a folder that can be written, on a file system with flock "
        "(a local disk, Lustre mounted with flock, NFS with its lock service)."
    )
