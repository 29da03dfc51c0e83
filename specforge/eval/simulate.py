"""Drafting along stored answers, without the target: what a chain or a tree would be accepted in service.

The stored features are those that the target would compute again, and the stored answer is what it would say, so greedy
decoding takes the very same rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from specforge.decode.drafter import Drafter
from specforge.decode.engine import Decoded
from specforge.eval.acceptance import answers
from specforge.features.store import LocalFeatureStore, SampleFeatures


@dataclass
class _Answer:
    """A stored answer on its way: tokens up to `at` are committed."""

    ids: list[int]
    aux_SF: torch.Tensor
    at: int
    last: int
    text: Decoded

    @classmethod
    def of(cls, sample: SampleFeatures, first: int, last: int) -> "_Answer":
        ids = sample.input_ids.tolist()
        return cls(ids, sample.aux, first, last, Decoded([ids[first]]))

    @property
    def going(self) -> bool:
        return self.at < self.last

    def accepted(self, parent_N: Sequence[int], ids_N: Sequence[int]) -> int:
        """Length of the tree's path along the text."""
        tip, length = 0, 0
        for node, parent in enumerate(parent_N):
            if parent == tip and self.at + length < self.last and ids_N[node] == self.ids[self.at + length + 1]:
                tip, length = node, length + 1
        return length


def simulate(
    drafter: Drafter, store: LocalFeatureStore, samples: Sequence[int], device: torch.device, batch_rows: int = 16
) -> list[Decoded]:
    """The rounds of every answer of the samples."""
    asked = []
    for sample in samples:
        features = store.read(sample)
        asked += [_Answer.of(features, first, last) for first, last in answers(features.loss_mask.numpy()) if first > 0]
    for begin in range(0, len(asked), batch_rows):
        batch = asked[begin : begin + batch_rows]
        drafter.begin([np.array(answer.ids[: answer.at]) for answer in batch], max(answer.last for answer in batch) + 1)
        _extend(drafter, batch, [0] * len(batch), device)
        while any(answer.going for answer in batch):
            before = [answer.at for answer in batch]
            proposal = drafter.propose()
            parents, ids = proposal.tree.parent_BN.tolist(), proposal.ids_BK.tolist()
            for answer, parent_N, ids_K in zip(batch, parents, ids, strict=True):
                if answer.going:
                    accepted = answer.accepted(parent_N, [-1, *ids_K])
                    committed = min(accepted + 1, answer.last - answer.at)
                    answer.text.accepted.append(accepted)
                    answer.text.committed.append(committed)
                    answer.text.ids += answer.ids[answer.at + 1 : answer.at + committed + 1]
                    answer.at += committed
            if any(answer.going for answer in batch):
                _extend(drafter, batch, before, device)
    return [answer.text for answer in asked]


def _extend(drafter: Drafter, batch: Sequence[_Answer], before: Sequence[int], device: torch.device) -> None:
    """Give the drafter the rows from `before` to the last committed token; none of an answer that has ended."""
    counts = [answer.at - begin if answer.going else 0 for answer, begin in zip(batch, before, strict=True)]
    ids_BM = torch.zeros(len(batch), max(counts), dtype=torch.long)
    aux_BMF = torch.zeros(*ids_BM.shape, batch[0].aux_SF.shape[1], dtype=batch[0].aux_SF.dtype)
    for row, (answer, begin, count) in enumerate(zip(batch, before, counts, strict=True)):
        ids_BM[row, :count] = torch.tensor(answer.ids[begin + 1 : begin + 1 + count], dtype=torch.long)
        aux_BMF[row, :count] = answer.aux_SF[begin : begin + count]
    drafter.extend(ids_BM.to(device), aux_BMF.to(device), counts)
