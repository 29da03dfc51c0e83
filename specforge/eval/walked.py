"""The rounds of single answers, token by token, for people who want to see where a draft was right."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from specforge.eval.acceptance import answers, compare, walk_starts


@dataclass(frozen=True)
class Walked:
    """One stored answer as a greedy chain decoder would say it; its first token is the prefill's and belongs to no round."""

    sample: int
    first: int
    last: int
    """Places of the answer's first and last token in the sample."""
    accepted: list[int]
    """Drafts that each round accepts. After them comes one token of the target's own, unless the answer ends."""
    refused: list[int]
    """The id that each round drafted where the target said something else; -1: none."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def walked_answers(sample: int, ids_S: np.ndarray, loss_mask_S: np.ndarray, proposals_SK: np.ndarray) -> list[Walked]:
    """The answers of a sample; arguments as in `acceptance.count_sample`."""
    walked = []
    for first, last in answers(loss_mask_S):
        exists_SK, right_SK = compare(proposals_SK, ids_S, first, last)
        accepted_S = np.logical_and.accumulate(right_SK, axis=1).sum(1)
        starts = walk_starts(accepted_S)
        refused = []
        for start in starts:
            place = int(accepted_S[start])
            wrong = place < proposals_SK.shape[1] and exists_SK[start, place]
            refused.append(int(proposals_SK[first + start, place]) if wrong else -1)
        walked.append(Walked(sample, first, last, accepted_S[starts].tolist(), refused))
    return walked
