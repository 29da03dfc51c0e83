"""Normalisation, gated feed-forward, rotation and row selection against their plain forms, forward and gradient."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from specforge.layers.norm import normalise
from specforge.layers.rotary import Rotary, pair_rows, rotate
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
def test_rotating_pairs_is_rotating_halves_in_another_order(rope: str) -> None:
    """YaRN scales the angles' cosines and sines, so the transpose is no inverse there."""
    parameters = {
        "rope_type": rope,
        "rope_theta": 100.0,
        **({"factor": 4.0, "original_max_position_embeddings": 16} if rope == "yarn" else {}),
    }
    rotary, position_T, head_dim = Rotary(8, 64, parameters), torch.tensor([0, 3, 17, 40, 41]), 8
    cos_T1D, sin_T1D = (x[0, :, None] for x in rotary.tables(torch.zeros(()), position_T[None]))
    order_D = pair_rows(torch.arange(head_dim)[:, None], head_dim)[:, 0]
    assert order_D.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert_same(
        lambda x: rotate(x[..., order_D], rotary(42)[position_T]),
        lambda x: plainly_rotated(x, cos_T1D.to(x.dtype), sin_T1D.to(x.dtype))[..., order_D],
        5, 4, head_dim,
    )  # fmt: skip
