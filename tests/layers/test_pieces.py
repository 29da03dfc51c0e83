"""Normalisation, gated feed-forward, rotation and row selection against their plain forms, forward and gradient."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from specforge.layers.norm import normalise
from specforge.layers.rotary import Rotary, rotate
from specforge.layers.rows import take_rows
from specforge.layers.swiglu import swiglu


def assert_same(fast: Callable[[torch.Tensor], torch.Tensor], slow: Callable[[torch.Tensor], torch.Tensor], *shape: int) -> None:
    """Values and gradients agree in both data types."""
    torch.manual_seed(0)
    x64 = torch.randn(*shape, dtype=torch.float64) * 3
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        x = x64.to(dtype).requires_grad_()
        got, expected = fast(x), slow(x)
        direction = torch.randn_like(expected)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            *(torch.autograd.grad(y, x, direction)[0] for y in (got, expected)), rtol=10 * tolerance, atol=10 * tolerance
        )


def test_normalise() -> None:
    assert_same(lambda x: normalise(x, 0.1), lambda x: F.rms_norm(x, (24,), eps=0.1), 5, 24)


def test_normalise_in_bf16_takes_the_mean_in_float32() -> None:
    """256 squares of 1.5 add up to 576, which bf16 sums of one square after the other never reach."""
    x = torch.full((1, 256), 1.5, dtype=torch.bfloat16)
    assert torch.equal(normalise(x, 0.0), torch.ones_like(x))


def test_swiglu() -> None:
    assert_same(swiglu, lambda x: F.silu(x[:, :12]) * x[:, 12:], 5, 24)


def test_take_rows() -> None:
    index = torch.tensor([4, 0, 3])
    assert_same(lambda x: take_rows(x, index), lambda x: x[index], 6, 2, 3)


def plainly_rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_rotate_leaves_the_other_heads_alone(rope: str) -> None:
    """YaRN scales the angles' cosines and sines, so the transpose is no inverse there."""
    parameters = {
        "rope_type": rope,
        "rope_theta": 100.0,
        **({"factor": 4.0, "original_max_position_embeddings": 16} if rope == "yarn" else {}),
    }
    rotary = Rotary(8, 64, parameters)
    cos, sin = rotary(torch.zeros((), dtype=torch.float64), torch.tensor([0, 3, 17, 40, 41]))

    def slow(x: torch.Tensor) -> torch.Tensor:
        c, s = cos.to(x.dtype), sin.to(x.dtype)
        return torch.cat([plainly_rotated(x[:, :3], c, s), x[:, 3:]], 1)

    assert_same(lambda x: rotate(x, cos.to(x.dtype), sin.to(x.dtype), 3), slow, 5, 4, 8)
