"""What asks a run to stop before its end: a signal, or a launcher that is gone."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from specforge.errors import SpecForgeError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(SpecForgeError):
    """A signal ended the run after a last save; the exit code is the shell's, 128 + the signal's number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopRequest:
    """This rank's reasons to stop, as numbers that ranks add up once a step, so that all of them stop after the same one."""

    def __init__(self) -> None:
        self._heard: signal.Signals | None = None
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT are noted in here; a second SIGINT acts as it did before. Only a main thread can listen.

        A second SIGTERM is nobody's impatience: a job manager signals all processes, and torchrun passes its own on.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, self._before[self._heard])

    def reasons(self) -> torch.Tensor:
        """[launcher gone, SIGTERM, SIGINT] as 0 or 1, float64."""
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        return torch.tensor([orphaned, *(self._heard == number for number in SIGNALS)], dtype=torch.float64)
