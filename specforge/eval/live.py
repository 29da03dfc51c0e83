"""Stored answers decoded for real, each to where the stored one ends: the number that `walk_acc_len` predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from specforge.decode.engine import Decoded, Decoder
from specforge.decode.statistics import Rounds
from specforge.distributed import World
from specforge.eval.acceptance import answers
from specforge.features.store import LocalFeatureStore


@dataclass(frozen=True)
class LiveAnswer:
    stored: np.ndarray
    """Ids of the stored answer, its end-of-turn token included."""
    decoded: Decoded

    @property
    def same(self) -> bool:
        """Whether the target said the stored answer again."""
        return self.decoded.ids == self.stored.tolist()


def decode_answers(decoder: Decoder, store: LocalFeatureStore, samples: Sequence[int], batch_rows: int = 1) -> list[LiveAnswer]:
    """Every answer of the samples, given everything before it; a decoder without end tokens stops where the stored answer does."""
    asked = []
    for sample in samples:
        ids_S, mask_S, _ = (labels.numpy() for labels in store.labels(sample))
        asked += [(ids_S[:first].astype(np.int64), ids_S[first : last + 1]) for first, last in answers(mask_S) if first > 0]
    live = []
    for begin in range(0, len(asked), batch_rows):
        batch = asked[begin : begin + batch_rows]
        texts = decoder.decode([prompt for prompt, _ in batch], [len(stored) for _, stored in batch])
        live += [LiveAnswer(stored, text) for (_, stored), text in zip(batch, texts, strict=True)]
    return live


def live_numbers(live: Sequence[LiveAnswer], draft_tokens: int, world: World) -> dict[str, Any]:
    """Over all ranks: tokens a round, survival and histogram, and how many answers the target said again."""
    rounds = Rounds.of([answer.decoded for answer in live], draft_tokens)
    sums = torch.tensor([*rounds.histogram, rounds.tokens, len(live), sum(answer.same for answer in live)], device=world.device)
    *histogram, tokens, answered, same = world.sum_(sums.double()).long().tolist()
    numbers = Rounds(np.array(histogram), tokens).numbers()
    return {"answers": answered, "same_answers": same, **numbers}
