"""How close a training step of DFlash comes to the matrix products in it; measured as in `train_step`."""

import resource
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from specforge.bench.synthetic import Sizes, random_batch, random_tables
from specforge.bench.train_step import PRODUCT_SIZE, Best, Step
from specforge.config.methods import DFlashOptions
from specforge.features.batch import DraftBatch
from specforge.layers.documents import Documents
from specforge.methods.dflash import BlockPlan, DFlash, derive_config
from specforge.models.dflash import DFlashDraft

TARGET_LAYERS = 8


@dataclass(frozen=True, kw_only=True)
class BlockShape(Sizes):
    """`anchors` blocks a document."""

    layers: int
    block_size: int
    anchors: int


BLOCK_SHAPES = {
    "small": BlockShape(
        hidden=128, intermediate=352, heads=4, kv_heads=2, head_dim=32, vocab=512, layers=2, block_size=8, anchors=32,
        documents=4, tokens=256,
    ),
    "wide": BlockShape(
        hidden=512, intermediate=1408, heads=8, kv_heads=4, head_dim=64, vocab=8192, layers=2, block_size=8, anchors=32,
        documents=4, tokens=256,
    ),
}  # fmt: skip


def make_dflash(shape: BlockShape, **options: Any) -> tuple[DFlash, DraftBatch]:
    """Cross-entropy, every position alike, and these of its options; the weights are those of `torch.manual_seed(0)`."""
    torch.manual_seed(0)
    chosen = DFlashOptions(block_size=shape.block_size, anchors=shape.anchors, layers=shape.layers, position_decay=0.0, **options)
    tables, captured = random_tables(shape, TARGET_LAYERS), chosen.captured_layers(TARGET_LAYERS)
    method = DFlash(chosen, DFlashDraft(derive_config(chosen, tables, captured, shape.vocab - 1)), tables)
    return method, random_batch(shape, torch.arange(shape.vocab), len(captured))


def counted_flops(shape: BlockShape, plan: BlockPlan, documents: Documents) -> int:
    """Floating-point operations of the products that a plain forward and backward over the planned blocks cannot avoid.

    A product costs two operations an entry in the forward, two more for each of its inputs that has a gradient: not the captured
    features, not the embeddings that the first layer reads, not the target's head. Counted are keys and values of the tokens before a
    document's last anchor, q, k, v of all rows, and in the last layer only what the drafts that count need of q, attention and all
    that follows. Norms, rotation, softmax, activation and loss count as nothing.
    """
    hidden, heads_width, keys_width = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    before_A, drafts = documents.position_T[plan.anchors_A], len(plan.block_N)
    last_before = np.zeros(len(documents.lengths), dtype=np.int64)
    np.maximum.at(last_before, documents.index_T[plan.anchors_A], before_A)
    context, rows = int(last_before.sum()), len(plan.anchors_A) * shape.block_size
    captured = DFlashOptions(layers=shape.layers).captured_layers(TARGET_LAYERS)
    flops = 4 * context * len(captured) * hidden**2 + 4 * drafts * hidden * shape.vocab
    for layer in range(shape.layers):
        last = layer == shape.layers - 1
        asked = drafts if last else rows
        per_block = np.bincount(plan.block_N, minlength=len(before_A)) if last else np.full(len(before_A), shape.block_size)
        pairs = int(((before_A + shape.block_size) * per_block).sum())
        flops += 6 * context * hidden * 2 * keys_width + (6 if layer else 4) * hidden * (asked * heads_width + rows * 2 * keys_width)
        flops += 6 * asked * (heads_width * hidden + 3 * hidden * shape.intermediate) + 12 * heads_width * pairs
    return flops


def measure(shape: BlockShape, repeats: int) -> dict[str, float]:
    """The numbers of the JSON line; `loss` is in nats per draft."""
    torch.set_num_threads(1)
    method, batch = make_dflash(shape)
    step, product = Step(method, batch), Best()
    left, right = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE).unbind()
    step()
    for _ in range(repeats):
        product.time(lambda: left @ right)
        step.best.time(step)
    rate, plan = 2 * PRODUCT_SIZE**3 / product.seconds, step.plan()
    flops = counted_flops(shape, plan, batch.documents)
    print(f"matrix rate {rate / 1e9:.1f} GFLOP/s, best of {repeats} products of {PRODUCT_SIZE} cubed; counted {flops / 1e9:.2f} GFLOP")
    return {
        "ms": 1e3 * step.best.seconds,
        "floor_ms": 1e3 * flops / rate,
        "ratio_to_floor": step.best.seconds * rate / flops,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss": step.loss_sum / plan.weight,
    }
