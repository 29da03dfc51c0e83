"""Cross-entropy against the target's distribution, vocabulary-wide numbers in chunks only.

The gradient is formed together with the loss, so no logits outlive their chunk: neither the draft's nor the
target's. A target position taught to several steps has its product with the target's head computed once.

Shapes: M draft states, N of them taught (one per step and token), U target positions, H hidden, D draft vocabulary.
"""

import math
from typing import Any

import numpy as np
import torch
from torch.autograd.function import FunctionCtx

from specforge.methods.teacher import Teacher


def default_chunk_rows(draft_vocab: int) -> int:
    """About 8 million logits, 32 MiB in float32; fewer than 256 rows make slow products, more than 1,024 leave the caches of a CPU."""
    return min(max(2**23 // draft_vocab, 256), 1024)


def chunk_borders(teacher_N: np.ndarray, chunk_rows: int) -> list[tuple[int, int]]:
    """Cut N rows, sorted by target position, into chunks of about `chunk_rows` that split no target position."""
    borders, start = [], 0
    while start < len(teacher_N):
        end = min(start + chunk_rows, len(teacher_N))
        if end < len(teacher_N):
            whole = int(np.searchsorted(teacher_N, teacher_N[end]))
            end = whole if whole > start else int(np.searchsorted(teacher_N, teacher_N[end], side="right"))
        borders.append((start, end))
        start = end
    return borders


def soft_cross_entropy(
    hidden_MH: torch.Tensor,
    row_N: torch.Tensor,
    head_DH: torch.Tensor,
    teacher: Teacher,
    teacher_N: torch.Tensor,
    weight_N: torch.Tensor,
    chunks: list[tuple[int, int, int, int]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum over rows of weight * CE(teacher || softmax(draft logits)), both on the draft vocabulary.

    Args:
        hidden_MH: draft states after the final norm.
        row_N: which of them are taught, each once, int64; sorted by target position.
        teacher: the target's distribution at the U positions that teach.
        teacher_N: index into U of each row, ascending, int64.
        weight_N: float32.
        chunks: (row_start, row_end, teacher_start, teacher_end), known on the host.

    Returns:
        the loss in nats (float32 scalar), the draft-vocabulary id each row proposes (int64 [N]), and how probable the draft
        calls it (float32 [N]).
    """
    return _SoftCrossEntropy.apply(hidden_MH, row_N, head_DH, teacher, teacher_N, weight_N, chunks)


def row_maxima(logits_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits.max(-1)`, in two steps: a maximum without its index is many times faster on a CPU.

    Args:
        logits_ND: contiguous.
    """
    num_rows, size = logits_ND.shape
    width = math.gcd(size, 64)
    part_N = logits_ND.view(num_rows, -1, width).amax(-1).argmax(-1)
    first_part_N = torch.arange(0, num_rows * size // width, size // width, device=logits_ND.device)
    best_N, place_N = logits_ND.view(-1, width).index_select(0, first_part_N + part_N).max(-1)
    return best_N, part_N * width + place_N


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: torch.Tensor,
        row_N: torch.Tensor,
        head_DH: torch.Tensor,
        teacher: Teacher,
        teacher_N: torch.Tensor,
        weight_N: torch.Tensor,
        chunks: list[tuple[int, int, int, int]],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden_MH.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden_MH.device)
        proposals_N = torch.empty(len(row_N), dtype=torch.int64, device=hidden_MH.device)
        confidences_N = torch.empty(len(row_N), dtype=torch.float32, device=hidden_MH.device)
        grad_hidden = torch.zeros_like(hidden_MH) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head_DH, dtype=wide) if ctx.needs_input_grad[2] else None
        for row_start, row_end, teacher_start, teacher_end in chunks:
            rows = slice(row_start, row_end)
            target_UD = teacher.distribution(teacher_start, teacher_end, wide)
            target_ND = target_UD.index_select(0, teacher_N[rows] - teacher_start)
            del target_UD
            hidden_NH = hidden_MH.index_select(0, row_N[rows])
            logits_ND = hidden_NH @ head_DH.T
            best_N, proposals_N[rows] = row_maxima(logits_ND)
            draft_ND = logits_ND.softmax(-1, dtype=wide)
            largest_N = draft_ND.gather(1, proposals_N[rows, None])[:, 0]
            confidences_N[rows] = largest_N
            # The largest probability is at least 1/D, so its logarithm is exact enough to give the normaliser.
            log_normaliser_N = best_N.to(wide) - largest_N.log()
            loss += weight_N[rows].to(wide) @ (log_normaliser_N - logits_ND.to(wide).mul_(target_ND).sum(-1))
            del logits_ND
            grad_ND = draft_ND.sub_(target_ND).mul_(weight_N[rows, None]).to(head_DH.dtype)
            del draft_ND, target_ND
            if grad_hidden is not None:
                grad_hidden.index_copy_(0, row_N[rows], grad_ND @ head_DH)
            if grad_head is not None and grad_ND.dtype == wide:
                grad_head.addmm_(grad_ND.T, hidden_NH)
            elif grad_head is not None:
                grad_head += grad_ND.T @ hidden_NH
            del grad_ND
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head_DH.dtype))
        ctx.mark_non_differentiable(proposals_N, confidences_N)
        return loss, proposals_N, confidences_N

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors  # type: ignore[attr-defined]
        scale = grads[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None,
            None if grad_head is None else grad_head * scale.to(grad_head.dtype),
            None, None, None, None,
        )  # fmt: skip
