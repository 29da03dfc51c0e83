"""A model in half precision with modules kept in float32: what they save, how they are fed and heard, and what is refused."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from specforge.errors import ConfigError
from specforge.layers.precision import PrecisionPolicy


class NaiveNorm(nn.Module):
    """x / rms(x) as it is written down; in float16 the square of 300 is infinite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((width,), 1.003)), nn.Parameter(torch.full((width,), 0.25))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD * x_TD.square().mean(-1, keepdim=True).rsqrt() * self.weight + self.bias


class Pair(NamedTuple):
    y: torch.Tensor
    rows: torch.Tensor


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 2)

    def forward(self, x_TD: torch.Tensor, *, scale: torch.Tensor) -> Pair:
        assert x_TD.dtype == scale.dtype == torch.float32
        return Pair(self.inner(x_TD) * scale, torch.tensor(len(x_TD)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(16, 16), NaiveNorm(16), Head()
        self.register_buffer("angle", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("index", torch.arange(2))

    def forward(self, x_TD: torch.Tensor) -> Pair:
        return self.head(self.norm(self.embed(x_TD)), scale=torch.ones((), dtype=x_TD.dtype))


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def test_a_norm_of_large_numbers_collapses_unless_it_is_kept() -> None:
    """300^2 > 65504, the largest float16: the naive norm divides by infinity and gives its bias. Kept, only its ends are rounded, so
    it is off by two roundings of u = 2^-11 of a result below 4."""
    torch.manual_seed(0)
    x_TD = 300 * torch.randn(4, 16).sign() + torch.randn(4, 16)
    exact_TD = NaiveNorm(16)(x_TD)
    outputs = []
    for kept in ((), ("0",)):
        small = nn.Sequential(NaiveNorm(16))
        PrecisionPolicy(torch.float16, kept).apply(small)
        outputs.append(small(x_TD.half()))
    assert (outputs[0] == 0.25).all()
    assert outputs[1].dtype == torch.float16
    torch.testing.assert_close(outputs[1].float(), exact_TD, rtol=0, atol=2 * 4 * 2**-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kept_modules_are_whole_and_never_rounded(dtype: torch.dtype) -> None:
    small, before = model(), model().state_dict()
    applied = PrecisionPolicy(dtype, ("norm", "h*")).apply(small)
    assert applied.kept == ("norm", "head")  # and not `head.inner` again
    for name, tensor in small.state_dict().items():
        if name.startswith(("norm", "head")):
            assert tensor.equal(before[name])
        else:
            assert tensor.dtype == (dtype if tensor.is_floating_point() else before[name].dtype)
    out = small(torch.randn(3, 16, dtype=dtype))
    assert isinstance(out, Pair) and out.y.dtype == dtype and out.rows.dtype == torch.int64
    out.y.sum().backward()
    assert small.norm.weight.grad.dtype == torch.float32 and small.embed.weight.grad.dtype == dtype


def test_a_shared_weight_is_kept_if_one_of_its_modules_is() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers[0].weight = layers[1].weight
    before = layers[1].weight.clone()
    PrecisionPolicy(torch.bfloat16, ("1",)).apply(layers)
    assert layers[0].weight is layers[1].weight and layers[1].weight.equal(before)


def test_the_handle_removes_the_hooks() -> None:
    small = model()
    applied = PrecisionPolicy(torch.bfloat16, ("norm",)).apply(small)
    x_TD = torch.randn(2, 16, dtype=torch.bfloat16)
    assert small.norm(x_TD).dtype == torch.bfloat16
    applied.remove()
    assert small.norm(x_TD).dtype == torch.float32


@pytest.mark.parametrize("pattern", ["norm2", "nor", "layers.*"])
def test_an_unknown_pattern_is_refused_by_name(pattern: str) -> None:
    small = model()
    with pytest.raises(
        ConfigError, match=rf"keep_fp32_modules='{pattern.replace('*', '.')}': matches no module.*embed, norm, head, head\.inner"
    ):
        PrecisionPolicy(torch.bfloat16, ("norm", pattern)).apply(small)
    assert small.embed.weight.dtype == torch.float32
