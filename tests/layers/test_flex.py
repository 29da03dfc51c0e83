"""The block-sparse form against the blocks: forward on any device, gradients where PyTorch has them, on CUDA."""

import numpy as np
import pytest
import torch

from specforge.errors import ConfigError
from specforge.layers.attention import causal_bias, prefix_and_own_attention
from specforge.layers.documents import Documents, query_blocks
from specforge.layers.flex import BLOCK, block_mask, flex_prefix_and_own_attention
from specforge.layers.shared import Shared

DOCUMENTS = Documents((200, 37, 1, 300))
GROUPS, PAIRS, WIDTH = 2, 2, 16
ROWS = {
    "all": np.arange(DOCUMENTS.num_tokens),
    "suffixes": np.concatenate([np.arange(90, 200), np.arange(215, 237), np.arange(400, 538)]),
    "scattered": np.flatnonzero(np.random.default_rng(0).random(DOCUMENTS.num_tokens) < 0.3),
}


def inputs(rows_R: np.ndarray, num_own: int, device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(len(rows_R), GROUPS * PAIRS, WIDTH), (DOCUMENTS.num_tokens, 2, GROUPS, WIDTH)]
    shapes += [(len(rows_R), GROUPS * PAIRS, WIDTH)] * (2 * num_own)
    return [torch.randn(*shape, device=device) for shape in shapes]


def both(rows_R: np.ndarray, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    q_RhD, prefix_T2gD, *own = tensors
    own_k, own_v = own[: len(own) // 2], own[len(own) // 2 :]
    token_R, blocks = torch.from_numpy(rows_R).to(q_RhD.device), query_blocks(DOCUMENTS, rows_R)
    biases = [causal_bias(block, token_R, q_RhD.dtype) for block in blocks]
    shared_k, shared_v = ([Shared(x) for x in own] for own in (own_k, own_v))
    plain = prefix_and_own_attention(q_RhD, Shared(prefix_T2gD), shared_k, shared_v, blocks, biases)
    return flex_prefix_and_own_attention(q_RhD, prefix_T2gD, own_k, own_v, block_mask(DOCUMENTS, rows_R, q_RhD.device)), plain


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("num_own", [0, 3])
@pytest.mark.parametrize("which", ROWS)
def test_flex_equals_the_blocks(which: str, num_own: int) -> None:
    flex, plain = both(ROWS[which], inputs(ROWS[which], num_own, "cpu"))
    torch.testing.assert_close(flex, plain, rtol=1e-5, atol=1e-5)


def test_blocks_beyond_the_border_are_never_visited() -> None:
    """Blocks of 128 tokens. The last document opens at 238, in block 1, so the rows of blocks 2, 3, 4 see blocks 1 to their own."""
    mask = block_mask(DOCUMENTS, ROWS["all"], torch.device("cpu"))
    visited = mask.kv_num_blocks + (mask.full_kv_num_blocks if mask.full_kv_num_blocks is not None else 0)
    assert visited.flatten().tolist() == [1, 2, 2, 3, 4]


@pytest.mark.parametrize("which", ROWS)
def test_listed_blocks_hold_what_is_seen_and_whole_ones_nothing_else(which: str) -> None:
    rows_R, tokens = ROWS[which], np.arange(DOCUMENTS.num_tokens)
    seen_RT = (tokens <= rows_R[:, None]) & (DOCUMENTS.index_T == DOCUMENTS.index_T[rows_R][:, None])
    mask = block_mask(DOCUMENTS, rows_R, torch.device("cpu"))
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    for number, begin in enumerate(range(0, len(rows_R), BLOCK)):
        some, whole = (
            set(indices[0, 0, number, : counts[0, 0, number]].tolist())
            for counts, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
        )
        for keys in range(-(-DOCUMENTS.num_tokens // BLOCK)):
            seen = seen_RT[begin : begin + BLOCK, keys * BLOCK : (keys + 1) * BLOCK]
            assert keys in some | whole or not seen.any()
            assert keys not in whole or (seen.all() and seen.shape[1] == BLOCK)
        assert not some & whole


def test_a_gradient_off_cuda_is_refused() -> None:
    tensors = inputs(ROWS["suffixes"], 0, "cpu")
    tensors[0].requires_grad_()
    with pytest.raises(ConfigError, match="attention='flex'"):
        both(ROWS["suffixes"], tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("num_own", [0, 3])
@pytest.mark.parametrize("which", ROWS)
def test_the_compiled_kernel_has_the_same_gradients(which: str, num_own: int) -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(ROWS[which], num_own, "cuda")]
    flex, plain = both(ROWS[which], tensors)
    torch.testing.assert_close(flex, plain, rtol=1e-3, atol=1e-3)
    direction = torch.randn_like(flex)
    for got, expected in zip(torch.autograd.grad(flex, tensors, direction), torch.autograd.grad(plain, tensors, direction), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
