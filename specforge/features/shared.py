"""Features that other processes make while they are read: a folder that holds the next few spans and nothing else.

The trainer's rank 0 writes a `Request`: which features it wants, in which order, how far it is and how many spans ahead it
allows. Producers (`features.producer`) keep exactly these spans there, one file each. Both sides derive everything else from
that file and the encoded rows, so either may be killed at any moment and come back: a trainer that starts at an earlier
position says so, and what is missing is made again.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from specforge import files
from specforge.distributed.world import World
from specforge.errors import FeatureError
from specforge.features.capture import samples_sha256
from specforge.features.patience import Patience
from specforge.features.request import Request
from specforge.features.source import EncodedStore
from specforge.features.span import Span, Spans
from specforge.features.span_file import read_span, span_path, spans_present
from specforge.features.store import FeatureMeta, Sample, SampleFeatures


class SharedDirFeatureStore(EncodedStore):
    """The trainer's side. At most `ahead` spans are on the disk; those behind the position are removed when released.

    With `retain_on_release` nothing is removed, so the spans can be read again, by this run or by another of the same order.

    Raises:
        FeatureError: `folder` serves features of another kind.
    """

    def __init__(
        self,
        folder: Path,
        samples: Sequence[Sample],
        meta: FeatureMeta,
        world: World,
        *,
        capture_tokens: int,
        ahead: int,
        wait_s: float,
        retain_on_release: bool = False,
    ) -> None:
        super().__init__(samples, meta)
        self.folder = folder
        self._world = world
        self._capture_tokens = capture_tokens
        self._ahead = ahead
        self._wait_s = wait_s
        self._retain = retain_on_release
        self._samples_sha256 = samples_sha256(samples)
        self._request: Request | None = None
        world.on_main(self._earlier_request)

    def _earlier_request(self) -> Request | None:
        earlier = Request.read(self.folder)
        if earlier is not None:
            earlier.expect(self.folder, self.meta, self._samples_sha256)
        return earlier

    @contextlib.contextmanager
    def reading(self, spans: Spans, position: int) -> Iterator[None]:
        """
        Raises:
            FeatureError: another run reads from the folder.
        """
        request = Request(
            meta=self.meta, samples_sha256=self._samples_sha256, spans=spans, capture_tokens=self._capture_tokens,
            ahead=self._ahead, retain=self._retain, position=position,
        )  # fmt: skip
        lock = files.Lock(self.folder / "trainer.lock")
        self._world.on_main(lambda: self._begin(request, lock))
        self._request = request
        try:
            yield
        finally:
            self._request = None  # a reader that still waits gives up
            lock.release()

    def _begin(self, request: Request, lock: files.Lock) -> None:
        if not lock.try_acquire():
            raise FeatureError(f"{self.folder}: another run reads from it now; give this run a features.path of its own.")
        earlier = self._earlier_request()
        request.write(self.folder)
        if earlier is None or earlier.identity != request.identity:
            self._remove(spans_present(self.folder))
        elif not self._retain:
            wanted = {span.position for span in request.wanted()}
            self._remove(position for position in spans_present(self.folder) if position not in wanted)

    def take(self, span: Span, numbers: Sequence[int]) -> list[SampleFeatures]:
        """
        Raises:
            FeatureError: no producer makes the span within `wait_s`, or it is damaged again after it was made anew.
        """
        path, patience, damaged = span_path(self.folder, span.position), Patience(self._wait_s, self._world.is_main), False
        while numbers and (request := self._request):
            if not path.exists():
                self._make_room(request)
                patience.pause(f"{path} is not there yet; run `specforge produce` with this run's configuration")
                continue
            try:
                return read_span(self.folder, span, request.identity, numbers, self.lengths)
            except FeatureError as cause:
                if damaged:
                    raise
                print(f"{cause} It is removed, to be made again.", file=sys.stderr, flush=True)
                damaged = True
                path.unlink(missing_ok=True)
        return []

    def release(self, span: Span) -> None:
        """Tell the producers the new position, then make room for them."""
        if self._world.is_main and self._request is not None:
            self._request = dataclasses.replace(self._request, position=span.end)
            self._request.write(self.folder)
            self._make_room(self._request)

    def _make_room(self, request: Request) -> None:
        if self._world.is_main and not self._retain:
            self._remove(position for position in spans_present(self.folder) if position < request.position)

    def _remove(self, positions: Iterable[int]) -> None:
        for position in positions:
            span_path(self.folder, position).unlink(missing_ok=True)
