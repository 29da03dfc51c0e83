"""Every way to read a value back is caught, and the layers that promise to read none do not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from specforge.layers.experts import FORMS
from specforge.layers.moe import SparseMoE
from specforge.layers.slots import SlotBags, SlotConfig, SlotEmbedding
from tests.sync_free import value_read

READS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense"),
    "tolist": (lambda x: x.tolist(), "_local_scalar_dense"),
    "float": (lambda x: float(x[0, 0]), "_local_scalar_dense"),
    "if": (lambda x: 1 if (x > 0).any() else 0, "_local_scalar_dense"),
    "range": (lambda x: range(x.long()[0, 0]), "_local_scalar_dense"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "where": (lambda x: torch.where(x > 0), "nonzero"),
    "boolean index": (lambda x: x[x > 0], "nonzero"),
    "boolean assignment": (lambda x: x.index_put((x[:, 0] > 0,), x[0]), "index_put"),
    "masked_select": (lambda x: x.masked_select(x > 0), "masked_select"),
    "repeat_interleave": (lambda x: x.repeat_interleave(x.long()[:, 0], 0), "repeat_interleave"),
    "unique": (lambda x: x.unique(), "_unique2"),
    "bincount": (lambda x: x.long().flatten().bincount(), "bincount"),
    "equal": (lambda x: torch.equal(x, x), "equal"),
    "cpu": (lambda x: x.cpu(), "'cpu'"),
    "to the host": (lambda x: x.to("cpu"), "'to'"),
    "to the host by name": (lambda x: x.half().to(device="cpu"), "'to'"),
}
FREE: dict[str, Callable[[torch.Tensor], Any]] = {
    "product": lambda x: x @ x.T,
    "where of three": lambda x: torch.where(x > 0, x, 0),
    "boolean fill": lambda x: x.index_put((x > 0,), torch.zeros(())),
    "repeat_interleave with a size": lambda x: x.repeat_interleave(x.long()[:, 0], 0, output_size=7),
    "repeat_interleave by a number": lambda x: x.repeat_interleave(2, 0),
    "to a type": lambda x: x.to(torch.float16).to(x.device),
    "gather": lambda x: x.gather(1, x.argsort(1)),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_is_caught(name: str) -> None:
    function, operator = READS[name]
    assert operator in (value_read(function, torch.ones(3, 4)) or "")


@pytest.mark.parametrize("name", FREE)
def test_what_reads_nothing_passes(name: str) -> None:
    assert value_read(FREE[name], torch.ones(3, 4)) is None


def test_a_read_of_a_weight_or_in_the_backward_is_caught() -> None:
    def learn(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(layer(x).sum(), layer.weight)[0]

    layer, x = nn.Linear(4, 4), torch.ones(3, 4)
    assert value_read(learn, layer, x) is None
    assert value_read(lambda layer: layer.weight.max().item(), layer) is not None
    assert value_read(lambda layer, x: learn(layer, x).max().item(), layer, x) is not None


def test_a_tensor_that_is_no_input_is_refused() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        value_read(lambda x: layer(x), torch.ones(3, 4))


def learnt(module: nn.Module, *inputs: Any) -> torch.Tensor:
    """Forward and backward."""
    out = module(*inputs)
    out = out if isinstance(out, torch.Tensor) else out.out_TD
    out.sum().backward()
    return out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("groups", [None, (0, 1, 0, 1)])
@pytest.mark.parametrize("implementation", [*FORMS, "auto"])
def test_which_mixtures_read_nothing(implementation: str, groups: tuple[int, ...] | None, training: bool) -> None:
    """In bfloat16, the one type for which torch knows the shape of a grouped product."""
    moe = SparseMoE(16, 8, 4, 2, implementation, groups, sync_free=True).bfloat16().train(training)
    read = value_read(learnt if training else nn.Module.__call__, moe, torch.randn(2000, 16).bfloat16())
    assert (read is not None) == (implementation in ("loop", "sorted")), read


@pytest.mark.parametrize("policy", ["clamp", "modulo"])
def test_fused_slots_read_nothing(policy: str) -> None:
    bags = SlotBags.of(np.array([1, 5, 9, 12]), np.array([[1, 2], [0, 1]]))
    for implementation in ("fused", "per_slot"):
        slots = SlotEmbedding(SlotConfig(2, 10, 4, policy), implementation)
        assert (value_read(learnt, slots, bags) is None) == (implementation == "fused")
