"""Where the time of an optimiser step goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepProfile:
    """Seconds by phase, on this rank. Where it is `enabled`, a phase ends only when the device has done its work."""

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        started_s = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds[name] += time.perf_counter() - started_s

    def milliseconds(self, steps: int) -> dict[str, float]:
        """By phase, a step."""
        return {name: 1e3 * seconds / steps for name, seconds in self._seconds.items()}

    def table(self, steps: int) -> str:
        """One line a phase, the longest first."""
        each_ms = self.milliseconds(steps)
        whole_ms = sum(each_ms.values())
        ordered = sorted(each_ms.items(), key=lambda item: -item[1])
        lines = [f"{name:<12}{ms:>10.2f} ms{100 * ms / whole_ms:>7.1f} %" for name, ms in ordered]
        return "\n".join([f"a step of {steps}, on rank 0:", *lines, f"{'together':<12}{whole_ms:>10.2f} ms"])
