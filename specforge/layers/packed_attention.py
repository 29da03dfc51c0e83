"""Causal attention within each document of a packed layout, in six ways that give the same numbers.

A way is prepared once a batch and called by every layer; what it needs of the layout, it makes when it is prepared.

Shapes: T packed tokens, N documents of a bucket, L tokens of its longest, h query heads of width D, g key heads.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from specforge.layers.flex import BLOCK, block_mask, flex_prefix_attention
from specforge.layers.packed import PackedLayout
from specforge.layers.rows import take_rows, to_device


class PackedAttention(ABC):
    """Row t sees the rows of its own document up to t."""

    @abstractmethod
    def __call__(self, q_ThD: torch.Tensor, k_TgD: torch.Tensor, v_TgD: torch.Tensor) -> torch.Tensor:
        """[T, h, D], of scaled queries. Each head of keys and values serves h / g neighbouring query heads."""

    @property
    @abstractmethod
    def area(self) -> int:
        """Entries of the score matrices of one head; of a kernel that knows causality the half above the diagonal too."""


class Loop(PackedAttention):
    """One document after the other; also where there is no token at all."""

    def __init__(self, layout: PackedLayout) -> None:
        self._lengths = [length for length in layout.documents.lengths if length]

    def __call__(self, q_ThD: torch.Tensor, k_TgD: torch.Tensor, v_TgD: torch.Tensor) -> torch.Tensor:
        if not self._lengths:  # no rows, but a gradient for each input: other ranks, which have rows, wait for all of them
            return q_ThD + sum(x_TgD.repeat_interleave(q_ThD.shape[1] // x_TgD.shape[1], 1) for x_TgD in (k_TgD, v_TgD))
        each_document = zip(*(x[None].split(self._lengths, 1) for x in (q_ThD, k_TgD, v_TgD)), strict=True)
        return torch.cat([_causal(*qkv) for qkv in each_document], 1)[0]

    @property
    def area(self) -> int:
        return sum(length**2 for length in self._lengths)


class Padded(PackedAttention):
    """Documents side by side, padded on the right to their bucket's longest. No row sees the padding, which lies after it."""

    def __init__(self, layout: PackedLayout, buckets: Sequence[Sequence[int]]) -> None:
        lengths = np.array(layout.documents.lengths)
        self._shapes = [(len(bucket), int(lengths[list(bucket)].max())) for bucket in buckets]
        first_slot, slots = np.zeros(len(lengths), dtype=np.int64), 0
        for bucket, (count, longest) in zip(buckets, self._shapes, strict=True):
            first_slot[list(bucket)] = slots + longest * np.arange(count)
            slots += count * longest
        self._num_slots = slots
        self._slot_T = to_device(first_slot, layout.device)[layout.document_T] + layout.position_T

    def __call__(self, q_ThD: torch.Tensor, k_TgD: torch.Tensor, v_TgD: torch.Tensor) -> torch.Tensor:
        each_bucket = zip(*(self._padded(x) for x in (q_ThD, k_TgD, v_TgD)), strict=True)
        return take_rows(torch.cat([_causal(*qkv).flatten(0, 1) for qkv in each_bucket]), self._slot_T)

    def _padded(self, x_TgD: torch.Tensor) -> list[torch.Tensor]:
        """[N, L, g, D] of each bucket."""
        slots = x_TgD.new_zeros(self._num_slots, *x_TgD.shape[1:]).index_copy(0, self._slot_T, x_TgD)
        parts = slots.split([count * longest for count, longest in self._shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self._shapes, strict=True)]

    @property
    def area(self) -> int:
        return sum(count * longest**2 for count, longest in self._shapes)


class DenseMask(PackedAttention):
    """A mask over all pairs of tokens: the slow reference."""

    def __init__(self, layout: PackedLayout) -> None:
        document_T, token_T = layout.document_T, torch.arange(layout.documents.num_tokens, device=layout.device)
        self._seen_TT = (document_T[:, None] == document_T) & (token_T[:, None] >= token_T)

    def __call__(self, q_ThD: torch.Tensor, k_TgD: torch.Tensor, v_TgD: torch.Tensor) -> torch.Tensor:
        q_1hTD, k_1gTD, v_1gTD = (x.transpose(0, 1)[None] for x in (q_ThD, k_TgD, v_TgD))
        grouped = q_ThD.shape[1] != k_TgD.shape[1]
        out_1hTD = F.scaled_dot_product_attention(q_1hTD, k_1gTD, v_1gTD, attn_mask=self._seen_TT, scale=1.0, enable_gqa=grouped)
        return out_1hTD[0].transpose(0, 1)

    @property
    def area(self) -> int:
        return self._seen_TT.numel()


class BlockSparse(PackedAttention):
    """One compiled kernel, which visits the blocks of keys that some row of a block sees."""

    def __init__(self, layout: PackedLayout) -> None:
        self._mask = block_mask(layout.documents, np.arange(layout.documents.num_tokens), layout.device)

    def __call__(self, q_ThD: torch.Tensor, k_TgD: torch.Tensor, v_TgD: torch.Tensor) -> torch.Tensor:
        return flex_prefix_attention(q_ThD, k_TgD, v_TgD, self._mask)[0]

    @property
    def area(self) -> int:
        whole = self._mask.full_kv_num_blocks
        return BLOCK**2 * int(self._mask.kv_num_blocks.sum() + (0 if whole is None else whole.sum()))


class VariableLength(PackedAttention):
    """FlashAttention's kernel for packed documents."""

    def __init__(self, layout: PackedLayout) -> None:
        self._documents, self._starts = layout.documents, layout.cu_seqlens

    def __call__(self, q_ThD: torch.Tensor, k_TgD: torch.Tensor, v_TgD: torch.Tensor) -> torch.Tensor:
        # torch 2.11 has no `enable_gqa` here, so the key heads are repeated.
        k_ThD, v_ThD = (x.repeat_interleave(q_ThD.shape[1] // x.shape[1], 1) for x in (k_TgD, v_TgD))
        longest = self._documents.longest
        out_ThD = varlen_attn(q_ThD, k_ThD, v_ThD, self._starts, self._starts, longest, longest, scale=1.0, window_size=(-1, 0))
        assert isinstance(out_ThD, torch.Tensor)  # and no pair with what `return_aux` asks for
        return out_ThD

    @property
    def area(self) -> int:
        return sum(length**2 for length in self._documents.lengths)


IMPLEMENTATIONS: dict[str, Callable[[PackedLayout], PackedAttention]] = {
    "loop": Loop,
    "padded": lambda layout: Padded(layout, [range(len(layout.documents.lengths))]),
    "bucket": lambda layout: Padded(layout, layout.documents.buckets),
    "sdpa": DenseMask,
    "flex": BlockSparse,
    "varlen": VariableLength,
}


def prepare(name: str, layout: PackedLayout) -> PackedAttention:
    """The implementation of this name, which the layout's device must have (`attention_choice.resolve`)."""
    return IMPLEMENTATIONS[name if layout.documents.num_tokens else "loop"](layout)


def _causal(q_NLhD: torch.Tensor, k_NLgD: torch.Tensor, v_NLgD: torch.Tensor) -> torch.Tensor:
    """[N, L, h, D]."""
    q_NhLD, k_NgLD, v_NgLD = (x.transpose(1, 2) for x in (q_NLhD, k_NLgD, v_NLgD))
    grouped = q_NLhD.shape[2] != k_NLgD.shape[2]
    return F.scaled_dot_product_attention(q_NhLD, k_NgLD, v_NgLD, is_causal=True, scale=1.0, enable_gqa=grouped).transpose(1, 2)
