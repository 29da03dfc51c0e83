"""The other side of a shared folder: makes the spans that a trainer asks for, and no more than it allows."""

from collections.abc import Callable, Sequence
from pathlib import Path

from specforge import files
from specforge.features.capture import capture_samples, check_kind, samples_sha256
from specforge.features.patience import Patience
from specforge.features.request import Request
from specforge.features.span import Span
from specforge.features.span_file import span_path, spans_present, sweep_partial, write_span
from specforge.features.store import FeatureMeta, Sample
from specforge.features.target import Target


class Producer:
    """Any number of producers may serve one folder; a span is made by the one that holds its claim.

    The kernel lets go of the claim of a process that dies, so another one makes the span and sweeps what was half written.

    Raises:
        FeatureError: the trainer asks for features of another kind, or nothing happens for `wait_s`.
    """

    def __init__(
        self, folder: Path, samples: Sequence[Sample], meta: FeatureMeta, load_target: Callable[[], Target], *, wait_s: float
    ) -> None:
        self.folder = folder
        self._samples = samples
        self._meta = meta
        self._load_target = load_target
        self._wait_s = wait_s
        self._samples_sha256 = samples_sha256(samples)

    def run(self) -> int:
        """Serve until the trainer has read its last span; returns how many spans this process made.

        A training that had ended before this producer came is not the one it came for: it waits for the next.
        """
        patience = Patience(self._wait_s)
        while (request := self._request()) is None or request.is_done:
            patience.pause(f"no training reads from {self.folder}; start one, or end this producer")
        made, position = 0, -1
        while request is not None and not request.is_done:
            if request.position != position:
                position = request.position
                patience.renew()
            if self.make_one(request):
                made += 1
                patience.renew()
            else:
                patience.pause(f"the training that reads from {self.folder} does not go on; start it again, or end this producer")
            request = self._request()
        return made

    def _request(self) -> Request | None:
        request = Request.read(self.folder)
        if request is not None:
            request.expect(self.folder, self._meta, self._samples_sha256)
        return request

    def make_one(self, request: Request) -> bool:
        """Make the first span that is wanted, missing and not claimed; False where there is none."""
        present = spans_present(self.folder)
        if not request.retain and present and present[0] < request.position:
            return False  # the trainer is about to make room
        for span in request.wanted():
            if span.samples and span.position not in present:
                claim = files.Lock(self.folder / f"claim-{span.position:012d}.lock")
                if claim.try_acquire():
                    try:
                        if self._is_missing(span, request):
                            self._make(span, request)
                            return True
                    finally:
                        claim.release()
        return False

    def _is_missing(self, span: Span, request: Request) -> bool:
        """Asked again under the claim: meanwhile another producer may have made it, and the trainer even read it."""
        now = self._request()
        if now is None or now.identity != request.identity or span not in now.wanted():
            return False
        return not span_path(self.folder, span.position).exists()

    def _make(self, span: Span, request: Request) -> None:
        sweep_partial(self.folder, span.position)
        target = self._load_target()
        check_kind(target, self._meta)
        captured = capture_samples(target, self._samples, span.samples, request.capture_tokens, self._meta)
        if self._is_missing(span, request):
            write_span(self.folder, span, request.identity, captured)
