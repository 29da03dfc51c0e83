"""Where the ranks of one job wait for each other without sitting in a collective.

Capturing features or answers takes the ranks unequal hours, and a collective gives up after minutes. They meet instead
through small files in a folder that all of them see. At world size 1 nothing is written.
"""

import json
import os
import secrets
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from specforge import files
from specforge.distributed.world import World
from specforge.errors import FeatureError, SpecForgeError

_POLL_S = 0.05
_ABANDONED_S = 86_400.0


class PeerError(FeatureError):
    """Another rank of the job failed; the message is its own."""


class Rendezvous:
    """A context in which every rank tells its values and hears the others'; a rank that fails makes the others fail too.

    Entering is one short collective, so all ranks must come together. Every file is written once. What goes wrong on a
    rank after another one failed is taken for a consequence, and reported as the other's failure.
    """

    def __init__(self, parent: Path, world: World) -> None:
        self.world = world
        self.folder = parent / f".meeting-{world.from_main(secrets.token_hex(8))}"
        self._launcher = os.getppid()
        if world.size > 1 and world.is_main:
            _sweep(parent)
        if world.size > 1:
            self.folder.mkdir(parents=True, exist_ok=True)

    def tell(self, name: str, value: Any = None) -> None:
        """Leave a JSON-like value for the other ranks."""
        if self.world.size > 1:
            files.write_json(self.folder / f"{name}.{self.world.rank}", value)

    def hear(self, name: str, rank: int = 0) -> Any:
        """The value that `rank` tells; waits for it.

        Raises:
            PeerError: another rank failed.
            FeatureError: the launcher of this job is gone.
        """
        told = self.folder / f"{name}.{rank}"
        while not told.exists():
            self._raise_failure_of_a_peer()
            if os.getppid() != self._launcher:
                raise FeatureError(f"rank {self.world.rank}: the launcher of this job is gone, so rank {rank} is no longer waited for.")
            time.sleep(_POLL_S)
        return json.loads(told.read_text())

    def meet(self, name: str, value: Any = None) -> list[Any]:
        """Every rank's value, in rank order; returns when all have told it."""
        if self.world.size == 1:
            return [value]
        self.tell(name, value)
        return [self.hear(name, rank) for rank in range(self.world.size)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.world.size == 1:
            return
        if value is not None:
            self.tell_failure(kind, value, trace)
            return
        self.tell("left")
        if self.world.is_main:
            for rank in range(self.world.size):
                self.hear("left", rank)
            shutil.rmtree(self.folder)

    def tell_failure(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """An exit callback, for those who must tell a failure before they clean up what others still use."""
        if value is None or self.world.size == 1 or isinstance(value, PeerError):
            return
        self._raise_failure_of_a_peer(value)
        self.tell("failed", str(value) if isinstance(value, SpecForgeError) else repr(value))

    def _raise_failure_of_a_peer(self, consequence: BaseException | None = None) -> None:
        for failure in sorted(self.folder.glob("failed.*")):
            if failure.suffix != f".{self.world.rank}":
                raise PeerError(f"rank {failure.suffix[1:]} failed: {json.loads(failure.read_text())}") from consequence


def _sweep(parent: Path) -> None:
    """Remove the meeting folders of jobs that failed more than a day ago; a younger one may be in use."""
    for folder in parent.glob(".meeting-*"):
        if time.time() - folder.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(folder)
