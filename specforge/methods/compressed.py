"""A teacher of which only the likeliest ids were kept.

Of the target's distribution p over V ids, the k likeliest ids K are known with log p. The mass that is left, 1 - sum_K p,
is spread evenly over the other V - k ids, and the whole is renormalised on the draft vocabulary D, as the exact teacher is:

    p~(i) = p(i) for i in K, else (1 - sum_K p) / (V - k)        teacher(i) = p~(i) / sum_D p~

Shapes: U target positions, K kept ids, V vocabulary of the target, D draft vocabulary.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CompressedTeacher:
    """ids_UK int32 and log_probs_UK (natural, over the whole vocabulary) of the target; to_draft_V: draft id of each id, or -1."""

    ids_UK: torch.Tensor
    log_probs_UK: torch.Tensor
    to_draft_V: torch.Tensor

    def distribution(self, start: int, end: int, draft_size: int) -> torch.Tensor:
        """Probabilities [end - start, D] float32 of the target positions start..end."""
        ids_UK, probs_UK = self.ids_UK[start:end].long(), self.log_probs_UK[start:end].float().exp()
        others = max(len(self.to_draft_V) - ids_UK.shape[1], 1)
        tail_U = (1 - probs_UK.sum(-1)).clamp_min(0) / others
        whole = tail_U[:, None].repeat(1, draft_size + 1)
        columns_UK = self.to_draft_V[ids_UK].long()
        whole.scatter_(1, torch.where(columns_UK < 0, draft_size, columns_UK), probs_UK)  # ids the draft lacks: the column too many
        kept_UD = whole[:, :draft_size]
        return kept_UD / kept_UD.sum(-1, keepdim=True)
