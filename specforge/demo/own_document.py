"""Packed attention for a model of transformers: each token of a batch sees its own document up to itself.

Rows of a stream hold ends and beginnings of several documents. They are laid end to end, cut where documents begin, and given to the model
as one row whose positions start anew with each piece; `specforge.layers.packed_attention` does the rest, so nothing is padded and no mask
over all tokens exists.

Shapes: B rows of S tokens, T = B * S, h query heads of width D, g key heads.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel

from specforge.layers.attention_choice import resolve
from specforge.layers.documents import Documents
from specforge.layers.packed import PackedLayout
from specforge.layers.packed_attention import PackedAttention, prepare

NAME = "specforge_packed"
"""As transformers knows it: `attn_implementation`."""


def pieces(ids_BS: np.ndarray, first_ids: Sequence[int]) -> Documents:
    """The documents of rows laid end to end: one begins with each row, and wherever one of `first_ids` stands."""
    begins_BS = np.isin(ids_BS, first_ids)
    begins_BS[:, 0] = True
    starts = np.append(np.flatnonzero(begins_BS), ids_BS.size)
    return Documents(tuple(np.diff(starts).tolist()))


def packed_logits(model: PreTrainedModel, ids_BS: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Logits [B, S, V] of rows of which `documents` are the pieces. The model has its own attention again afterwards."""
    layout = PackedLayout(documents, ids_BS.device)
    chosen = resolve("auto", ids_BS.device, model.dtype, torch.is_grad_enabled())
    attention = prepare(chosen.name, layout)
    own = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    output = model(input_ids=ids_BS.reshape(1, -1), position_ids=layout.position_T[None], use_cache=False, packed_attention=attention)
    model.set_attn_implementation(own)
    logits_1TV: torch.Tensor = output.logits
    return logits_1TV.unflatten(1, ids_BS.shape)[0]


def _attend(
    module: torch.nn.Module,
    query_1hTD: torch.Tensor,
    key_1gTD: torch.Tensor,
    value_1gTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    packed_attention: PackedAttention,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers asks of an attention function: [1, T, h, D], and no weights."""
    q_ThD, k_TgD, v_TgD = (x_1hTD[0].transpose(0, 1) for x_1hTD in (query_1hTD * scaling, key_1gTD, value_1gTD))
    return packed_attention(q_ThD, k_TgD, v_TgD)[None], None


AttentionInterface.register(NAME, _attend)
