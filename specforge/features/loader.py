"""FeatureDataLoader: the windows of one optimiser step each, read ahead of the step that uses them.

The only position is an integer in the global sample order, so it means the same at any world size, and `seek` reads
nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, Self

from specforge.data.packing import pack
from specforge.distributed import World
from specforge.errors import DataError
from specforge.features.batch import DraftBatch
from specforge.features.source import SpanStore
from specforge.features.span import Span, Spans


class Batch(Protocol):
    """Samples of a store, packed end to end."""

    @classmethod
    def pack(cls, samples: Sequence[int], features: Sequence[Any], ids: Sequence[str], /) -> Self: ...

    @classmethod
    def empty(cls, meta: Any, /) -> Self:
        """A batch that weighs nothing. It keeps a rank without samples in step."""
        ...

    def pinned(self) -> Self: ...


@dataclass(frozen=True)
class Window:
    """The samples of one optimiser step, and this rank's micro-batches of them (equally many on every rank)."""

    samples: int
    batches: tuple[Any, ...]
    """Of the kind that the loader was asked for."""
    plans: tuple[Any, ...] = ()
    """What the method works out of each batch on the host; empty where nobody asked for it."""


class FeatureDataLoader:
    """Windows of `batch_samples` consecutive samples of the global order, packed into micro-batches of a token budget.

    Iterating yields windows from the current position to `total_samples`; the last one may be smaller. Features are read,
    pinned for a GPU and, with `plan`, which is told how many steps were done before, planned for while the step before is computed.
    `kind` is what the micro-batches are, and packs the samples of `store`.
    """

    def __init__(
        self,
        store: SpanStore,
        seed: int,
        batch_samples: int,
        micro_batch_tokens: int,
        total_samples: int,
        world: World,
        exclude_ids: Sequence[str] = (),
        plan: Callable[[Any, int], Any] | None = None,
        kind: type[Batch] = DraftBatch,
    ) -> None:
        if len(store) < world.size:
            raise DataError(f"{len(store)} training samples for {world.size} ranks: every rank needs one; use fewer ranks or more data.")
        excluded = set(exclude_ids)
        numbers = tuple(number for number, sample_id in enumerate(store.ids) if sample_id in excluded)
        self._store = store
        self._spans = Spans(len(store), seed, batch_samples, total_samples, numbers)
        self._budget_tokens = micro_batch_tokens
        self._world = world
        self._plan = plan
        self._kind = kind
        self.position = self.step = 0

    def seek(self, samples: int, step: int = 0) -> None:
        """Continue after the first `samples` samples of the global order, which took `step` steps."""
        self.position, self.step = samples, step

    def __iter__(self) -> Iterator[Window]:
        with ThreadPoolExecutor(1, "feature-reader") as reader, self._store.reading(self._spans, self.position):
            ahead = self._submit(reader, self._spans.at(self.position), self.step)
            while ahead is not None:
                span, window = ahead.result()
                ahead = self._submit(reader, self._spans.at(span.end), self.step + 1)
                self.position, self.step = span.end, self.step + 1
                yield window
                self._store.release(span)  # that step is done, so every rank had its part

    def _submit(self, reader: ThreadPoolExecutor, span: Span | None, step: int) -> "Future[tuple[Span, Window]] | None":
        return None if span is None else reader.submit(lambda: (span, self._read(span, step)))

    def _read(self, span: Span, step: int) -> Window:
        lengths = [int(self._store.lengths[number]) for number in span.samples]
        batches = [
            [span.samples[place] for place in places] for places in pack(lengths, self._budget_tokens, self._world.size)[self._world.rank]
        ]
        mine = [number for batch in batches for number in batch]
        features = dict(zip(mine, self._store.take(span, mine), strict=True))
        packed = tuple(self._packed(batch, features) for batch in batches)
        plans = tuple(self._plan(batch, step) for batch in packed) if self._plan else ()
        if self._world.device.type == "cuda":
            packed = tuple(batch.pinned() for batch in packed)
        return Window(span.count, packed, plans)

    def _packed(self, numbers: list[int], features: Mapping[int, Any]) -> Batch:
        if not numbers:
            return self._kind.empty(self._store.meta)
        return self._kind.pack(numbers, [features[number] for number in numbers], [self._store.ids[number] for number in numbers])
