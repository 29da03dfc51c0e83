"""Who teaches: the target's distribution on the draft vocabulary, at some of its positions.

Shapes: U target positions, H hidden, V vocabulary of the target, D draft vocabulary, K ids that were kept.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from specforge.features.batch import DraftBatch

_LEAST_MASS = 2.0**-100
"""What is left to the unknown ids where rounding leaves nothing: a target may be sure of ids of which the draft has none."""


class Teacher(Protocol):
    def distribution(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Probabilities [end - start, D] of the target positions start..end, renormalised on the draft vocabulary."""
        ...

    def log_probs(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Logarithms [end - start, D] of the target's own probabilities, finite; what they lack to 1 lies outside the draft vocabulary."""
        ...


@dataclass(frozen=True)
class ExactTeacher:
    """last_UH: the target's last hidden states, after its final norm; head_DH: the rows of its head that the draft keeps;
    logsumexp_U: of the target's logits on all ids, float32; None where the draft keeps them all."""

    last_UH: torch.Tensor
    head_DH: torch.Tensor
    logsumexp_U: torch.Tensor | None

    def distribution(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        return self._logits(start, end).softmax(-1, dtype=dtype)

    def log_probs(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        logits_UD = self._logits(start, end).to(dtype)
        normaliser_U = logits_UD.logsumexp(-1)
        if self.logsumexp_U is not None:
            # In bfloat16 the logits are rounded so coarsely that a sure target would be likelier than 1.
            normaliser_U = torch.maximum(normaliser_U, self.logsumexp_U[start:end].to(dtype))
        return logits_UD.sub_(normaliser_U[:, None])

    def _logits(self, start: int, end: int) -> torch.Tensor:
        return self.last_UH[start:end].to(self.head_DH.dtype) @ self.head_DH.T


@dataclass(frozen=True)
class CompressedTeacher:
    """A teacher of which only the likeliest ids were kept.

    Of the target's distribution p over V ids, the k likeliest ids K are known with log p. The mass that is left, 1 - sum_K p,
    is spread evenly over the other V - k ids. `distribution` is this renormalised on the draft vocabulary D, as the exact teacher's is:

        p~(i) = p(i) for i in K, else (1 - sum_K p) / (V - k)        teacher(i) = p~(i) / sum_D p~

    The mass of known ids that the draft lacks is known, so p~ itself is wrong only in how it spreads what is left.

    ids_UK int32, log_probs_UK float16 (natural, over all V ids); to_draft_V int32: draft id of each id, or -1.
    """

    ids_UK: torch.Tensor
    log_probs_UK: torch.Tensor
    to_draft_V: torch.Tensor
    draft_size: int

    def distribution(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        return self.log_probs(start, end, dtype).softmax(-1)

    def log_probs(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        known_UK = self.log_probs_UK[start:end].to(dtype)
        others = max(len(self.to_draft_V) - known_UK.shape[1], 1)
        left_U1 = (1 - known_UK.exp().sum(-1, keepdim=True)).clamp_min(_LEAST_MASS).log() - math.log(others)
        column_UK = self.to_draft_V[self.ids_UK[start:end].long()].long()
        column_UK = torch.where(column_UK < 0, self.draft_size, column_UK)  # ids that the draft lacks go to a column too many
        return left_U1.repeat(1, self.draft_size + 1).scatter_(1, column_UK, known_UK)[:, : self.draft_size]


def teacher_at(batch: DraftBatch, token_U: torch.Tensor, head_DH: torch.Tensor, to_draft_V: torch.Tensor | None = None) -> Teacher:
    """The target's distribution at some tokens, exact where the batch has its last hidden state.

    head_DH: the rows of the target's head that the draft keeps; to_draft_V: draft id of each id, or -1; None: the draft keeps all ids.
    """
    if not batch.top_ids.numel():
        return ExactTeacher(batch.last.index_select(0, token_U), head_DH, None if to_draft_V is None else batch.logsumexp[token_U])
    if to_draft_V is None:
        to_draft_V = torch.arange(len(head_DH), dtype=torch.int32, device=token_U.device)
    return CompressedTeacher(batch.top_ids[token_U], batch.top_log_probs[token_U], to_draft_V, len(head_DH))
