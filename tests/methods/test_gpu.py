"""On a CUDA device: the step waits for nothing, and gives the CPU's loss and gradients, with checkpointing too."""

from pathlib import Path

import pytest
import torch

from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore
from tests.methods.test_contract import MOMENT, each_method, make
from tests.tiny import make_method

pytestmark = pytest.mark.gpu


@each_method
def test_no_method_waits(name: str, target_path: Path, store: LocalFeatureStore) -> None:
    """In training; a first step sets libraries up, which may wait."""
    method, batch = make(name, target_path, store), DraftBatch.read(store, range(len(store)))
    plan, there = method.plan(batch, MOMENT), batch.to(torch.device("cuda", 0))
    method.cuda()
    method(there, plan).loss_sum.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        method(there, plan).loss_sum.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_without_host_synchronisation(checkpointing: bool, target_path: Path, store: LocalFeatureStore) -> None:
    method = make_method(target_path, store, layers=2, draft_tokens=4, activation_checkpointing=checkpointing)
    batch = DraftBatch.pack(range(len(store)), [store.read(i) for i in range(len(store))])
    plan = method.plan(batch)
    expected = method(batch, plan).loss_sum
    expected_gradients = torch.autograd.grad(expected, list(method.parameters()))
    method.cuda()
    there = batch.to(torch.device("cuda", 0))
    method(there, plan).loss_sum.backward()  # the first call sets libraries up, which may wait
    method.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_sum = method(there, plan).loss_sum
        loss_sum.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss_sum.cpu(), expected, rtol=1e-4, atol=1e-4)
    for parameter, gradient in zip(method.parameters(), expected_gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=1e-3, atol=1e-4)
