"""What a method is given: the features of some samples, packed end to end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from specforge.features.store import TENSORS, FeatureMeta, LocalFeatureStore, SampleFeatures
from specforge.layers.documents import Documents


@dataclass(frozen=True)
class DraftBatch:
    """T packed tokens of one or more samples; documents never see each other.

    Shapes: input_ids [T] int32, loss_mask [T] bool, aux [T, A*H], last [T, H] (after the target's final norm),
    argmax [T] int32 and logsumexp [T] float32 of the target's logits at each token.
    """

    samples: tuple[int, ...]
    """Numbers of the samples in their store, in the order of the documents."""
    ids: tuple[str, ...]
    """Their ids, for messages."""
    documents: Documents
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    aux: torch.Tensor
    last: torch.Tensor
    argmax: torch.Tensor
    logsumexp: torch.Tensor
    top_ids: torch.Tensor
    top_log_probs: torch.Tensor
    """Of a compressed teacher [T, k]; empty where `last` teaches."""

    @classmethod
    def read(cls, store: LocalFeatureStore, samples: Sequence[int]) -> "DraftBatch":
        """The samples of these numbers."""
        return cls.pack(samples, [store.read(number) for number in samples], [store.ids[number] for number in samples])

    @classmethod
    def pack(cls, samples: Sequence[int], features: Sequence[SampleFeatures], ids: Sequence[str] = ()) -> "DraftBatch":
        def joined(name: str) -> torch.Tensor:
            return torch.cat([getattr(sample, name) for sample in features])

        documents = Documents(tuple(len(sample.input_ids) for sample in features))
        return cls(
            tuple(samples), tuple(ids), documents, joined("input_ids"), joined("loss_mask").bool(),
            joined("aux"), joined("last"), joined("argmax"), joined("logsumexp"), joined("top_ids"), joined("top_log_probs"),
        )  # fmt: skip

    @classmethod
    def empty(cls, meta: FeatureMeta) -> "DraftBatch":
        """A batch that weighs nothing: three tokens, none supervised. It keeps a rank without samples in step."""
        ids, dtype = torch.zeros(3, dtype=torch.int32), getattr(torch, meta.dtype)
        aux, last = (torch.zeros(3, layers * meta.hidden_size, dtype=dtype) for layers in (len(meta.aux_layer_ids), 1))
        return cls.pack([], [SampleFeatures(ids, torch.zeros(3, dtype=torch.bool), aux, last, ids.clone(), torch.zeros(3))])

    def to(self, device: torch.device) -> "DraftBatch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "DraftBatch":
        """In page-locked memory, from which a GPU copies while the host goes on."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], Any]) -> "DraftBatch":
        return replace(self, **{name: change(getattr(self, name)) for name in TENSORS})
