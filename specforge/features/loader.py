"""FeatureDataLoader: the windows of one optimiser step each, read ahead of the step that uses them.

The only position is an integer in the global sample order, so it means the same at any world size, and `seek` reads
nothing.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from specforge.data.order import SampleOrder
from specforge.data.packing import pack
from specforge.distributed import World
from specforge.errors import DataError
from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore


@dataclass(frozen=True)
class Window:
    """The samples of one optimiser step, and this rank's micro-batches of them (equally many on every rank)."""

    samples: int
    batches: tuple[DraftBatch, ...]


class FeatureDataLoader:
    """Windows of `batch_samples` consecutive samples of the global order, packed into micro-batches of a token budget.

    Iterating yields windows from the current position to `total_samples`; the last one may be smaller.
    """

    def __init__(
        self,
        store: LocalFeatureStore,
        seed: int,
        batch_samples: int,
        micro_batch_tokens: int,
        total_samples: int,
        world: World,
        exclude_ids: Sequence[str] = (),
    ) -> None:
        if len(store) < world.size:
            raise DataError(f"{len(store)} training samples for {world.size} ranks: every rank needs one; use fewer ranks or more data.")
        self._store = store
        self._order = SampleOrder(len(store), seed)
        self._batch_samples = batch_samples
        self._budget_tokens = micro_batch_tokens
        self._total_samples = total_samples
        self._world = world
        excluded = set(exclude_ids)
        self._excluded = {index for index, sample_id in enumerate(store.ids) if sample_id in excluded}
        self.position = 0

    def seek(self, samples: int) -> None:
        """Continue after the first `samples` samples of the global order."""
        self.position = samples

    def __iter__(self) -> Iterator[Window]:
        with ThreadPoolExecutor(1, "feature-reader") as reader:
            ahead = self._submit(reader, self.position)
            while ahead is not None:
                window = ahead.result()
                ahead = self._submit(reader, self.position + window.samples)
                self.position += window.samples
                yield window

    def _submit(self, reader: ThreadPoolExecutor, position: int) -> "Future[Window] | None":
        count = min(self._batch_samples, self._total_samples - position)
        return reader.submit(self._read, position, count) if count > 0 else None

    def _read(self, position: int, count: int) -> Window:
        samples = [int(index) for index in self._order.ids(position, count) if int(index) not in self._excluded]
        lengths = [int(self._store.lengths[index]) for index in samples]
        mine = pack(lengths, self._budget_tokens, self._world.size)[self._world.rank]
        batches = []
        for places in mine:
            chosen = [samples[place] for place in places]
            if chosen:
                batches.append(DraftBatch.read(self._store, chosen))
            else:
                batches.append(DraftBatch.empty_like(self._store.read(0)))
        return Window(count, tuple(batches))
