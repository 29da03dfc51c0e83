"""What keeps a mixture's gate from sending all rows to the same experts.

With the weights w_r of the taught rows r of a sample s in the loss, W_s their sum, and g_re the gate's softmax in a layer,

    balance_sum = mean over layers of  sum_s W_s std_e(I_se) / mean_e(I_se)        I_se = sum over r of w_r g_re

A sample by itself and not a batch, so that the sum adds up over micro-batches and ranks as every loss here does (the auxiliary loss of
arXiv 2412.19437, section 2.1.2, is of a sequence too). Rows that no target is taught do not count: which of them are computed at all
depends on how samples are packed.
"""

from collections.abc import Sequence

import numpy as np
import torch

from specforge.features.batch import DraftBatch
from specforge.layers.moe import balance_loss
from specforge.layers.rows import to_device


def balance_sum(shares_NE: Sequence[torch.Tensor], batch: DraftBatch, start_N: np.ndarray, weight_N: torch.Tensor) -> torch.Tensor:
    """Scalar, with gradient.

    Args:
        shares_NE: the gate's softmax of the taught rows in each layer.
        start_N: a packed token of the rows' samples, int64.
        weight_N: w_r.
    """
    device, documents = weight_N.device, batch.documents
    document_N, number_D1 = to_device(documents.index_T[start_N], device), torch.arange(len(documents.lengths), device=device)[:, None]
    weight_DN = (document_N == number_D1) * weight_N
    importance_LDE = torch.stack([weight_DN.to(share_NE.dtype) @ share_NE for share_NE in shares_NE])
    return (balance_loss(importance_LDE).mean(0) * weight_DN.sum(1)).sum()
