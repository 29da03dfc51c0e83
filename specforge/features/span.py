"""The samples of one optimiser step, addressed so that every process names them alike."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from specforge.data.order import SampleOrder


@dataclass(frozen=True)
class Span:
    """`count` consecutive places of the global order, from `position` on."""

    position: int
    count: int
    samples: tuple[int, ...]
    """Sample numbers, the excluded ones left out; one may occur twice where an epoch ends."""

    @property
    def end(self) -> int:
        return self.position + self.count


@dataclass(frozen=True)
class Spans:
    """The global order cut into optimiser steps, up to `total_samples`. Equal fields give equal spans on every machine."""

    num_samples: int
    seed: int
    batch_samples: int
    total_samples: int
    excluded: tuple[int, ...] = ()
    """Numbers of the samples that are never read, ascending."""

    def at(self, position: int) -> Span | None:
        """The span that begins there; None at the end."""
        count = min(self.batch_samples, self.total_samples - position)
        if count <= 0:
            return None
        numbers = (int(number) for number in _order(self.num_samples, self.seed).ids(position, count))
        return Span(position, count, tuple(number for number in numbers if number not in self._left_out))

    def following(self, position: int, limit: int) -> Iterator[Span]:
        """At most `limit` spans from `position` on."""
        for _ in range(limit):
            span = self.at(position)
            if span is None:
                return
            yield span
            position = span.end

    @cached_property
    def _left_out(self) -> frozenset[int]:
        return frozenset(self.excluded)


@lru_cache(maxsize=2)
def _order(num_samples: int, seed: int) -> SampleOrder:
    """One order serves all spans of a run, however often its request is read."""
    return SampleOrder(num_samples, seed)
