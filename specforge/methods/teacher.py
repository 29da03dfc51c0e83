"""Who teaches: the target's distribution on the draft vocabulary, at some of its positions.

Shapes: U target positions, H hidden, V vocabulary of the target, D draft vocabulary, K ids that were kept.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class Teacher(Protocol):
    def distribution(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Probabilities [end - start, D] of the target positions start..end."""
        ...


@dataclass(frozen=True)
class ExactTeacher:
    """last_UH: the target's last hidden states, after its final norm; head_DH: the rows of its head that the draft keeps."""

    last_UH: torch.Tensor
    head_DH: torch.Tensor

    def distribution(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        return (self.last_UH[start:end].to(self.head_DH.dtype) @ self.head_DH.T).softmax(-1, dtype=dtype)


@dataclass(frozen=True)
class CompressedTeacher:
    """A teacher of which only the likeliest ids were kept.

    Of the target's distribution p over V ids, the k likeliest ids K are known with log p. The mass that is left, 1 - sum_K p,
    is spread evenly over the other V - k ids, and the whole is renormalised on the draft vocabulary D, as the exact teacher is:

        p~(i) = p(i) for i in K, else (1 - sum_K p) / (V - k)        teacher(i) = p~(i) / sum_D p~

    ids_UK int32, log_probs_UK float16 (natural, over all V ids); to_draft_V int32: draft id of each id, or -1.
    """

    ids_UK: torch.Tensor
    log_probs_UK: torch.Tensor
    to_draft_V: torch.Tensor
    draft_size: int

    def distribution(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        probs_UK = self.log_probs_UK[start:end].to(dtype).exp()
        others = max(len(self.to_draft_V) - probs_UK.shape[1], 1)
        tail_U1 = (1 - probs_UK.sum(-1, keepdim=True)).clamp_min(0) / others
        column_UK = self.to_draft_V[self.ids_UK[start:end].long()].long()
        column_UK = torch.where(column_UK < 0, self.draft_size, column_UK)  # ids that the draft lacks go to a column too many
        known_UD = tail_U1.repeat(1, self.draft_size + 1).scatter_(1, column_UK, probs_UK)[:, : self.draft_size]
        return known_UD / known_UD.sum(-1, keepdim=True)
