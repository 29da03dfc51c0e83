"""Both forms of the loss, at a small size, have one value and one gradient."""

from dataclasses import replace

import torch

from specforge.bench.loss_memory import chunked_loss, naive_loss
from specforge.bench.synthetic import SHAPES, make_batch, make_method


def test_chunked_equals_naive() -> None:
    shape = replace(SHAPES["small"], documents=2, tokens=40)
    method = make_method(shape)
    batch = make_batch(shape, method)
    plan = method.plan(batch)
    outputs = [torch.randn(len(step.rows_R), shape.hidden, requires_grad=True) for step in plan.steps]
    inputs = [*outputs, method.draft.lm_head.weight, method.draft.norm.weight]
    chunked, naive = (form(method, batch, plan, outputs) for form in (chunked_loss, naive_loss))
    torch.testing.assert_close(chunked, naive, rtol=1e-6, atol=0)
    for got, expected in zip(*(torch.autograd.grad(loss, inputs) for loss in (chunked, naive)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
