"""Attention of blocks against one softmax over each row's own list of keys."""

import numpy as np
import pytest
import torch

from specforge.layers import block_attention
from specforge.layers.block_attention import BlockMask
from specforge.layers.documents import Documents
from specforge.layers.shared import Shared

DOCUMENTS = Documents((9, 1, 40, 23))
ANCHORS = np.array([0, 3, 4, 8, 9, 10, 11, 12, 20, 31, 48, 49, 50, 72])
"""First, middle and last tokens; a document of one token; blocks that reach beyond their document's end."""
SIZE, HEADS, GROUPS, WIDTH = 5, 6, 2, 4


def slow(q: torch.Tensor, own: torch.Tensor, context: torch.Tensor, window: int) -> torch.Tensor:
    rows = []
    for block, anchor in enumerate(ANCHORS.tolist()):
        first = int(DOCUMENTS.starts[DOCUMENTS.index_T[anchor]])
        for row in range(SIZE):
            least = anchor + row - window + 1 if window else first
            seen = [context[:, token] for token in range(max(first, least), anchor)]
            seen += [own[:, block, other] for other in range(SIZE) if not window or (other <= row and anchor + other >= least)]
            k, v = torch.stack(seen, 2).repeat_interleave(HEADS // GROUPS, 1)
            weights = (k @ q[block, row, :, :, None])[..., 0].softmax(-1)
            rows.append((weights[:, None] @ v)[:, 0])
    return torch.stack(rows).view(len(ANCHORS), SIZE, HEADS, WIDTH)


@pytest.fixture(params=[(512, 128), (512, 11), (0, 11), (12, 1)], ids=lambda pair: f"keep{pair[0]}-rows{pair[1]}")
def _sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights kept or computed anew; one group, some, or one of each block."""
    monkeypatch.setattr(block_attention, "KEPT_KEYS", request.param[0])
    monkeypatch.setattr(block_attention, "GROUP_ROWS", request.param[1])


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("window", [0, 2, 3, 7, 100])
def test_blocks_equal_lists_of_keys(window: int) -> None:
    """Value and all gradients, sharp scores; two readers of one context, so that gradients are added up."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(2).requires_grad_()

    q, own = random(len(ANCHORS), SIZE, HEADS, WIDTH), random(2, len(ANCHORS), SIZE, GROUPS, WIDTH)
    context = random(DOCUMENTS.num_tokens, 2, GROUPS, WIDTH)
    mask = BlockMask.of(DOCUMENTS, ANCHORS, SIZE, window, torch.device("cpu"), torch.float64)
    shared, inputs = Shared(context), (q, own, context)
    fast = [block_attention.block_attention(scale * q, own, shared, mask) for scale in (1, -0.5)]
    expected = [slow(scale * q, own, context.transpose(0, 1), window) for scale in (1, -0.5)]
    torch.testing.assert_close(fast, expected, rtol=1e-12, atol=1e-12)
    into = torch.randn(2, *q.shape, generator=generator, dtype=torch.float64)
    gradients = (torch.autograd.grad(outputs, inputs, list(into)) for outputs in (fast, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_a_group_reads_no_more_than_its_stretch() -> None:
    """The keys of a group end at its last anchor, and begin where a window does."""
    for window, begin in ((0, 10), (7, 42)):
        mask = BlockMask.of(DOCUMENTS, np.array([48, 49]), SIZE, window, torch.device("cpu"), torch.float32)
        assert [(group.key_start, group.key_end) for group in mask.groups] == [(begin, 49)]
