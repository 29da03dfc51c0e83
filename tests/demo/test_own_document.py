"""Training on packed documents is training on each by itself, in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from specforge.demo.own_document import packed_logits, pieces

DOC, USER, VOCAB = 1, 2, 64


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.2, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def rows() -> torch.Tensor:
    """Three rows of 24: documents that begin within, at the first and at the last token of a row, and a row without a beginning."""
    ids_BS = torch.randint(3, VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))
    ids_BS[0, [5, 6, 23]] = torch.tensor([DOC, USER, DOC])
    ids_BS[1, [0, 11]] = USER
    return ids_BS


def test_pieces_begin_with_rows_and_documents() -> None:
    documents = pieces(rows().numpy(), (DOC, USER))
    assert documents.lengths == (5, 1, 17, 1, 11, 13, 24)


@pytest.mark.parametrize("gradients", [True, False])
def test_packed_loss_is_that_of_each_piece_alone_and_of_padded_ones(gradients: bool) -> None:
    """Mean cross-entropy over the rows' tokens with the token after them, and all its gradients."""
    ids_BS = rows()
    next_BS = ids_BS.roll(-1)
    packed, alone = model(), model()
    starts = pieces(ids_BS.numpy(), (DOC, USER)).starts.tolist()
    each = [slice(begin, end) for begin, end in pairwise(starts)]
    with torch.set_grad_enabled(gradients):
        logits_BSV = packed_logits(packed, ids_BS, pieces(ids_BS.numpy(), (DOC, USER)))
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), next_BS.flatten())
        text, longest = ids_BS.flatten(), max(part.stop - part.start for part in each)
        padded = torch.stack([F.pad(text[part], (0, longest - part.stop + part.start)) for part in each])
        mask = torch.stack([torch.arange(longest) < part.stop - part.start for part in each])
        of_padded = alone(input_ids=padded, attention_mask=mask.long(), use_cache=False).logits[mask]
        expected = F.cross_entropy(of_padded, next_BS.flatten())
        separate = torch.cat([alone(input_ids=text[None, part], use_cache=False).logits[0] for part in each])
    torch.testing.assert_close(logits_BSV.flatten(0, 1), separate, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    if gradients:
        loss.backward()
        expected.backward()
        for got, wanted in zip(packed.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-9, atol=1e-12)


def test_a_row_of_one_document_is_what_it_was() -> None:
    ids_BS = torch.from_numpy(np.random.default_rng(0).integers(3, VOCAB, (2, 20)))
    got, expected = packed_logits(model(), ids_BS, pieces(ids_BS.numpy(), (DOC, USER))), model()(input_ids=ids_BS).logits
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
