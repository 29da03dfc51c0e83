"""Attention of training-time test: each row sees its causal step-0 prefix plus one own key of every later step.

The allowed keys of row t at step j are {step-0 keys 0..t of its document} and {its own keys of steps 1..j}. They are
computed block by block from exactly those keys; a mask over T x (j+1)T entries never exists. Weights on at most
`KEPT_KEYS` keys are kept for the backward, those of longer blocks are computed anew, so what is kept grows with the
number of rows and not with the length of a document.

Shapes: R rows, T packed tokens, h query heads of width D, g key heads, p = h / g, J own keys, K keys of a block.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from specforge.layers.documents import QueryBlock
from specforge.layers.shared import GradientSum, Shared

KEPT_KEYS = 512


def prefix_and_own_attention(
    q_RhD: torch.Tensor,
    prefix_T2gD: Shared,
    own_k_RhD: Sequence[Shared],
    own_v_RhD: Sequence[Shared],
    blocks: Sequence[QueryBlock],
    biases: Sequence[torch.Tensor],
) -> torch.Tensor:
    """One softmax over prefix and own keys.

    Args:
        q_RhD: queries, scaled.
        prefix_T2gD: step-0 keys (index 0 of the second dimension) and values (1) of all tokens.
        own_k_RhD, own_v_RhD: keys and values of each later step, at the same rows, repeated for each query head; empty at step 0.
        blocks: how rows and their keys are cut; they cover all rows.
        biases: the `causal_bias` of each block.

    Returns:
        [R, h, D].
    """
    shared = [prefix_T2gD, *own_k_RhD, *own_v_RhD]
    return _PrefixAndOwnAttention.apply(blocks, biases, [each.grad for each in shared], q_RhD, *(each.tensor for each in shared))


def causal_bias(block: QueryBlock, token_R: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """-inf where a key lies after the row, for the keys after the block's first row: [rows, 1, keys]."""
    token_K = torch.arange(block.first_token + 1, block.key_end, device=token_R.device)
    future_R1K = token_K > token_R[block.rows, None, None]
    return torch.zeros_like(future_R1K, dtype=dtype).masked_fill_(future_R1K, float("-inf"))


class _PrefixAndOwnAttention(torch.autograd.Function):
    """For the prefix, the p queries that share a key head are neighbours among N = R * p, so that one product serves them all."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: Sequence[QueryBlock],
        biases: Sequence[torch.Tensor],
        sums: Sequence[GradientSum],
        q_RhD: torch.Tensor,
        prefix_T2gD: torch.Tensor,
        *own: torch.Tensor,
    ) -> torch.Tensor:
        own_k, own_v = own[: len(own) // 2], own[len(own) // 2 :]
        k_gTD, v_gTD = prefix_T2gD.permute(1, 2, 0, 3)
        groups, keep = len(k_gTD), any(ctx.needs_input_grad)
        q_gND, own_scores_gNJ = _by_group(q_RhD, groups), _by_group(_dots(q_RhD, own_k), groups)
        own_weights_gNJ, out_gND = torch.empty_like(own_scores_gNJ), torch.empty_like(q_gND)
        kept: list[torch.Tensor | None] = []
        for block, bias, q, own_scores, own_weights, out in _each_block(blocks, biases, q_gND, own_scores_gNJ, own_weights_gNJ, out_gND):
            weights_gNK, own_weights[:] = _weights(q, k_gTD[:, block.keys], bias, own_scores)
            torch.bmm(weights_gNK, v_gTD[:, block.keys], out=out)
            kept.append(weights_gNK if keep and weights_gNK.shape[2] <= KEPT_KEYS else None)
        own_weights_RhJ, out_RhD = (_by_row(x, len(q_RhD)) for x in (own_weights_gNJ, out_gND))
        for index, v_RhD in enumerate(own_v):
            out_RhD.addcmul_(own_weights_RhJ[..., index, None], v_RhD)
        ctx.save_for_backward(q_RhD, q_gND, prefix_T2gD, own_scores_gNJ, own_weights_RhJ, out_RhD, *own, *biases, *kept)
        ctx.blocks, ctx.sums = blocks, sums
        return out_RhD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_RhD, q_gND, prefix_T2gD, own_scores_gNJ, own_weights_RhJ, out_RhD, *rest = ctx.saved_tensors
        (grad_RhD,), num_own, num_blocks = grads, own_weights_RhJ.shape[2], len(ctx.blocks)
        own_k, own_v = rest[:num_own], rest[num_own : 2 * num_own]
        biases, kept = rest[2 * num_own :][:num_blocks], rest[2 * num_own + num_blocks :]
        k_gTD, v_gTD = prefix_T2gD.permute(1, 2, 0, 3)
        along_Rh1 = (grad_RhD * out_RhD).sum(-1, keepdim=True)
        grad_gND, along_gN1 = (_by_group(x, len(k_gTD)) for x in (grad_RhD, along_Rh1))
        grad_q_gND, (of_prefix, *of_own) = torch.empty_like(q_gND), ctx.sums
        if of_prefix.total is None:
            of_prefix.total = torch.zeros_like(prefix_T2gD)
        grad_k_gTD, grad_v_gTD = of_prefix.total.permute(1, 2, 0, 3)
        each_block = _each_block(ctx.blocks, biases, q_gND, own_scores_gNJ, grad_gND, along_gN1, grad_q_gND)
        for (block, bias, q, own_scores, grad, along, grad_q), weights_gNK in zip(each_block, kept, strict=True):
            k, v = k_gTD[:, block.keys], v_gTD[:, block.keys]
            if weights_gNK is None:
                weights_gNK, _ = _weights(q, k, bias, own_scores)
            grad_v_gTD[:, block.keys].baddbmm_(weights_gNK.mT, grad)
            scores_grad_gNK = torch.bmm(grad, v.mT).sub_(along).mul_(weights_gNK)
            grad_k_gTD[:, block.keys].baddbmm_(scores_grad_gNK.mT, q)
            torch.bmm(scores_grad_gNK, k, out=grad_q)
        grad_q_RhD = _by_row(grad_q_gND, len(q_RhD))
        own_grad_RhJ = _dots(grad_RhD, own_v).sub_(along_Rh1).mul_(own_weights_RhJ)
        for index, k_RhD in enumerate(own_k):
            grad_q_RhD.addcmul_(own_grad_RhJ[..., index, None], k_RhD)
        for index in range(num_own):
            of_own[index].add_scaled(own_grad_RhJ[..., index, None], q_RhD)
            of_own[num_own + index].add_scaled(own_weights_RhJ[..., index, None], grad_RhD)
        return None, None, None, grad_q_RhD, *[None] * len(ctx.sums)


def _by_group(x_RhX: torch.Tensor, groups: int) -> torch.Tensor:
    """[g, N, X], contiguous."""
    return x_RhX.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)


def _by_row(x_gNX: torch.Tensor, num_rows: int) -> torch.Tensor:
    return x_gNX.unflatten(1, (num_rows, -1)).transpose(0, 1).flatten(1, 2)


def _each_block(blocks: Sequence[QueryBlock], biases: Sequence[torch.Tensor], *of_queries_gNX: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """Block, bias, and the block's part [g, n, X] of each tensor."""
    pairs = of_queries_gNX[0].shape[1] // blocks[-1].row_end
    sizes = [pairs * (block.row_end - block.row_start) for block in blocks]
    return zip(blocks, biases, *(x_gNX.split(sizes, 1) for x_gNX in of_queries_gNX), strict=True)


def _dots(x_RhD: torch.Tensor, own_RhD: Sequence[torch.Tensor]) -> torch.Tensor:
    """x . y for each own key or value y: [R, h, J]."""
    products = x_RhD.new_empty(*x_RhD.shape[:2], len(own_RhD))
    for index, y_RhD in enumerate(own_RhD):
        torch.sum(x_RhD * y_RhD, -1, out=products[..., index])
    return products


def _weights(
    q_gND: torch.Tensor, k_gKD: torch.Tensor, bias_R1B: torch.Tensor, own_scores_gNJ: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax of a block's queries: on its keys [g, N, K] and on their own ones [g, N, J]. The bias holds for the last B keys."""
    (num_rows, _, num_border), num_keys = bias_R1B.shape, k_gKD.shape[1]
    scores_gNX = q_gND.new_empty(*q_gND.shape[:2], num_keys + own_scores_gNJ.shape[2])
    torch.bmm(q_gND, k_gKD.mT, out=scores_gNX[..., :num_keys])
    scores_gNX[..., num_keys - num_border : num_keys].unflatten(1, (num_rows, -1)).add_(bias_R1B)
    scores_gNX[..., num_keys:] = own_scores_gNJ
    weights_gNX = scores_gNX.softmax(-1, dtype=torch.promote_types(q_gND.dtype, torch.float32)).to(q_gND.dtype)
    return weights_gNX[..., :num_keys], weights_gNX[..., num_keys:]
