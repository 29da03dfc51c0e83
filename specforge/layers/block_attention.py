"""Attention of block drafts: each block of rows sees the text before its anchor and its own rows.

A block stands at a token of the text, its anchor, and holds B rows at the positions anchor, anchor + 1, ... Row k may attend to
{the context keys of the tokens before the anchor in its document} and {the keys of its own block}; with a sliding window of W
positions to those of them from anchor + k - W + 1 to anchor + k. Anchors are sorted, so that a group of neighbouring blocks looks at one
stretch of context keys, and only that stretch is multiplied. Weights on at most `KEPT_KEYS` keys are kept for the backward.

Shapes: A blocks of B rows, T packed tokens, h query heads of width D, g key heads, p = h / g, K context keys of a group; among
N = A * B * p queries those of a block are neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from specforge.layers.documents import Documents
from specforge.layers.rows import to_device
from specforge.layers.shared import GradientSum, Shared

KEPT_KEYS = 512
GROUP_ROWS = 128


@dataclass(frozen=True)
class BlockGroup:
    """Blocks `start:end` look at the context keys `key_start:key_end`; the bias holds for the last of these."""

    start: int
    end: int
    key_start: int
    key_end: int
    bias_GB1K: torch.Tensor
    """0 or -inf; its second dimension is 1 where all rows of a block see the same."""

    @property
    def keys(self) -> slice:
        return slice(self.key_start, self.key_end)


@dataclass(frozen=True)
class BlockMask:
    """What all blocks of a batch may see, for one kind of layer."""

    groups: list[BlockGroup]
    own_bias_BB: torch.Tensor | None
    """0 or -inf for the keys of the own block; None: every row sees all of them."""

    @classmethod
    def of(
        cls, documents: Documents, anchors_A: np.ndarray, block_size: int, window: int, device: torch.device, dtype: torch.dtype
    ) -> Self:
        """
        Args:
            anchors_A: packed token indices, ascending.
            window: W; 0: layers that see the whole context, and each row its whole block.
        """
        groups = []
        first_A = documents.starts[documents.index_T[anchors_A]]
        size = max(GROUP_ROWS // block_size, 1)
        borders = np.flatnonzero(np.diff(first_A, prepend=-1, append=-1))
        row_B, anchor_A111 = torch.arange(block_size, device=device), to_device(anchors_A, device)[:, None, None, None]
        for begin, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
            for start in range(begin, stop, size):
                end = min(start + size, stop)
                first, last = int(anchors_A[start]), int(anchors_A[end - 1])
                key_start = max(int(first_A[start]), first - window + 1) if window else int(first_A[start])
                token_K = torch.arange(key_start if window else first, last, device=device)
                hidden = token_K >= anchor_A111[start:end]
                if window:
                    hidden = hidden | (token_K <= anchor_A111[start:end] + row_B[:, None, None] - window)
                groups.append(BlockGroup(start, end, key_start, last, _bias(hidden, dtype)))
        if not window:
            return cls(groups, None)
        distance_BB = row_B[:, None] - row_B
        return cls(groups, _bias((distance_BB < 0) | (distance_BB >= window), dtype))


def _bias(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))


def block_attention(q_ABhD: torch.Tensor, own_2ABgD: torch.Tensor, context_T2gD: Shared, mask: BlockMask) -> torch.Tensor:
    """One softmax over context and own keys.

    Args:
        q_ABhD: queries, scaled.
        own_2ABgD: keys (index 0) and values (1) of the block's own rows.
        context_T2gD: keys and values of all tokens.

    Returns:
        [A, B, h, D].
    """
    return _BlockAttention.apply(mask, context_T2gD.grad, q_ABhD, own_2ABgD, context_T2gD.tensor)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mask: BlockMask, of_context: GradientSum, q_ABhD: torch.Tensor, own_2ABgD: torch.Tensor, context_T2gD: torch.Tensor
    ) -> torch.Tensor:
        num_blocks, size = q_ABhD.shape[:2]
        k_gTD, v_gTD = context_T2gD.permute(1, 2, 0, 3)
        own_k_XBD, own_v_XBD = own_2ABgD.permute(0, 3, 1, 2, 4).flatten(1, 2)
        groups, keep = len(k_gTD), any(ctx.needs_input_grad)
        q_gND = _by_group(q_ABhD, groups)
        own_scores_gNB = _own(q_gND, num_blocks) @ own_k_XBD.mT  # X = g * A
        if mask.own_bias_BB is not None:
            own_scores_gNB.unflatten(1, (size, -1)).add_(mask.own_bias_BB[:, None])
        own_scores_gNB = own_scores_gNB.view(groups, -1, size)
        own_weights_gNB, out_gND = torch.empty_like(own_scores_gNB), torch.empty_like(q_gND)
        kept: list[torch.Tensor | None] = []
        for group, q, own_scores, own_weights, out in _each_group(mask, num_blocks, q_gND, own_scores_gNB, own_weights_gNB, out_gND):
            weights_gNK, own_weights[:] = _weights(q, k_gTD[:, group.keys], group.bias_GB1K, own_scores)
            torch.bmm(weights_gNK, v_gTD[:, group.keys], out=out)
            kept.append(weights_gNK if keep and weights_gNK.shape[2] <= KEPT_KEYS else None)
        _own(out_gND, num_blocks).baddbmm_(_own(own_weights_gNB, num_blocks), own_v_XBD)
        out_ABhD = _by_row(out_gND, num_blocks, size)
        ctx.save_for_backward(q_gND, own_2ABgD, context_T2gD, own_scores_gNB, own_weights_gNB, out_gND, *kept)
        ctx.mask, ctx.of_context = mask, of_context
        return out_ABhD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_gND, own_2ABgD, context_T2gD, own_scores_gNB, own_weights_gNB, out_gND, *kept = ctx.saved_tensors
        (grad_ABhD,), (num_blocks, size) = grads, own_2ABgD.shape[1:3]
        k_gTD, v_gTD = context_T2gD.permute(1, 2, 0, 3)
        own_k_XBD, own_v_XBD = own_2ABgD.permute(0, 3, 1, 2, 4).flatten(1, 2)
        grad_gND = _by_group(grad_ABhD, len(k_gTD))
        along_gN1 = (grad_gND * out_gND).sum(-1, keepdim=True)
        grad_q_gND, of_context = torch.empty_like(q_gND), ctx.of_context
        if of_context.total is None:
            of_context.total = torch.zeros_like(context_T2gD)
        grad_k_gTD, grad_v_gTD = of_context.total.permute(1, 2, 0, 3)
        each_group = _each_group(ctx.mask, num_blocks, q_gND, own_scores_gNB, grad_gND, along_gN1, grad_q_gND)
        for (group, q, own_scores, grad, along, grad_q), weights_gNK in zip(each_group, kept, strict=True):
            k, v = k_gTD[:, group.keys], v_gTD[:, group.keys]
            if weights_gNK is None:
                weights_gNK, _ = _weights(q, k, group.bias_GB1K, own_scores)
            grad_v_gTD[:, group.keys].baddbmm_(weights_gNK.mT, grad)
            scores_grad_gNK = torch.bmm(grad, v.mT).sub_(along).mul_(weights_gNK)
            grad_k_gTD[:, group.keys].baddbmm_(scores_grad_gNK.mT, q)
            torch.bmm(scores_grad_gNK, k, out=grad_q)
        grad_XND, own_weights_XNB = _own(grad_gND, num_blocks), _own(own_weights_gNB, num_blocks)
        own_grad_XNB = torch.bmm(grad_XND, own_v_XBD.mT).sub_(_own(along_gN1, num_blocks)).mul_(own_weights_XNB)
        _own(grad_q_gND, num_blocks).baddbmm_(own_grad_XNB, own_k_XBD)
        grad_own_2gABD = torch.stack([own_grad_XNB.mT @ _own(q_gND, num_blocks), own_weights_XNB.mT @ grad_XND])
        grad_own_2ABgD = grad_own_2gABD.unflatten(1, (-1, num_blocks)).permute(0, 2, 3, 1, 4)
        return None, None, _by_row(grad_q_gND, num_blocks, size), grad_own_2ABgD, None


def _by_group(x_ABhD: torch.Tensor, groups: int) -> torch.Tensor:
    """[g, N, D], contiguous: the p queries of a row that share a key head are neighbours."""
    return x_ABhD.unflatten(2, (groups, -1)).permute(2, 0, 1, 3, 4).flatten(1, 3)


def _by_row(x_gND: torch.Tensor, num_blocks: int, size: int) -> torch.Tensor:
    return x_gND.unflatten(1, (num_blocks, size, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _own(x_gNX: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Block by block: [g * A, B * p, X], a view."""
    return x_gNX.view(len(x_gNX) * num_blocks, -1, x_gNX.shape[2])


def _each_group(mask: BlockMask, num_blocks: int, *of_queries_gNX: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """A group, and its part [g, n, X] of each tensor."""
    queries = of_queries_gNX[0].shape[1] // num_blocks
    sizes = [queries * (group.end - group.start) for group in mask.groups]
    return zip(mask.groups, *(x_gNX.split(sizes, 1) for x_gNX in of_queries_gNX), strict=True)


def _weights(
    q_gND: torch.Tensor, k_gKD: torch.Tensor, bias_GB1K: torch.Tensor, own_scores_gNB: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax of a group's queries: on its context keys [g, N, K] and on their own ones [g, N, B]."""
    (num_blocks, rows, _, num_border), num_keys = bias_GB1K.shape, k_gKD.shape[1]
    scores_gNX = q_gND.new_empty(*q_gND.shape[:2], num_keys + own_scores_gNB.shape[2])
    torch.bmm(q_gND, k_gKD.mT, out=scores_gNX[..., :num_keys])
    scores_gNX[..., num_keys - num_border : num_keys].unflatten(1, (num_blocks, rows, -1)).add_(bias_GB1K)
    scores_gNX[..., num_keys:] = own_scores_gNB
    wide = torch.promote_types(q_gND.dtype, torch.float32)
    weights_gNX = torch.softmax(scores_gNX, -1, wide, out=scores_gNX if q_gND.dtype == wide else None).to(q_gND.dtype)
    return weights_gNX[..., :num_keys], weights_gNX[..., num_keys:]
