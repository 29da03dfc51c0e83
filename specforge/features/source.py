"""What a training asks of its features, wherever they come from: this disk, the target itself, or other processes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch

from specforge.features.span import Span, Spans
from specforge.features.store import FeatureMeta, Sample, SampleFeatures, require_unique


class SpanStore(Protocol):
    """Numbered samples, taken span by span: what a loader asks. Everything but `take` is known without reading a sample."""

    meta: Any
    """What the samples have in common, and an empty batch has too."""
    ids: list[str]
    lengths: np.ndarray
    """int64 [samples], in tokens."""

    def __len__(self) -> int: ...

    def reading(self, spans: Spans, position: int) -> AbstractContextManager[None]:
        """While entered, by all ranks together, the spans from `position` on are taken and released in their order."""
        ...

    def take(self, span: Span, numbers: Sequence[int]) -> Sequence[Any]:
        """Some samples of `span`, this rank's. Waits where another process makes them."""
        ...

    def release(self, span: Span) -> None:
        """All ranks have taken what they want of `span`."""
        ...


class FeatureStore(SpanStore, Protocol):
    """Features of numbered samples."""

    meta: FeatureMeta
    domains: list[str]
    supervised: np.ndarray
    """int64 [samples], supervised tokens."""

    @property
    def aux_layer_ids(self) -> tuple[int, ...]: ...

    def tokens(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids [S] int32 and loss_mask [S] bool."""
        ...

    def supervised_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token id is supervised, int64 [vocab_size]."""
        ...

    def take(self, span: Span, numbers: Sequence[int]) -> list[SampleFeatures]: ...


class EncodedSamples:
    """What is known of samples once they are encoded, and no target was asked."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.ids = [sample.id for sample in samples]
        require_unique(self.ids)
        self.domains = [sample.domain for sample in samples]
        self.lengths = np.array([len(sample.input_ids) for sample in samples], dtype=np.int64)
        self.supervised = np.array([int(sample.loss_mask.sum()) for sample in samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample = self.samples[number]
        return torch.tensor(sample.input_ids, dtype=torch.int32), torch.tensor(sample.loss_mask, dtype=torch.bool)

    def supervised_counts(self, vocab_size: int) -> np.ndarray:
        counts = np.zeros(vocab_size, dtype=np.int64)
        for sample in self.samples:
            counts += np.bincount(sample.input_ids[sample.loss_mask], minlength=vocab_size)
        return counts


class EncodedStore(EncodedSamples):
    """The part of a store that follows from the encoded samples alone."""

    def __init__(self, samples: Sequence[Sample], meta: FeatureMeta) -> None:
        super().__init__(samples)
        self.meta = meta

    @property
    def aux_layer_ids(self) -> tuple[int, ...]:
        return self.meta.aux_layer_ids

    def reading(self, spans: Spans, position: int) -> AbstractContextManager[None]:
        return nullcontext()

    def release(self, span: Span) -> None:
        """Nothing outlives `take`."""
