"""What a run makes of signals."""

import os
import signal

from specforge.training.stop import StopRequest


def test_sigterm_may_come_twice() -> None:
    """From Slurm, which signals every process of a step, and from torchrun, which passes on what it got."""
    request = StopRequest()
    with request.listening():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.reasons().tolist() == [0.0, 1.0, 0.0]
