"""Where the time of a call goes, operator by operator, and how often it makes the host wait for the device.

On a CUDA device the waits are the runtime's own calls. A CPU never waits, so what is counted there is each operator that reads a value
back, and would wait on a GPU.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal")
"""Operators whose result or its shape is a value on the device."""
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclass(frozen=True)
class Line:
    operator: str
    self_us: float
    """On the device where it works there, else on the CPU."""
    calls: int


@dataclass(frozen=True)
class Profile:
    lines: tuple[Line, ...]
    """Slowest first."""
    synchronisations: Mapping[str, int]
    """By operator, or by call of the runtime."""

    def table(self, longest: int = 15) -> str:
        shown = [f"  {line.operator:<48}{line.self_us:>12.1f}{line.calls:>8}" for line in self.lines[:longest]]
        waits = ", ".join(f"{name} {count}" for name, count in self.synchronisations.items()) or "none"
        return "\n".join([f"  {'operator':<48}{'self us':>12}{'calls':>8}", *shown, f"  synchronisations: {waits}"])


def profile(call: Callable[[], object], device: torch.device) -> Profile:
    """Of one call, after another to warm up."""
    call()
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with torch.profiler.profile(activities=activities) as recorded:
        call()
    events = recorded.key_averages()
    times = [Line(event.key, event.self_device_time_total if on_cuda else event.self_cpu_time_total, event.count) for event in events]
    waits = {event.key: event.count for event in events if event.key in WAITS} if on_cuda else value_reads(call)
    return Profile(tuple(sorted(times, key=lambda line: -line.self_us)), waits)


def value_reads(call: Callable[[], object]) -> dict[str, int]:
    """How often each operator reads a value back in one call on a CPU."""
    found: Counter[str] = Counter()
    with _Methods(found), _Operators(found):
        call()
    return dict(found.most_common())


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = func.name().removeprefix("aten::").split(".")[0], kwargs or {}
        if name in READS or _asks_for_size(name, func, args, kwargs) or _picks_by_boolean(name, args):
            self._found[name] += 1
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    """`tolist` reads memory without an operator, and no copy to the host shows where the host is the device."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        by_name = func is torch.Tensor.to and any(isinstance(x, str) and x == "cpu" for x in (*args, *kwargs.values()))
        if func in (torch.Tensor.tolist, torch.Tensor.cpu) or by_name:
            self._found[func.__name__] += 1
        return func(*args, **kwargs)


def _asks_for_size(name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Repeating by a tensor of counts, without being told what they add up to."""
    return name == "repeat_interleave" and func._overloadname.endswith("Tensor") and kwargs.get("output_size") is None


def _picks_by_boolean(name: str, args: Sequence[Any]) -> bool:
    """`x[mask]`, and `x[mask] = rows` unless it is a single value that is filled in."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_") or (name != "index" and args[2].numel() == 1):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])
