"""What reads a value back is counted, however it is written."""

from collections.abc import Callable

import pytest
import torch

from specforge.bench.profile import profile, value_reads
from tests.test_sync_free import FREE, READS

CPU = torch.device("cpu")
X = torch.ones(3, 4)
X[:, 0] = torch.tensor([3.0, 2.0, 2.0])


def test_a_known_number_of_items() -> None:
    x = torch.arange(4.0)

    def call() -> None:
        for number in range(3):
            x[number].item()
        float(x.sum())
        x.tolist()

    assert value_reads(call) == {"_local_scalar_dense": 4, "tolist": 1}
    found = profile(call, CPU)
    assert found.synchronisations == {"_local_scalar_dense": 4, "tolist": 1}
    assert {line.operator: line.calls for line in found.lines}["aten::item"] == 4
    assert "synchronisations: _local_scalar_dense 4, tolist 1" in found.table()


@pytest.mark.parametrize("name", READS)
def test_each_way_to_read_is_counted(name: str) -> None:
    function, _ = READS[name]
    assert sum(value_reads(lambda: function(X)).values()) >= 1


@pytest.mark.parametrize("name", FREE)
def test_what_reads_nothing_counts_nothing(name: str) -> None:
    function: Callable[[torch.Tensor], object] = FREE[name]
    assert value_reads(lambda: function(X)) == {}


def test_the_backward_is_counted_too() -> None:
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
            grads[0].sum().item()
            return grads[0]

    x = torch.ones(2, requires_grad=True)
    assert value_reads(lambda: Reading.apply(x).sum().backward()) == {"_local_scalar_dense": 1}
