"""The chunked loss against cross-entropy on whole logits, value and gradients."""

import numpy as np
import pytest
import torch

from specforge.methods.distillation import TaughtRows, chunked_loss, chunks_of, row_maxima
from specforge.methods.objectives import Objective
from specforge.methods.teacher import ExactTeacher


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_chunks_equal_whole_logits(chunk_rows: int, dtype: torch.dtype, tolerance: float) -> None:
    """31 of 40 rows taught by 12 positions; logits are sharp, so that some probabilities underflow in float32."""
    torch.manual_seed(0)
    teacher_N = torch.randint(0, 12, (31,)).sort().values
    teacher_N = torch.unique(teacher_N, return_inverse=True)[1]
    hidden, row_N = torch.randn(40, 16, dtype=dtype, requires_grad=True), torch.randperm(40)[:31]
    head = torch.randn(24, 16, dtype=dtype).mul_(6).requires_grad_()
    teacher, teacher_head = torch.randn(int(teacher_N[-1]) + 1, 16, dtype=dtype), torch.randn(24, 16, dtype=dtype)
    weight = torch.rand(31)
    chunks = chunks_of(teacher_N.numpy(), chunk_rows)
    assert len(chunks) == {1: len(teacher), 100: 1}.get(chunk_rows, len(chunks))
    rows = TaughtRows(row_N, weight, teacher_N, chunks)
    exact = ExactTeacher(teacher, teacher_head, None)
    loss, proposals, confidences, acceptance = chunked_loss(Objective(kl=1.0), [(hidden, head)], rows, exact)
    assert acceptance is None

    logits = hidden[row_N] @ head.T
    target = (teacher @ teacher_head.T).softmax(-1)[teacher_N]
    whole = -(weight.to(dtype) * (target * logits.log_softmax(-1)).sum(-1)).sum()
    torch.testing.assert_close(loss, whole, rtol=tolerance, atol=tolerance)
    assert torch.equal(proposals, logits.argmax(-1))
    torch.testing.assert_close(confidences, logits.softmax(-1).amax(-1).float(), rtol=max(tolerance, 1e-6), atol=0)
    assert not confidences.requires_grad
    for got, expected in zip(*(torch.autograd.grad(3 * value, (hidden, head)) for value in (loss, whole)), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=10 * tolerance)


def test_a_chunk_holds_all_rows_of_a_position() -> None:
    assert chunks_of(np.array([0, 0, 1, 1, 1, 1, 2]), 3) == [(0, 2, 0, 1), (2, 6, 1, 2), (6, 7, 2, 3)]
    assert chunks_of(np.array([], dtype=np.int64), 3) == []


@pytest.mark.parametrize("frozen", ["head", "hidden", "everything"])
def test_what_needs_no_gradient_gets_no_product(frozen: str) -> None:
    """Counted in products with a factor as long as the vocabulary: logits, by the states, by the head."""
    hidden, head = torch.randn(6, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    rows = TaughtRows(torch.arange(6), torch.ones(6), torch.arange(6), [(0, 6, 0, 6)], label_N=torch.arange(6))
    parts = [(hidden.requires_grad_(frozen != "hidden"), head.requires_grad_(frozen != "head"))]
    with torch.set_grad_enabled(frozen != "everything"), torch.profiler.profile() as profile:
        loss = chunked_loss(Objective(ce=1.0), parts, rows).loss_sum
    products = sum(event.name in ("aten::mm", "aten::addmm_") for event in profile.events())
    assert products == {"head": 2, "hidden": 2, "everything": 1}[frozen]
    assert loss.requires_grad == (frozen != "everything")


@pytest.mark.parametrize("size", [1, 7, 64, 96, 320])
def test_row_maxima_are_the_first_of_equals(size: int) -> None:
    logits = torch.randint(5, (50, size), generator=torch.Generator().manual_seed(0)).float()
    best, place = row_maxima(logits)
    torch.testing.assert_close((best, place), tuple(logits.max(-1)), rtol=0, atol=0)
    assert all((row[:first] < row[first]).all() for row, first in zip(logits, place.tolist(), strict=True))
