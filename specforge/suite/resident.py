"""What a suite keeps on the device from one evaluation to the next, and how the rest gets there while the model works."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

import torch

RESIDENT_BYTES = 2**30


class OnDevice:
    """A frozen dataclass of tensors, which go to a device together, and of what the host knows."""

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self, device: torch.device) -> Self:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """In page-locked memory, from which a GPU copies while the host goes on."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return type(self)(**{**vars(self), **{name: change(tensor) for name, tensor in self.tensors().items()}})


T = TypeVar("T", bound=OnDevice)


class Resident:
    """Lists of things on a device, by name. Above `cap_bytes` the least recently used ones go; what is larger than that is not kept."""

    def __init__(self, device: torch.device, cap_bytes: int) -> None:
        self.device, self.cap_bytes = device, cap_bytes
        self.moved = 0
        """How many things were brought here from the host."""
        self._held: OrderedDict[str, list[Any]] = OrderedDict()

    def get(self, name: str, make: Callable[[], Iterable[T]]) -> Iterable[T]:
        """What `make` gave the first time, on the device. What is not kept arrives one ahead of its use."""
        if name in self._held:
            self._held.move_to_end(name)
            held: list[T] = self._held[name]
            return held
        things = list(make())
        self.moved += len(things)
        size = sum(thing.num_bytes for thing in things)
        if size > self.cap_bytes:
            return ahead(things, self.device)
        while self._held and self.held_bytes + size > self.cap_bytes:
            self._held.popitem(last=False)
        kept = [thing.to(self.device) for thing in things]
        self._held[name] = kept
        return kept

    @property
    def held_bytes(self) -> int:
        return sum(thing.num_bytes for things in self._held.values() for thing in things)


def ahead(things: Iterable[T], device: torch.device) -> Iterator[T]:
    """Each on the device; on CUDA the copy of the next one runs in a stream of its own while this one is used."""
    if device.type != "cuda":
        yield from (thing.to(device) for thing in things)
        return
    stream, waiting = torch.cuda.Stream(device), list[tuple[T, torch.cuda.Event]]()
    for thing in things:
        with torch.cuda.stream(stream):
            coming = thing.pinned().to(device)
            arrival = stream.record_event()
        if waiting:
            yield _arrived(*waiting.pop(), device)
        waiting.append((coming, arrival))
    if waiting:
        yield _arrived(*waiting.pop(), device)


def _arrived(thing: T, arrival: torch.cuda.Event, device: torch.device) -> T:
    """The stream of the computation waits for the copy, and its memory is not given away before that stream is done with it."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(arrival)
    for tensor in thing.tensors().values():
        tensor.record_stream(stream)
    return thing
