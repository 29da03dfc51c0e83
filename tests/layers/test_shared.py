"""Readers that add up one gradient against autograd, which adds up theirs."""

import gc
import weakref

import pytest
import torch

from specforge.layers.shared import Shared, linear


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (4, 3), (5, 4)))  # type: ignore[return-value]


@pytest.mark.parametrize("plain_reader", [False, True])
def test_the_sum_is_that_of_autograd(plain_reader: bool) -> None:
    x_RI, weight_OI, onto_RO = inputs()
    shared = Shared(2 * weight_OI)
    out = linear(x_RI, shared).square().sum() + linear(x_RI.sin(), shared, onto_RO.clone()).cos().sum()
    expected = (x_RI @ (2 * weight_OI).T).square().sum() + (onto_RO + x_RI.sin() @ (2 * weight_OI).T).cos().sum()
    if plain_reader:
        out, expected = out + shared.tensor.exp().sum(), expected + (2 * weight_OI).exp().sum()
    torch.testing.assert_close(out, expected)
    for got, asked in zip(
        torch.autograd.grad(out, (x_RI, weight_OI, onto_RO)), torch.autograd.grad(expected, (x_RI, weight_OI, onto_RO)), strict=True
    ):
        torch.testing.assert_close(got, asked)


def test_a_second_backward_does_not_count_the_first_one() -> None:
    x_RI, weight_OI, _ = inputs()
    out = linear(x_RI, Shared(weight_OI)).sum()
    first, second = (torch.autograd.grad(out, weight_OI, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, x_RI.sum(0).expand(4, 3))
    torch.testing.assert_close(second, first)


def test_what_needs_no_gradient_gets_none() -> None:
    x_RI, weight_OI, _ = inputs()
    shared = Shared(weight_OI.detach())
    linear(x_RI, shared).sum().backward()
    assert shared.grad.total is None and shared.tensor.grad is None
    torch.testing.assert_close(x_RI.grad, weight_OI.detach().sum(0).expand(5, 3))


def test_a_product_on_top_overwrites_what_it_is_given() -> None:
    x_RI, weight_OI, onto_RO = inputs()
    with torch.no_grad():
        assert linear(x_RI, Shared(weight_OI), onto_RO).data_ptr() == onto_RO.data_ptr()


def test_nothing_waits_for_the_garbage_collector() -> None:
    x_RI, weight_OI, _ = inputs()
    gc.disable()
    try:
        doubled = 2 * weight_OI
        alive, out = weakref.ref(doubled), linear(x_RI, Shared(doubled)).sum()
        del doubled
        assert alive() is not None
        del out
        assert alive() is None
    finally:
        gc.enable()
