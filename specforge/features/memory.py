"""`mem://NAME`: features handed over within one process, once."""

import threading
from collections.abc import Sequence

from specforge.errors import FeatureError
from specforge.features.source import EncodedStore
from specforge.features.span import Span
from specforge.features.store import FeatureMeta, Sample, SampleFeatures, check_finite


class ConsumedError(FeatureError):
    """A sample of a consume-once store was asked for again."""


class MemoryFeatureStore(EncodedStore):
    """A thread of yours puts features in, the training takes them out, and at most `limit_bytes` lie between.

    A sample is put for the span that begins at `position` (0 where there is but one pass), and is gone once it was read or
    the span was released. Both sides wait for each other, `wait_s` at most; the limit must hold what a step reads.
    """

    def __init__(self, samples: Sequence[Sample], meta: FeatureMeta, *, limit_bytes: int, wait_s: float = 1800.0) -> None:
        super().__init__(samples, meta)
        self.limit_bytes = limit_bytes
        self.resident_bytes = 0
        self._wait_s = wait_s
        self._held: dict[tuple[int, int], SampleFeatures] = {}
        self._consumed: set[tuple[int, int]] = set()
        self._released = 0
        self._changed = threading.Condition()

    def put(self, number: int, features: SampleFeatures, position: int = 0) -> None:
        """Hand over the features of a sample; waits for room. For a span that was released, nothing happens.

        Raises:
            FeatureError: the sample was put already, is no number, or nobody makes room for it.
        """
        check_finite(self.ids[number], features)
        size_bytes = self._size_bytes(number)
        with self._changed:
            if (position, number) in self._held or (position, number) in self._consumed:
                raise FeatureError(f"sample {self.ids[number]!r}: was put already for position {position}; put it once.")
            if not self._changed.wait_for(lambda: self.resident_bytes + size_bytes <= self.limit_bytes, self._wait_s):
                raise FeatureError(
                    f"limit_bytes={self.limit_bytes}: no room for sample {self.ids[number]!r} ({size_bytes} bytes) "
                    f"within {self._wait_s:g} s; raise the limit, or start the training that reads."
                )
            if position >= self._released:
                self._held[position, number] = features
                self.resident_bytes += size_bytes
            self._changed.notify_all()

    def read(self, number: int, position: int = 0) -> SampleFeatures:
        """The features of a sample, which then leave the store; waits for them.

        Raises:
            ConsumedError: they were read or released before.
            FeatureError: nobody puts them.
        """
        with self._changed:
            if (position, number) in self._consumed or position < self._released:
                raise ConsumedError(
                    f"sample {self.ids[number]!r}: was read already, and mem:// gives each sample once; "
                    f"use a store that can be read again (file://, or a shared folder with features.retain=true)."
                )
            if not self._changed.wait_for(lambda: (position, number) in self._held, self._wait_s):
                raise FeatureError(f"sample {self.ids[number]!r}: nobody put it for {self._wait_s:g} s; check the thread that feeds.")
            self._consumed.add((position, number))
            return self._drop(position, number)

    def take(self, span: Span, numbers: Sequence[int]) -> list[SampleFeatures]:
        """A sample that occurs twice in a span is read once."""
        found = {number: self.read(number, span.position) for number in dict.fromkeys(numbers)}
        return [found[number] for number in numbers]

    def release(self, span: Span) -> None:
        """Forget what other ranks read of the span, and everything before it."""
        with self._changed:
            self._released = span.end
            for position, number in [key for key in self._held if key[0] < span.end]:
                self._drop(position, number)
            self._consumed = {key for key in self._consumed if key[0] >= span.end}

    def _drop(self, position: int, number: int) -> SampleFeatures:
        self.resident_bytes -= self._size_bytes(number)
        self._changed.notify_all()
        return self._held.pop((position, number))

    def _size_bytes(self, number: int) -> int:
        return int(self.lengths[number]) * self.meta.bytes_per_token
