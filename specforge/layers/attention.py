"""Attention of training-time test: each row sees its causal step-0 prefix plus one own key of every later step.

The allowed keys of row t at step j are {step-0 keys 0..t of its document} and {its own keys of steps 1..j}. They are
computed block by block from exactly those keys; a mask over T x (j+1)T entries never exists. Weights on at most
`KEPT_KEYS` keys are kept for the backward, those of longer blocks are computed anew, so what is kept grows with the
number of rows and not with the length of a document.

Shapes: R rows, T packed tokens, h query heads of width D, g key heads, p = h / g, J own keys, K keys of a block.
"""

from collections.abc import Sequence
from typing import Any

import torch

from specforge.layers.documents import QueryBlock

KEPT_KEYS = 512


def prefix_and_own_attention(
    q_RhD: torch.Tensor,
    prefix_T2gD: torch.Tensor,
    own_k_RhD: Sequence[torch.Tensor],
    own_v_RhD: Sequence[torch.Tensor],
    blocks: Sequence[QueryBlock],
    biases: Sequence[torch.Tensor],
) -> torch.Tensor:
    """One softmax over prefix and own keys.

    Args:
        q_RhD: queries.
        prefix_T2gD: step-0 keys (index 0 of the second dimension) and values (1) of all tokens.
        own_k_RhD, own_v_RhD: keys and values of each later step, at the same rows, repeated for each query head; empty at step 0.
        blocks: how rows and their keys are cut; they cover all rows.
        biases: the `causal_bias` of each block.

    Returns:
        [R, h, D].
    """
    return _PrefixAndOwnAttention.apply(blocks, biases, q_RhD, prefix_T2gD, *own_k_RhD, *own_v_RhD)


def causal_bias(block: QueryBlock, token_R: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """-inf where a key lies after the row, for the keys after the block's first row: [rows, 1, keys]."""
    token_K = torch.arange(block.first_token + 1, block.key_end, device=token_R.device)
    future_R1K = token_K > token_R[block.rows, None, None]
    return torch.zeros_like(future_R1K, dtype=dtype).masked_fill_(future_R1K, float("-inf"))


class _PrefixAndOwnAttention(torch.autograd.Function):
    """For the prefix, the p queries that share a key head are neighbours, [g, R, p, D], so that one product serves them all."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: Sequence[QueryBlock],
        biases: Sequence[torch.Tensor],
        q_RhD: torch.Tensor,
        prefix_T2gD: torch.Tensor,
        *own: torch.Tensor,
    ) -> torch.Tensor:
        own_k, own_v = own[: len(own) // 2], own[len(own) // 2 :]
        k_gTD, v_gTD = prefix_T2gD.permute(1, 2, 0, 3)
        groups, keep = len(k_gTD), any(ctx.needs_input_grad)
        q_RhD = q_RhD * q_RhD.shape[2] ** -0.5
        q_gRpD, own_scores_gRpJ = _by_group(q_RhD, groups), _by_group(_dots(q_RhD, own_k), groups)
        own_weights_gRpJ, out_gRpD = torch.empty_like(own_scores_gRpJ), torch.empty_like(q_gRpD)
        kept: list[torch.Tensor | None] = []
        for block, bias in zip(blocks, biases, strict=True):
            weights = _weights(block, bias, q_gRpD, k_gTD, own_scores_gRpJ)
            prefix_gNK, own_weights_gRpJ[:, block.rows] = weights
            torch.bmm(prefix_gNK, v_gTD[:, block.keys], out=out_gRpD[:, block.rows].flatten(1, 2))
            kept.append(prefix_gNK if keep and block.key_end - block.key_start <= KEPT_KEYS else None)
        own_weights_RhJ, out_RhD = _by_row(own_weights_gRpJ), _by_row(out_gRpD)
        for index, v_RhD in enumerate(own_v):
            out_RhD.addcmul_(own_weights_RhJ[..., index, None], v_RhD)
        ctx.save_for_backward(q_RhD, prefix_T2gD, own_scores_gRpJ, own_weights_RhJ, out_RhD, *own, *biases, *kept)
        ctx.blocks = blocks
        return out_RhD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_RhD, prefix_T2gD, own_scores_gRpJ, own_weights_RhJ, out_RhD, *rest = ctx.saved_tensors
        (grad_RhD,), num_own, num_blocks = grads, own_weights_RhJ.shape[2], len(ctx.blocks)
        own_k, own_v = rest[:num_own], rest[num_own : 2 * num_own]
        biases, kept = rest[2 * num_own :][:num_blocks], rest[2 * num_own + num_blocks :]
        k_gTD, v_gTD = prefix_T2gD.permute(1, 2, 0, 3)
        along_Rh1 = (grad_RhD * out_RhD).sum(-1, keepdim=True)
        q_gRpD, grad_gRpD, along_gRp1 = (_by_group(x, len(k_gTD)) for x in (q_RhD, grad_RhD, along_Rh1))
        grad_q_gRpD, grad_prefix_T2gD = torch.empty_like(q_gRpD), torch.zeros_like(prefix_T2gD)
        grad_k_gTD, grad_v_gTD = grad_prefix_T2gD.permute(1, 2, 0, 3)
        for block, bias, prefix_gNK in zip(ctx.blocks, biases, kept, strict=True):
            rows, keys = block.rows, block.keys
            if prefix_gNK is None:
                prefix_gNK, _ = _weights(block, bias, q_gRpD, k_gTD, own_scores_gRpJ)
            q_gND, grad_gND, along_gN1 = (x[:, rows].flatten(1, 2) for x in (q_gRpD, grad_gRpD, along_gRp1))
            grad_v_gTD[:, keys].baddbmm_(prefix_gNK.mT, grad_gND)
            scores_grad_gNK = torch.bmm(grad_gND, v_gTD[:, keys].mT).sub_(along_gN1).mul_(prefix_gNK)
            grad_k_gTD[:, keys].baddbmm_(scores_grad_gNK.mT, q_gND)
            torch.bmm(scores_grad_gNK, k_gTD[:, keys], out=grad_q_gRpD[:, rows].flatten(1, 2))
        grad_q_RhD = _by_row(grad_q_gRpD)
        own_grad_RhJ = _dots(grad_RhD, own_v).sub_(along_Rh1).mul_(own_weights_RhJ)
        for index, k_RhD in enumerate(own_k):
            grad_q_RhD.addcmul_(own_grad_RhJ[..., index, None], k_RhD)
        grad_own = [
            weight_RhJ[..., index, None] * x
            for weight_RhJ, x in ((own_grad_RhJ, q_RhD), (own_weights_RhJ, grad_RhD))
            for index in range(num_own)
        ]
        return None, None, grad_q_RhD.mul_(q_RhD.shape[2] ** -0.5), grad_prefix_T2gD, *grad_own


def _by_group(x_RhD: torch.Tensor, groups: int) -> torch.Tensor:
    return x_RhD.unflatten(1, (groups, -1)).transpose(0, 1).contiguous()


def _by_row(x_gRpD: torch.Tensor) -> torch.Tensor:
    return x_gRpD.transpose(0, 1).flatten(1, 2).contiguous()


def _dots(x_RhD: torch.Tensor, own_RhD: Sequence[torch.Tensor]) -> torch.Tensor:
    """x . y for each own key or value y: [R, h, J]."""
    products = x_RhD.new_empty(*x_RhD.shape[:2], len(own_RhD))
    for index, y_RhD in enumerate(own_RhD):
        torch.sum(x_RhD * y_RhD, -1, out=products[..., index])
    return products


def _weights(
    block: QueryBlock, bias_R1K: torch.Tensor, q_gRpD: torch.Tensor, k_gTD: torch.Tensor, own_scores_gRpJ: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax of a block's N = rows * p queries: on its K prefix keys [g, N, K] and on their own ones [g, rows, p, J]."""
    num_keys, by_row = block.key_end - block.key_start, (-1, q_gRpD.shape[2])
    q_gND, own_scores_gNJ = (x[:, block.rows].flatten(1, 2) for x in (q_gRpD, own_scores_gRpJ))
    scores_gNX = q_gND.new_empty(*q_gND.shape[:2], num_keys + own_scores_gNJ.shape[2])
    torch.bmm(q_gND, k_gTD[:, block.keys].mT, out=scores_gNX[..., :num_keys])
    scores_gNX[..., num_keys - bias_R1K.shape[2] : num_keys].unflatten(1, by_row).add_(bias_R1K)
    scores_gNX[..., num_keys:] = own_scores_gNJ
    weights_gNX = scores_gNX.softmax(-1, dtype=torch.promote_types(q_gRpD.dtype, torch.float32)).to(q_gRpD.dtype)
    return weights_gNX[..., :num_keys], weights_gNX[..., num_keys:].unflatten(1, by_row)
