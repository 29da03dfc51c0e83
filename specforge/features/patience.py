"""Waiting for another process, without end only where somebody looks."""

import os
import sys
import time

from specforge.errors import FeatureError

_POLL_S = 0.02
_TELL_S = 30.0


class Patience:
    """Polls for what another process does; tells now and then what is missing, and gives up after `wait_s`."""

    def __init__(self, wait_s: float, tell: bool = True) -> None:
        self._wait_s = wait_s
        self._tell = tell
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.renew()

    def renew(self) -> None:
        """Something happened."""
        self._began_s = self._told_s = time.monotonic()

    def pause(self, missing: str) -> None:
        """
        Raises:
            FeatureError: nothing happened for `wait_s`, or the launcher of this process is gone.
        """
        now_s = time.monotonic()
        if self._launcher is not None and os.getppid() != self._launcher:
            raise FeatureError(f"{missing}; the launcher of this process is gone, so it no longer waits.")
        if now_s - self._began_s > self._wait_s:
            raise FeatureError(f"{missing}; waited features.wait_s={self._wait_s:g} s in vain.")
        if self._tell and now_s - self._told_s > _TELL_S:
            self._told_s = now_s
            print(f"waiting since {now_s - self._began_s:.0f} s: {missing}", file=sys.stderr, flush=True)
        time.sleep(_POLL_S)
