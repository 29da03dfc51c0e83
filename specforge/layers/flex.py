"""The same attention on a GPU: one compiled block-sparse kernel for the prefix, own keys merged by log-sum-exp.

Which blocks of keys a block of rows sees is worked out on the host from the documents, so nothing is read back.
Shapes: R rows, T packed tokens, h query heads of width D, g key heads, J own keys, B blocks of rows, C blocks of keys.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from specforge.errors import ConfigError
from specforge.layers.documents import Documents
from specforge.layers.rows import to_device

BLOCK = 128


def block_mask(documents: Documents, rows_R: np.ndarray, device: torch.device) -> BlockMask:
    """Rows (ascending packed token indices) see the tokens of their own document up to their own."""
    opening_R = documents.starts[documents.index_T[rows_R]]
    first_B = np.arange(0, len(rows_R), BLOCK)
    last_B = np.append(first_B[1:], len(rows_R)) - 1
    begin_C = np.arange(0, documents.num_tokens, BLOCK)[None]
    end_C = begin_C + BLOCK
    some_BC = (begin_C <= rows_R[last_B, None]) & (end_C > opening_R[first_B, None])
    one_document_B1 = (opening_R[first_B] == opening_R[last_B])[:, None]
    whole_BC = one_document_B1 & (begin_C >= opening_R[first_B, None]) & (end_C <= rows_R[first_B, None] + 1)
    token_R, opening = to_device(rows_R, device), to_device(opening_R, device)

    def visible(batch: Any, head: Any, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= token_R[row]) & (key >= opening[row])

    counts, indices = _listed(some_BC & ~whole_BC, device)
    whole_counts, whole_indices = _listed(whole_BC, device)
    return BlockMask.from_kv_blocks(
        counts, indices, whole_counts, whole_indices,
        BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(len(rows_R), documents.num_tokens),
    )  # fmt: skip


def _listed(which_BC: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of keys each block of rows sees, [1, 1, B], and which, these first, [1, 1, B, C]: int32."""
    order_BC = np.argsort(~which_BC, axis=1, kind="stable").astype(np.int32)
    return to_device(which_BC.sum(1).astype(np.int32)[None, None], device), to_device(order_BC[None, None], device)


def flex_prefix_and_own_attention(
    q_RhD: torch.Tensor,
    prefix_T2gD: torch.Tensor,
    own_k_RhD: Sequence[torch.Tensor],
    own_v_RhD: Sequence[torch.Tensor],
    mask: BlockMask,
) -> torch.Tensor:
    """One softmax over prefix and own keys, [R, h, D]; arguments as in `attention.prefix_and_own_attention`.

    Raises:
        ConfigError: a gradient is wanted on a device other than CUDA.
    """
    if not q_RhD.is_cuda and q_RhD.requires_grad:
        raise ConfigError("method.options.attention='flex': PyTorch has no gradient for it outside of CUDA; use attention=blocks.")
    k_TgD, v_TgD = prefix_T2gD.unbind(1)
    out_RhD, lse_Rh = flex_prefix_attention(q_RhD, k_TgD, v_TgD, mask)
    if not own_k_RhD:
        return out_RhD
    scores_RhJ = torch.stack([(q_RhD * k_RhD).sum(-1) for k_RhD in own_k_RhD], -1).to(lse_Rh.dtype)
    total_Rh1 = torch.logaddexp(lse_Rh, scores_RhJ.logsumexp(-1))[..., None]
    out_RhD = out_RhD * (lse_Rh[..., None] - total_Rh1).exp().to(q_RhD.dtype)
    weights_RhJ = (scores_RhJ - total_Rh1).exp().to(q_RhD.dtype)
    for index, v_RhD in enumerate(own_v_RhD):
        out_RhD = torch.addcmul(out_RhD, weights_RhJ[..., index, None], v_RhD)
    return out_RhD


def flex_prefix_attention(
    q_RhD: torch.Tensor, k_TgD: torch.Tensor, v_TgD: torch.Tensor, mask: BlockMask
) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax of scaled queries over the keys that `mask` shows them, [R, h, D], and the logarithm of its denominator, [R, h]."""
    q_1hRD, k_1gTD, v_1gTD = (x.transpose(0, 1)[None] for x in (q_RhD, k_TgD, v_TgD))
    kernel = _compiled() if q_RhD.is_cuda else flex_attention
    out, aux = kernel(q_1hRD, k_1gTD, v_1gTD, block_mask=mask, scale=1.0, enable_gqa=True, return_aux=AuxRequest(lse=True))
    return out[0].transpose(0, 1), aux.lse[0].T


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
