"""Blocked attention over prefix and own keys against one dense softmax under a mask; rows and keys of random documents."""

import numpy as np
import pytest
import torch

from specforge.layers import attention
from specforge.layers.attention import causal_bias, prefix_and_own_attention
from specforge.layers.documents import Documents, query_blocks
from specforge.layers.shared import Shared

GROUPS, PAIRS, WIDTH = 2, 3, 8


def dense(
    q_RhD: torch.Tensor,
    prefix_T2gD: torch.Tensor,
    own_k: list[torch.Tensor],
    own_v: list[torch.Tensor],
    token_R: torch.Tensor,
    document_T: torch.Tensor,
) -> torch.Tensor:
    """Every row against every token and its own keys, with a mask over all of them."""
    k_ThD, v_ThD = prefix_T2gD.repeat_interleave(PAIRS, 2).unbind(1)
    scores_hRT = torch.einsum("rhd,thd->hrt", q_RhD, k_ThD)
    own_hRJ = torch.stack([(q_RhD * k).sum(-1).T for k in own_k], -1) if own_k else scores_hRT[..., :0]
    hidden_RT = (torch.arange(len(k_ThD)) > token_R[:, None]) | (document_T != document_T[token_R][:, None])
    weights = torch.cat([scores_hRT.masked_fill(hidden_RT, float("-inf")), own_hRJ], -1).softmax(-1)
    mixed = torch.einsum("hrt,thd->rhd", weights[..., : len(k_ThD)], v_ThD)
    return mixed + sum(weights[..., len(k_ThD) + j].T[..., None] * v for j, v in enumerate(own_v))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("num_own", [0, 3])
@pytest.mark.parametrize("kept_keys", [512, 0, 12])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_blocks_equal_the_dense_form(
    share: float, kept_keys: int, num_own: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the block's weights kept, computed anew in the backward, and both; over all rows and over some."""
    monkeypatch.setattr(attention, "KEPT_KEYS", kept_keys)
    torch.manual_seed(0)
    documents = Documents((5, 19, 1, 30))
    rows = np.flatnonzero(np.random.default_rng(0).random(documents.num_tokens) < share)
    token_R, heads = torch.from_numpy(rows), GROUPS * PAIRS

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype).mul_(2).requires_grad_()

    q_RhD, prefix_T2gD = random(len(rows), heads, WIDTH), random(documents.num_tokens, 2, GROUPS, WIDTH)
    own_k, own_v = ([random(len(rows), heads, WIDTH) for _ in range(num_own)] for _ in range(2))
    blocks = query_blocks(documents, rows, block_rows=7)
    shared_k, shared_v = ([Shared(x) for x in own] for own in (own_k, own_v))
    biases = [causal_bias(block, token_R, q_RhD.dtype) for block in blocks]
    shared, document_T = (Shared(prefix_T2gD), shared_k, shared_v), torch.from_numpy(documents.index_T)
    # Two readers of the same keys.
    fast = torch.cat([prefix_and_own_attention(q, *shared, blocks, biases) for q in (q_RhD, q_RhD.sin())])
    slow = torch.cat([dense(q, prefix_T2gD, own_k, own_v, token_R, document_T) for q in (q_RhD, q_RhD.sin())])
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    direction, inputs = torch.randn_like(fast), [q_RhD, prefix_T2gD, *own_k, *own_v]
    for got, expected in zip(torch.autograd.grad(fast, inputs, direction), torch.autograd.grad(slow, inputs, direction), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=10 * tolerance)
