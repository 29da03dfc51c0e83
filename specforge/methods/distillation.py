"""One loss for all methods, vocabulary-wide numbers in chunks only.

The gradient is formed together with the loss, so no logits outlive their chunk: neither the draft's nor the
target's. A target position taught to several rows has its product with the target's head computed once.

Shapes: M draft states, N of them taught, U target positions, H hidden (each part has its own), D draft vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.function import FunctionCtx

from specforge.methods.objectives import Lesson, Objective, pace_weights
from specforge.methods.teacher import Teacher


@dataclass(frozen=True)
class TaughtRows:
    """Which draft states are taught, and what; all tensors on the device of the states, chunks on the host."""

    row_N: torch.Tensor
    """int64: index into the M states, none twice."""
    weight_N: torch.Tensor
    """float32; a row of weight 0 teaches nothing."""
    group_N: torch.Tensor
    """int64, ascending: the row's target position of U; with D-PACE its block, 0, 1, ...; any where there is neither."""
    chunks: list[tuple[int, int, int, int]]
    """From `chunks_of`."""
    label_N: torch.Tensor | None = None
    """int64: draft ids, for ce."""
    depth_N: torch.Tensor | None = None
    """int64: place in the block, 0..block_size-1, for D-PACE."""
    block_size: int = 0


class Loss(NamedTuple):
    loss_sum: torch.Tensor
    """Sum over rows of weight * objective; float32 scalar, or float64 if the states are."""
    proposals_N: torch.Tensor
    """The likeliest draft id, int64."""
    confidences_N: torch.Tensor
    """How probable the draft calls it, float32."""
    acceptance_N: torch.Tensor | None
    """sum_v min(p_v, q_v), float32, where the objective has use for it."""


def default_chunk_rows(draft_vocab: int) -> int:
    """About 8 million logits, 32 MiB in float32; fewer than 256 rows make slow products, more than 1,024 leave the caches of a CPU."""
    return min(max(2**23 // draft_vocab, 256), 1024)


def chunks_of(group_N: np.ndarray, chunk_rows: int) -> list[tuple[int, int, int, int]]:
    """Cut N rows, sorted by group, into chunks of about `chunk_rows` that split no group: (row_start, row_end, group_start, group_end)."""
    chunks, start = [], 0
    while start < len(group_N):
        end = min(start + chunk_rows, len(group_N))
        if end < len(group_N):
            whole = int(np.searchsorted(group_N, group_N[end]))
            end = whole if whole > start else int(np.searchsorted(group_N, group_N[end], side="right"))
        chunks.append((start, end, int(group_N[start]), int(group_N[end - 1]) + 1))
        start = end
    return chunks


def chunked_loss(
    objective: Objective,
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    rows: TaughtRows,
    teacher: Teacher | None = None,
    base_share: float = 0.0,
) -> Loss:
    """The objective of draft states whose logits are the sum of hidden @ head^T over `parts`.

    Args:
        parts: (hidden [M, H], head [D, H]), H of each its own; hidden after the final norm. What needs no gradient costs none.
        teacher: of the U positions that `rows.group_N` points to, where the objective needs one.
        base_share: the loss is (1 - base_share) of that of all parts and base_share of that of the first part alone; the rest of what
            is returned is of all parts, D-PACE's weights too.
    """
    tensors = [tensor for part in parts for tensor in part]
    if not torch.is_grad_enabled():
        tensors = [tensor.detach() for tensor in tensors]
    return Loss(*_ChunkedLoss.apply(objective, rows, teacher, base_share, *tensors))


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


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, objective: Objective, rows: TaughtRows, teacher: Teacher | None, base_share: float, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        hidden, heads = tensors[::2], tensors[1::2]
        dtype, device = hidden[0].dtype, hidden[0].device
        wide = torch.promote_types(dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=wide, device=device)
        proposals_N = torch.empty(len(rows.row_N), dtype=torch.int64, device=device)
        confidences_N = torch.empty(len(rows.row_N), dtype=torch.float32, device=device)
        acceptance_N = torch.empty_like(confidences_N) if objective.gives_acceptance else None
        wanted = ctx.needs_input_grad[-len(tensors) :]
        grad_hidden = [torch.zeros_like(x) if want else None for x, want in zip(hidden, wanted[::2], strict=True)]
        grad_heads = [torch.zeros_like(x, dtype=wide) if want else None for x, want in zip(heads, wanted[1::2], strict=True)]
        for chunk in rows.chunks:
            here = slice(chunk[0], chunk[1])
            row_N, weight_N = rows.row_N[here], rows.weight_N[here].to(wide)
            lesson = _lesson(objective, rows, teacher, chunk, wide)
            states = [x.index_select(0, row_N) for x in hidden]
            logits_ND = states[0] @ heads[0].T
            base_ND = logits_ND.clone() if base_share else None
            for state_NH, head_DH in zip(states[1:], heads[1:], strict=True):
                logits_ND.addmm_(state_NH, head_DH.T)
            draft_ND, log_normaliser_N, proposals_N[here], largest_N = _softmax(logits_ND, wide)
            confidences_N[here] = largest_N
            if objective.pace:
                weight_N = weight_N * _pace_weights(objective, rows, chunk, draft_ND)
            loss_N, slope_ND, taken_N = objective.slope(logits_ND, draft_ND, log_normaliser_N, lesson)
            del logits_ND, draft_ND
            if acceptance_N is not None and taken_N is not None:
                acceptance_N[here] = taken_N
            first_slope_ND = slope_ND
            if base_ND is not None:
                base_loss_N, first_slope_ND, _ = objective.slope(base_ND, *_softmax(base_ND, wide)[:2], lesson)
                loss_N = torch.lerp(loss_N, base_loss_N, base_share)
                first_slope_ND.mul_(base_share).add_(slope_ND.mul_(1 - base_share))
            del lesson, base_ND
            loss_sum += weight_N @ loss_N
            weight_N1 = weight_N.to(dtype)[:, None]
            slopes = [first_slope_ND.to(dtype), *([slope_ND.to(dtype)] * (len(heads) - 1))]
            del slope_ND, first_slope_ND
            for part_ND, state_NH, head_DH, grad_MH, grad_DH in zip(slopes, states, heads, grad_hidden, grad_heads, strict=True):
                if grad_MH is not None:
                    grad_MH.index_copy_(0, row_N, (part_ND @ head_DH).mul_(weight_N1))
                if grad_DH is not None and dtype == wide:
                    grad_DH.addmm_(part_ND.T, state_NH.mul_(weight_N1))
                elif grad_DH is not None:
                    grad_DH += part_ND.T @ state_NH.mul_(weight_N1)
            del slopes, part_ND
        found = [*grad_hidden, *(None if grad is None else grad.to(dtype) for grad in grad_heads)]
        ctx.save_for_backward(*found)
        ctx.mark_non_differentiable(*(x for x in (proposals_N, confidences_N, acceptance_N) if x is not None))
        return loss_sum, proposals_N, confidences_N, acceptance_N

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = [None if grad is None else grad * grads[0].to(grad.dtype) for grad in ctx.saved_tensors]  # type: ignore[attr-defined]
        parts = len(found) // 2
        return None, None, None, None, *(grad for part in range(parts) for grad in (found[part], found[parts + part]))


def _lesson(objective: Objective, rows: TaughtRows, teacher: Teacher | None, chunk: tuple[int, int, int, int], wide: torch.dtype) -> Lesson:
    row_start, row_end, group_start, group_end = chunk
    label_N = None if rows.label_N is None else rows.label_N[row_start:row_end]
    if teacher is None:
        return Lesson(label_N=label_N)
    taught_N = rows.group_N[row_start:row_end] - group_start
    target_ND = teacher.distribution(group_start, group_end, wide).index_select(0, taught_N) if objective.kl else None
    log_target_ND = teacher.log_probs(group_start, group_end, wide).index_select(0, taught_N) if objective.gives_acceptance else None
    return Lesson(target_ND, log_target_ND, label_N)


def _softmax(logits_ND: torch.Tensor, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities [N, D], logsumexp [N], the likeliest id [N] and its probability [N]."""
    best_N, place_N = row_maxima(logits_ND)
    draft_ND = logits_ND.softmax(-1, dtype=wide)
    largest_N = draft_ND.gather(1, place_N[:, None])[:, 0]
    # The largest probability is at least 1/D, so its logarithm is exact enough to give the normaliser.
    return draft_ND, best_N.to(wide) - largest_N.log(), place_N, largest_N


def _pace_weights(objective: Objective, rows: TaughtRows, chunk: tuple[int, int, int, int], draft_ND: torch.Tensor) -> torch.Tensor:
    """D-PACE's weights [N] of a chunk, from the probabilities of its labels."""
    assert rows.label_N is not None and rows.depth_N is not None
    row_start, row_end, block_start, block_end = chunk
    cell = rows.group_N[row_start:row_end] - block_start, rows.depth_N[row_start:row_end]
    likelihood_BK = draft_ND.new_zeros(block_end - block_start, rows.block_size)
    likelihood_BK[cell] = draft_ND.gather(1, rows.label_N[row_start:row_end, None])[:, 0]
    counted_BK = torch.zeros_like(likelihood_BK, dtype=torch.bool)
    counted_BK[cell] = rows.weight_N[row_start:row_end] > 0
    return pace_weights(objective.pace, objective.pace_alpha, likelihood_BK, counted_BK)[cell]
