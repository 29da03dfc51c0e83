"""A method and a batch of random features in memory: the real objects of a training step, without a target on disk."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from specforge.config.methods import Eagle3Options
from specforge.data.vocabulary import DraftVocabulary
from specforge.features.batch import DraftBatch
from specforge.features.store import SampleFeatures
from specforge.features.tables import TargetConfig, TargetTables
from specforge.layers.documents import Documents
from specforge.layers.norm import normalise
from specforge.methods.eagle3 import Eagle3, TTTPlan, derive_config
from specforge.models.eagle3 import Eagle3Draft

AUX_LAYERS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What target and batch are made from: `documents` of `tokens` tokens each."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    documents: int
    tokens: int
    prompt: int = 9
    """Unsupervised tokens that open each document. Nine keep the peer, which scores across document borders, from doing so."""


@dataclass(frozen=True, kw_only=True)
class Shape(Sizes):
    """`draft_tokens` steps of training-time test."""

    draft_vocab: int
    draft_tokens: int


SHAPES = {
    "small": Shape(
        hidden=128, intermediate=352, heads=4, kv_heads=2, head_dim=32, vocab=512, draft_vocab=256,
        documents=4, tokens=256, draft_tokens=7,
    ),
    "wide": Shape(
        hidden=512, intermediate=1408, heads=8, kv_heads=4, head_dim=64, vocab=8192, draft_vocab=4096,
        documents=2, tokens=256, draft_tokens=4,
    ),
}  # fmt: skip


def random_tables(sizes: Sizes, num_layers: int) -> TargetTables:
    config = TargetConfig(
        model_type="llama", hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, num_hidden_layers=num_layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, head_dim=sizes.head_dim, vocab_size=sizes.vocab,
        max_position_embeddings=2 * sizes.tokens, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False, bos_token_id=None, eos_token_ids=(),
    )  # fmt: skip
    return TargetTables(torch.randn(sizes.vocab, sizes.hidden), torch.randn(sizes.vocab, sizes.hidden) / sizes.hidden**0.5, config)


def random_batch(sizes: Sizes, likeliest_D: torch.Tensor, num_captured: int) -> DraftBatch:
    """Random tokens and features; the target's arg-max is one of `likeliest_D`."""
    generator, tokens = torch.Generator().manual_seed(1), sizes.tokens
    samples = [
        SampleFeatures(
            input_ids=torch.randint(sizes.vocab, (tokens,), generator=generator, dtype=torch.int32),
            loss_mask=torch.arange(tokens) >= sizes.prompt,
            aux=torch.randn(tokens, num_captured * sizes.hidden, generator=generator),
            last=normalise(torch.randn(tokens, sizes.hidden, generator=generator), 0.0),
            argmax=likeliest_D[torch.randint(len(likeliest_D), (tokens,), generator=generator)].int(),
            logsumexp=torch.zeros(tokens),
        )
        for _ in range(sizes.documents)
    ]
    return DraftBatch.pack(range(sizes.documents), samples)


def make_method(shape: Shape, **options: Any) -> Eagle3:
    """EAGLE-3 with decay 1, and these of its options; the weights are those of `torch.manual_seed(0)`."""
    torch.manual_seed(0)
    tables = random_tables(shape, len(AUX_LAYERS) + 1)
    chosen = Eagle3Options(draft_tokens=shape.draft_tokens, step_decay=1.0, draft_vocab_size=shape.draft_vocab, **options)
    vocabulary = DraftVocabulary(np.linspace(0, shape.vocab - 1, shape.draft_vocab).astype(np.int64), shape.vocab)
    return Eagle3(chosen, Eagle3Draft(derive_config(chosen, tables, AUX_LAYERS, shape.draft_vocab), vocabulary), tables)


def make_batch(shape: Shape, method: Eagle3) -> DraftBatch:
    """Every target's arg-max is in the draft vocabulary, so that every supervised row counts."""
    return random_batch(shape, torch.arange(shape.draft_vocab) + method.draft.d2t, len(AUX_LAYERS))


def counted_flops(shape: Shape, plan: TTTPlan, documents: Documents) -> int:
    """Floating-point operations of the products that a plain forward and backward over the planned rows cannot avoid.

    A product costs two operations an entry in the forward and four in the backward. Counted are q, k, v from the doubled
    input at each step, the other projections, the head at supervised rows, attention over the causal half and the own
    keys. The fusion of the frozen features has no gradient into them; the teacher's head is computed once a position.
    Norms, rotation, softmax, activation and loss count as nothing.
    """
    hidden, heads_width, keys_width = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    after_keys = 2 * hidden * heads_width + heads_width * hidden + 3 * hidden * shape.intermediate
    entries = documents.num_tokens * 2 * hidden * 2 * keys_width
    pairs, taught = 0, set[int]()
    for index, step in enumerate(plan.steps):
        num_rows = len(step.rows_R)
        entries += num_rows * (after_keys + (2 * hidden * 2 * keys_width if index else 0))
        entries += len(step.supervised_S) * hidden * shape.draft_vocab
        pairs += int((documents.position_T[step.rows_R] + 1 + index).sum())
        taught.update((step.rows_R[step.supervised_S] + 1 + index).tolist())
    fusion, teacher = 4 * documents.num_tokens * len(AUX_LAYERS) * hidden**2, 2 * len(taught) * hidden * shape.draft_vocab
    return 6 * entries + 12 * heads_width * pairs + fusion + teacher
