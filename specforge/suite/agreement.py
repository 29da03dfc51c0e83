"""How much of what a task scores a draft would have foreseen: a free look at its acceptance on other text than it was trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from specforge.distributed import World
from specforge.features.batch import DraftBatch
from specforge.features.store import SampleFeatures
from specforge.features.target import Target
from specforge.layers.rows import to_device
from specforge.methods.base import Plan
from specforge.suite.tokens import TaskTokens

_CAPTURE_TOKENS = 8192


@torch.no_grad()
def draft_accepted(target: Target, method: Any, tokens: TaskTokens, examples: Sequence[int], world: World) -> float:
    """Share of the scored positions of the right rows at which the draft's first token is the target's arg-max; NaN where there are none.

    Args:
        method: a trained method (`specforge.methods`) in evaluation mode, on the target's device.
        examples: those of this rank.
    """
    rows = [int(tokens.example_start_E1[example] + tokens.gold_E[example]) for example in examples]
    counts = torch.zeros(2, dtype=torch.float64, device=target.device)
    for some in _packed(rows, tokens):
        texts = [tokens.row(row) for row in some]
        captured = target.capture(texts, method.draft.config.aux_layer_ids)
        first = [max(int(tokens.scored_R[row]) - 1, 1) for row in some]  # drafting begins one token before, and behind one that was read
        masks = [torch.arange(len(text)) >= begin for text, begin in zip(texts, first, strict=True)]
        samples = [
            SampleFeatures.of({"input_ids": torch.from_numpy(text), "loss_mask": mask, **features})
            for text, mask, features in zip(texts, masks, captured, strict=True)
        ]
        batch = DraftBatch.pack(range(len(some)), samples)
        plan = method.plan(replace(batch, argmax=batch.argmax.cpu()))  # on the host, which waits for the capture here and nowhere else
        counts += foreseen(method, batch.to(target.device), plan)
    right, total = world.sum_(counts).tolist()
    return right / total if total else float("nan")


def foreseen(method: Any, batch: DraftBatch, plan: Plan) -> torch.Tensor:
    """How many of the scored positions a draft's first token gets right, and how many there are: int64 [2]."""
    proposals_T = method(batch, plan).proposals_TK[:, 0]
    last_D = to_device(batch.documents.starts[1:] - 1, proposals_T.device)
    starts_T = batch.loss_mask.index_fill(0, last_D, False)
    return torch.stack([((proposals_T == batch.argmax) & starts_T).sum(), starts_T.sum()])


def _packed(rows: Sequence[int], tokens: TaskTokens) -> Iterator[list[int]]:
    """Neighbours in length, so many that they fit into one forward."""
    waiting: list[int] = []
    for row in sorted(rows, key=lambda row: tokens.lengths_R[row]):
        if waiting and (len(waiting) + 1) * tokens.lengths_R[row] > _CAPTURE_TOKENS:
            yield waiting
            waiting = []
        if tokens.first_R[row] < tokens.lengths_R[row]:
            waiting.append(row)
    if waiting:
        yield waiting
