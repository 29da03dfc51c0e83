"""Attention of training-time test: each row sees its causal step-0 prefix plus one own key of every later step.

The allowed keys of row t at step j are {step-0 keys 0..t of its document} and {its own keys of steps 1..j}. They are
computed block by block from exactly those keys; a mask over T x (j+1)T entries never exists.
"""

from collections.abc import Sequence

import torch

from specforge.layers.documents import QueryBlock


def prefix_and_own_attention(
    q_RhD: torch.Tensor,
    prefix_k_TgD: torch.Tensor,
    prefix_v_TgD: torch.Tensor,
    own_k_RJgD: torch.Tensor | None,
    own_v_RJgD: torch.Tensor | None,
    row_index_R: torch.Tensor,
    blocks: Sequence[QueryBlock],
) -> torch.Tensor:
    """One softmax over prefix and own keys.

    Args:
        q_RhD: queries of R rows, h heads of width D.
        prefix_k_TgD, prefix_v_TgD: step-0 keys and values of all T tokens, g key heads (h is a multiple of g).
        own_k_RJgD, own_v_RJgD: keys and values of the J later steps, at the same rows; None at step 0.
        row_index_R: packed token index of each row, ascending.
        blocks: how rows and their keys are cut; they cover all rows.

    Returns:
        [R, h, D].
    """
    heads, groups = q_RhD.shape[1], prefix_k_TgD.shape[1]
    scale = q_RhD.shape[2] ** -0.5
    outputs = []
    for block in blocks:
        rows, keys = slice(block.row_start, block.row_end), slice(block.key_start, block.key_end)
        num_rows = block.row_end - block.row_start
        q_gpRD = (q_RhD[rows] * scale).unflatten(1, (groups, heads // groups)).permute(1, 2, 0, 3)
        k_gKD, v_gKD = prefix_k_TgD[keys].transpose(0, 1), prefix_v_TgD[keys].transpose(0, 1)
        future_RK = torch.arange(block.key_start, block.key_end, device=q_RhD.device) > row_index_R[rows, None]
        scores = (q_gpRD.flatten(1, 2) @ k_gKD.mT).unflatten(1, (heads // groups, num_rows)).masked_fill(future_RK, float("-inf"))
        if own_k_RJgD is not None and own_v_RJgD is not None:
            own_k_gRDJ, own_v_gRJD = own_k_RJgD[rows].permute(2, 0, 3, 1), own_v_RJgD[rows].permute(2, 0, 1, 3)
            own_scores = (q_gpRD.transpose(1, 2) @ own_k_gRDJ).transpose(1, 2)
            weights = torch.cat([scores, own_scores], -1).softmax(-1, dtype=torch.float32).to(v_gKD.dtype)
            prefix_w, own_w = weights.split([scores.shape[-1], own_scores.shape[-1]], -1)
            own_part = (own_w.transpose(1, 2) @ own_v_gRJD).transpose(1, 2)
        else:
            prefix_w = scores.softmax(-1, dtype=torch.float32).to(v_gKD.dtype)
            own_part = None
        out_gpRD = (prefix_w.flatten(1, 2) @ v_gKD).unflatten(1, (heads // groups, num_rows))
        out_gpRD = out_gpRD if own_part is None else out_gpRD + own_part
        outputs.append(out_gpRD.permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(outputs)
