"""Who is timed when; how long it took is no matter of a test."""

import time
from collections.abc import Callable

import pytest
import torch

from specforge.bench import timer
from specforge.bench.timer import Times, interleaved

CPU = torch.device("cpu")


def test_calls_take_turns_and_each_begins_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "TURN_S", 0.0)
    seen: list[str] = []

    def calls(name: str) -> Callable[[], None]:
        return lambda: seen.append(name)

    monkeypatch.setattr(timer.math, "ceil", lambda _: 1)
    all_times = interleaved([calls(name) for name in "abc"], 4, CPU)
    assert "".join(seen) == "abc" + "abcbcacababc", "one call each to see how long it takes, then the rounds"
    assert [len(times.synchronised_s) for times in all_times] == [4, 4, 4]


def test_a_short_call_is_repeated_and_a_long_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the calls move: 1 ms fills a turn of 20 ms twenty times; times are those of one call."""
    now_s, counts = [0.0], [0, 0]
    monkeypatch.setattr(time, "process_time", lambda: now_s[0])

    def work(number: int, seconds: float) -> Callable[[], None]:
        def call() -> None:
            now_s[0] += seconds
            counts[number] += 1

        return call

    short, long = interleaved([work(0, 0.001), work(1, 0.03)], 3, CPU)
    assert counts == [1 + 3 * 20, 1 + 3]
    assert short.synchronised_s == pytest.approx([0.001] * 3) and long.synchronised_s == pytest.approx([0.03] * 3)
    assert short.dispatch_s == short.synchronised_s, "a CPU has one clock"


def test_what_is_said_of_rounds() -> None:
    times = Times(dispatch_s=[0.1, 0.3, 0.2], synchronised_s=[1.0, 5.0, 2.0, 3.0, 4.0])
    assert (times.median_dispatch_s, times.median_s, times.minimum_s) == (0.2, 3.0, 1.0)
    assert times.spread == pytest.approx((4.0 - 2.0) / 3.0)
    assert Times([1.0], [1.0]).spread == 0.0
