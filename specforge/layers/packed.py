"""Packed documents on a device: where each token belongs, and how its rows move when documents are merged, split, permuted or filtered.

Lengths are known on the host, so the device is told and never asked: no shape and no branch waits for it.

Shapes: N documents, some of which may be empty, T packed tokens, R rows of the tokens that a new layout takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Self

import numpy as np
import torch

from specforge.layers.documents import Documents
from specforge.layers.rows import to_device


@dataclass(frozen=True)
class PackedLayout:
    """`Documents`, which the host knows, and what the device derives from them, each once. Layers of one batch share one layout."""

    documents: Documents
    device: torch.device

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """First token of each document, and T at the end: int32 [N + 1]."""
        return to_device(self.documents.starts.astype(np.int32), self.device)

    @cached_property
    def document_T(self) -> torch.Tensor:
        """Document of each token: int64 [T]. A token's document is the number of documents that end before it."""
        begins = self.cu_seqlens[1:].long()
        counts = torch.zeros(self.documents.num_tokens + 1, dtype=torch.int64, device=self.device)
        return counts.scatter_add_(0, begins, torch.ones_like(begins))[:-1].cumsum(0)

    @cached_property
    def position_T(self) -> torch.Tensor:
        """Position of each token within its document: int64 [T]."""
        return torch.arange(self.documents.num_tokens, device=self.device) - self.cu_seqlens[self.document_T]

    def permute(self, order: Sequence[int]) -> tuple[Self, torch.Tensor]:
        """The documents in this order, all of them.

        Returns:
            The new layout, and for each of its rows the row here, int64 [R]: `take_rows(x, index_R)` are the documents' rows.
        """
        return self._take(order)

    def filter(self, keep: Sequence[bool]) -> tuple[Self, torch.Tensor]:
        """The documents whose entry of `keep` is true, as `permute` returns them."""
        return self._take(np.arange(len(self.documents.lengths))[np.array(keep, dtype=bool)].tolist())

    def split(self, counts: Sequence[int]) -> list[tuple[Self, torch.Tensor]]:
        """The first `counts[0]` documents, the next `counts[1]`, and so on, each part as `permute` returns it."""
        return [self._take(range(begin, end)) for begin, end in pairwise(accumulate(counts, initial=0))]

    @classmethod
    def merge(cls, layouts: Sequence[Self]) -> tuple[Self, torch.Tensor]:
        """The documents of all layouts, which lie on one device; the index is into their rows end to end, whose order stays."""
        lengths = (length for layout in layouts for length in layout.documents.lengths)
        merged = cls(Documents(tuple(lengths)), layouts[0].device)
        return merged, torch.arange(merged.documents.num_tokens, device=merged.device)

    def _take(self, numbers: Sequence[int]) -> tuple[Self, torch.Tensor]:
        lengths, starts = self.documents.lengths, self.documents.starts
        taken = type(self)(Documents(tuple(lengths[number] for number in numbers)), self.device)
        shift = to_device(starts[list(numbers)] - taken.documents.starts[:-1], self.device)
        return taken, torch.arange(taken.documents.num_tokens, device=self.device) + shift[taken.document_T]
