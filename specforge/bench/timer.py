"""Two clocks over configurations that take turns.

Dispatch is the time until a call has returned, synchronised the time until the device has done what the call asked for. Only the latter is
what a user waits for; a score of the former would reward work that is merely left behind. On a CPU they are one, and CPU time of the
process, so that what a neighbour takes of the core does not count.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

TURN_S = 2e-2
"""A shorter call is repeated: alone it would measure the clock, and caches that its neighbours left."""


@dataclass
class Times:
    """Seconds of each round."""

    dispatch_s: list[float] = field(default_factory=list)
    synchronised_s: list[float] = field(default_factory=list)

    @property
    def median_dispatch_s(self) -> float:
        return statistics.median(self.dispatch_s)

    @property
    def median_s(self) -> float:
        return statistics.median(self.synchronised_s)

    @property
    def minimum_s(self) -> float:
        return min(self.synchronised_s)

    @property
    def spread(self) -> float:
        """Middle half of the rounds over the median; 0 of a single round."""
        if len(self.synchronised_s) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.synchronised_s, n=4, method="inclusive")
        return (third - first) / self.median_s


def clock_of(device: torch.device) -> tuple[str, Callable[[], float]]:
    return ("cpu time of the process", time.process_time) if device.type == "cpu" else ("wall", time.perf_counter)


def interleaved(calls: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[Times]:
    """Each call has one turn a round, of as many repetitions as fill `TURN_S`; times are those of one. A round begins with another call
    than the one before, so that none is always first after the same one."""
    repetitions = [math.ceil(TURN_S / max(_turn(call, 1, device)[1], 1e-6)) for call in calls]
    all_times = [Times() for _ in calls]
    for first in range(rounds):
        for place in range(len(calls)):
            number = (first + place) % len(calls)
            dispatch_s, synchronised_s = _turn(calls[number], repetitions[number], device)
            all_times[number].dispatch_s.append(dispatch_s)
            all_times[number].synchronised_s.append(synchronised_s)
    return all_times


def _turn(call: Callable[[], object], repetitions: int, device: torch.device) -> tuple[float, float]:
    _, clock = clock_of(device)
    _wait(device)
    began_s = clock()
    for _ in range(repetitions):
        call()
    dispatched_s = ended_s = clock()
    if device.type != "cpu":
        _wait(device)
        ended_s = clock()
    return (dispatched_s - began_s) / repetitions, (ended_s - began_s) / repetitions


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
