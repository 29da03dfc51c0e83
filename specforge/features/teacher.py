"""What the target's distribution is cut down to where its last hidden state is too large to keep: the likeliest ids."""

import torch
from torch import nn

from specforge.features.target import Target

_ROWS = 1024
_COLUMNS = 32_768


@torch.no_grad()
def likeliest(target: Target, last_NH: torch.Tensor, logsumexp_N: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` likeliest ids [N, k] int32 at each token and their log-probabilities over the whole vocabulary [N, k] float16.

    The mass of all other ids follows from these. Logits exist for a tile of rows and ids at a time.
    """
    weight_VH, bias_V = target.head_tensors()
    ids, log_probs = [], []
    for first_row in range(0, len(last_NH), _ROWS):
        rows = slice(first_row, first_row + _ROWS)
        best_NK = last_NH.new_empty((len(last_NH[rows]), 0), dtype=torch.float32)
        best_ids_NK = torch.empty_like(best_NK, dtype=torch.int64)
        for first_id in range(0, len(weight_VH), _COLUMNS):
            tile = slice(first_id, first_id + _COLUMNS)
            logits = nn.functional.linear(last_NH[rows].float(), weight_VH[tile].float(), None if bias_V is None else bias_V[tile].float())
            tile_ids = torch.arange(first_id, first_id + logits.shape[1], device=logits.device).expand_as(logits)
            candidates, candidate_ids = torch.cat([best_NK, logits], 1), torch.cat([best_ids_NK, tile_ids], 1)
            best_NK, places = candidates.topk(min(k, candidates.shape[1]), dim=1)
            best_ids_NK = candidate_ids.gather(1, places)
        ids.append(best_ids_NK.int())
        log_probs.append((best_NK - logsumexp_N[rows, None]).half())
    return torch.cat(ids), torch.cat(log_probs)
