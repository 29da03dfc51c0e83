"""Each implementation against the dense mask in float64, and that against the formula."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specforge.layers.documents import Documents
from specforge.layers.packed import PackedLayout
from specforge.layers.packed_attention import IMPLEMENTATIONS, prepare
from specforge.layers.rows import take_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WIDTH, SHARPEST = 16, 20.0
RAGGED = (7, 1, 0, 40, 200, 3, 129, 0, 18, 18)
LENGTHS = {"empty": (5, 0, 12), "single tokens": (1, 1, 1), "one": (37,), "ragged": RAGGED, "nothing": (0, 0)}
ON_CPU = ("loop", "padded", "bucket", "sdpa")
HEADS = [(4, 4), (6, 2)]


def random_qkv(tokens: int, heads: int, groups: int, dtype: torch.dtype, device: torch.device = CPU) -> list[torch.Tensor]:
    """Values of `dtype`; scores are sharp, with a standard deviation of two, and no |q| |k| exceeds `SHARPEST`."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, number, WIDTH, generator=generator) for number in (heads, groups, groups))
    return [x.to(device, dtype) for x in (q * 2 * WIDTH**-0.5, k, v)]


def value_and_gradients(name: str, layout: PackedLayout, qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = prepare(name, layout)(*leaves)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(out.shape, generator=generator).to(out.device, torch.bfloat16).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


def assert_close(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Entries differ by no more than the tolerance times the largest one.

    A score adds up `WIDTH` products in float32 or better, so it is off by at most WIDTH |q| |k| eps / 2. A weight is off by twice that
    share of itself: once for its own score, once for the sum over all. What is rounded to `dtype`, the weights, the output, their
    gradients and the result, costs another eps / 2 each.
    """
    assert got.dtype == dtype and got.shape == exact.shape
    tolerance = WIDTH * SHARPEST * torch.finfo(torch.float32).eps + 2 * torch.finfo(dtype).eps
    largest = max(exact.abs().max().item(), 1.0) if len(exact) else 1.0
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=tolerance * largest)


def assert_agrees(name: str, lengths: tuple[int, ...], heads: int, groups: int, dtype: torch.dtype, device: torch.device = CPU) -> None:
    layout, qkv = PackedLayout(Documents(lengths), device), random_qkv(sum(lengths), heads, groups, dtype, device)
    expected = value_and_gradients("sdpa", layout, [x.double() for x in qkv])
    for got, asked in zip(value_and_gradients(name, layout, qkv), expected, strict=True):
        assert_close(got, asked, dtype)


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", LENGTHS)
@pytest.mark.parametrize("name", ON_CPU)
def test_value_and_gradients_are_those_of_the_dense_mask(name: str, which: str, dtype: torch.dtype, heads: int, groups: int) -> None:
    assert_agrees(name, LENGTHS[which], heads, groups, dtype)


def by_the_formula(qkv: list[torch.Tensor], lengths: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Row by row over its own list of keys."""
    q_ThD, k_ThD, v_ThD = (x.repeat_interleave(qkv[0].shape[1] // x.shape[1], 1) for x in qkv)
    end = 0
    for length in lengths:
        start, end = end, end + length
        for row in range(start, end):
            weights_Kh = (q_ThD[row] * k_ThD[start : row + 1]).sum(-1).softmax(0)
            yield (weights_Kh[..., None] * v_ThD[start : row + 1]).sum(0)


@pytest.mark.parametrize("name", ON_CPU)
def test_the_formula(name: str) -> None:
    lengths = (4, 0, 1, 9)
    qkv = random_qkv(sum(lengths), 6, 2, torch.float64)
    out = prepare(name, PackedLayout(Documents(lengths), CPU))(*qkv)
    torch.testing.assert_close(out, torch.stack(list(by_the_formula(qkv, lengths))), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", LENGTHS)
def test_flex_without_its_kernel(which: str, dtype: torch.dtype, heads: int, groups: int) -> None:
    """Forward only: it has no gradient outside of CUDA."""
    lengths = LENGTHS[which]
    layout, qkv = PackedLayout(Documents(lengths), CPU), random_qkv(sum(lengths), heads, groups, dtype)
    assert_close(prepare("flex", layout)(*qkv), prepare("sdpa", layout)(*(x.double() for x in qkv)), dtype)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_document_knows_no_other(name: str) -> None:
    """Bit by bit, forward and backward: other tokens in document 4, and a loss that looks at the others alone."""
    layout, qkv = PackedLayout(Documents(RAGGED), CPU), random_qkv(sum(RAGGED), 6, 2, torch.float32)
    edited_T = layout.document_T == 4
    of_others, of_edited = [], []
    for scale in (1.0, -3.0):
        leaves = [torch.where(edited_T[:, None, None], scale * x, x).requires_grad_() for x in qkv]
        out = prepare(name, layout)(*leaves)
        gradients = torch.autograd.grad(out[~edited_T].square().sum(), leaves)
        assert not any(gradient[edited_T].any() for gradient in gradients)
        of_others.append([x[~edited_T] for x in (out, *gradients)])
        of_edited.append(out[edited_T])
    assert all(map(torch.equal, *of_others))
    assert not torch.equal(*of_edited)


@pytest.mark.parametrize("name", ON_CPU)
def test_permuted_documents_have_permuted_outputs(name: str) -> None:
    """Padding, blocks and sums may fall differently, so up to rounding."""
    layout, qkv = PackedLayout(Documents(RAGGED), CPU), random_qkv(sum(RAGGED), 6, 2, torch.float32)
    permuted, index_T = layout.permute([4, 9, 0, 2, 8, 1, 3, 6, 5, 7])
    out = prepare(name, permuted)(*(take_rows(x, index_T) for x in qkv))
    torch.testing.assert_close(out, prepare(name, layout)(*qkv)[index_T], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ON_CPU)
def test_nothing_is_read_back(name: str) -> None:
    with FakeTensorMode():
        attend = prepare(name, PackedLayout(Documents(RAGGED), CPU))
        qkv = [torch.empty(sum(RAGGED), heads, WIDTH, requires_grad=True) for heads in (4, 2, 2)]
        attend(*qkv).sum().backward()


class MadeTypes(TorchDispatchMode):
    """Data types of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.seen |= {leaf.dtype for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)}
        return made


@pytest.mark.parametrize("name", ON_CPU)
def test_all_layers_share_what_is_made_of_the_layout(name: str) -> None:
    """A mask is of truth values and a slot an integer; a call makes numbers of the layer alone."""
    attend, qkv = prepare(name, PackedLayout(Documents(RAGGED), CPU)), random_qkv(sum(RAGGED), 4, 4, torch.float32)
    with MadeTypes() as made:
        attend(*qkv)
    assert made.seen == {torch.float32}


def test_area() -> None:
    """Of lengths 10, 8, 0 and 3; buckets are (10, 8) and (3). flex visits the one block of 128 tokens."""
    layout = PackedLayout(Documents((8, 0, 10, 3)), CPU)
    areas = {name: prepare(name, layout).area for name in IMPLEMENTATIONS}
    assert areas == {"loop": 173, "varlen": 173, "bucket": 209, "padded": 400, "sdpa": 441, "flex": 128**2}


def test_buckets_at_most_double_the_area() -> None:
    """Documents of all lengths from 0 to 400, as many of each as random numbers say; the worst are those just above a cut."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = tuple(torch.randint(401, (30,), generator=generator).tolist())
        layout = PackedLayout(Documents(lengths), CPU)
        assert prepare("loop", layout).area == sum(length**2 for length in lengths)
        assert prepare("bucket", layout).area <= 2 * prepare("loop", layout).area
    worst = PackedLayout(Documents((1000, *[708] * 500)), CPU)
    assert 1.9 < prepare("bucket", worst).area / prepare("loop", worst).area <= 2


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("which", LENGTHS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_on_a_gpu_in_bf16(name: str, which: str, heads: int, groups: int) -> None:
    assert_agrees(name, LENGTHS[which], heads, groups, torch.bfloat16, CUDA)


@pytest.mark.gpu
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_gpu_is_not_waited_for(name: str) -> None:
    attend, qkv = prepare(name, PackedLayout(Documents(RAGGED), CUDA)), random_qkv(sum(RAGGED), 4, 4, torch.bfloat16, CUDA)
    leaves = [x.requires_grad_() for x in qkv]
    attend(*leaves).sum().backward()  # the first call compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        prepare(name, PackedLayout(Documents(RAGGED), CUDA))(*leaves).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
