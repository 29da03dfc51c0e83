"""Features straight from the target, in the training process: nothing is stored."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from specforge.features.capture import capture_samples, check_kind
from specforge.features.source import EncodedStore
from specforge.features.span import Span, Spans
from specforge.features.store import FeatureMeta, Sample, SampleFeatures
from specforge.features.target import Target


class OnlineFeatureStore(EncodedStore):
    """Runs the target when samples are taken, which the loader does ahead of the step that uses them.

    Each rank holds the target and computes its own samples, at most `capture_tokens` tokens in a forward.
    """

    def __init__(self, samples: Sequence[Sample], meta: FeatureMeta, load_target: Callable[[], Target], capture_tokens: int) -> None:
        super().__init__(samples, meta)
        self._load_target = load_target
        self._capture_tokens = capture_tokens
        self._stream: torch.cuda.Stream | None = None

    def reading(self, spans: Spans, position: int) -> AbstractContextManager[None]:
        target = self._load_target()
        check_kind(target, self.meta)
        if target.device.type == "cuda":
            self._stream = torch.cuda.Stream(target.device)
            self._stream.wait_stream(torch.cuda.current_stream(target.device))
        return nullcontext()

    def take(self, span: Span, numbers: Sequence[int]) -> list[SampleFeatures]:
        """On CUDA in a stream of its own, so that the training's kernels need not wait for the target's."""
        with torch.cuda.stream(self._stream):
            captured = capture_samples(self._load_target(), self.samples, numbers, self._capture_tokens, self.meta)
        return [captured[number] for number in numbers]
