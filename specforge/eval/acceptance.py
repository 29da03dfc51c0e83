"""How many drafted tokens are accepted: integer counts of one sample, and the ratios of their sums.

An answer is a maximal run P..E of supervised tokens. Drafting begins at starts s = P..E-1; draft k is for token s+k
and exists iff s+k <= E. A draft is right when it equals the target's arg-max given the text before it; the walk
follows a greedy chain decoder over the text itself, which must therefore be the target's own.

Shapes: S tokens of the sample, K drafts of a start.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

GREEDY_MATCH_MINIMUM = 0.98
"""Below this share of supervised tokens that are the target's arg-max, the text is not its own greedy output."""


@dataclass(frozen=True)
class Columns:
    """Places of the counts in a vector; all counts are additive over samples."""

    draft_tokens: int

    @property
    def correct(self) -> slice:
        return slice(0, self.draft_tokens)

    @property
    def exist(self) -> slice:
        return slice(self.draft_tokens, 2 * self.draft_tokens)

    @property
    def joint(self) -> slice:
        return slice(2 * self.draft_tokens, 3 * self.draft_tokens)

    @property
    def starts(self) -> int:
        return 3 * self.draft_tokens

    @property
    def walk_tokens(self) -> int:
        return 3 * self.draft_tokens + 1

    @property
    def matches(self) -> int:
        return 3 * self.draft_tokens + 2

    @property
    def supervised(self) -> int:
        return 3 * self.draft_tokens + 3

    @property
    def walk_rounds(self) -> slice:
        """Of chains of 1, 2, ... K drafts."""
        return slice(3 * self.draft_tokens + 4, 4 * self.draft_tokens + 4)

    @property
    def walk(self) -> list[int]:
        """Tokens and rounds of the walk of the whole chain."""
        return [self.walk_tokens, self.walk_rounds.stop - 1]

    @property
    def walk_histogram(self) -> slice:
        """Rounds of the whole chain that accept 0, 1, ... K drafts."""
        return slice(4 * self.draft_tokens + 4, self.width)

    @property
    def width(self) -> int:
        return 5 * self.draft_tokens + 5


def answers(loss_mask_S: np.ndarray) -> list[tuple[int, int]]:
    """First and last token of each maximal run of supervised tokens."""
    edges = np.diff(np.concatenate([[0], loss_mask_S.astype(np.int8), [0]]))
    return [(int(p), int(e) - 1) for p, e in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True)]


def compare(proposals_SK: np.ndarray, wanted_S: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Which drafts of the starts first..last-1 exist, and which of them are the token that is wanted: bool [last - first, K] each."""
    token_SK = np.arange(first, last)[:, None] + np.arange(1, proposals_SK.shape[1] + 1)
    exists_SK = token_SK <= last
    return exists_SK, exists_SK & (proposals_SK[first:last] == wanted_S[np.minimum(token_SK, last)])


def count_sample(ids_S: np.ndarray, loss_mask_S: np.ndarray, argmax_S: np.ndarray, proposals_SK: np.ndarray) -> np.ndarray:
    """The counts of one sample: int64 [Columns(K).width].

    Args:
        argmax_S: the target's arg-max at each token, which is about the token after it.
        proposals_SK: the id proposed for token s+k in row s, column k-1; -1: none.
    """
    columns = Columns(proposals_SK.shape[1])
    counts = np.zeros(columns.width, dtype=np.int64)
    supervised = np.flatnonzero(loss_mask_S[1:]) + 1
    counts[columns.supervised] = len(supervised)
    counts[columns.matches] = (argmax_S[supervised - 1] == ids_S[supervised]).sum()
    for first, last in answers(loss_mask_S):
        exists_SK, right_SK = compare(proposals_SK, np.roll(argmax_S, 1), first, last)
        counts[columns.correct] += right_SK.sum(0)
        counts[columns.exist] += exists_SK.sum(0)
        counts[columns.joint] += np.logical_and.accumulate(right_SK, axis=1).sum(0)
        counts[columns.starts] += last - first
        accepted_S = np.logical_and.accumulate(compare(proposals_SK, ids_S, first, last)[1], axis=1).sum(1)
        counts[columns.walk_tokens] += last - first  # every token but the first, which is the prefill's, comes in a round
        rounds = [walk_starts(np.minimum(accepted_S, length)) for length in range(1, columns.draft_tokens + 1)]
        counts[columns.walk_rounds] += [len(starts) for starts in rounds]
        counts[columns.walk_histogram] += np.bincount(accepted_S[rounds[-1]], minlength=columns.draft_tokens + 1)
    return counts


def walk_starts(accepted_S: np.ndarray) -> list[int]:
    """Where rounds begin, from the first start to the last one, when each goes on behind its accepted drafts and one more token."""
    after = (np.arange(1, len(accepted_S) + 1) + accepted_S).tolist()
    starts, at = list[int](), 0
    while at < len(after):
        starts.append(at)
        at = after[at]
    return starts


def walks(counts: np.ndarray, columns: Columns) -> np.ndarray:
    """Tokens per round of summed counts [width], for chains of 1, 2, ... K drafts: [K]; NaN where there was no round."""
    tokens, rounds = counts[columns.walk_tokens], counts[columns.walk_rounds]
    return np.divide(tokens, rounds, out=np.full(np.shape(rounds), np.nan), where=rounds > 0)


def greedy_match(counts: np.ndarray, columns: Columns) -> float:
    """Share of supervised tokens that are the target's arg-max."""
    return float(counts[columns.matches] / max(counts[columns.supervised], 1))


def acceptance(counts: np.ndarray, columns: Columns) -> dict[str, Any]:
    """The acceptance numbers of summed counts, without a prefix; the walk only where the text is the target's own."""
    accuracy_K = counts[columns.correct] / np.maximum(counts[columns.exist], 1)
    survival_K = counts[columns.joint] / max(counts[columns.starts], 1)
    numbers: dict[str, Any] = {
        "starts": int(counts[columns.starts]),
        "avg_acc": float(accuracy_K[0]),
        "per_position_acc": accuracy_K.tolist(),
        "survival": survival_K.tolist(),
        "simulated_acc_len": float(np.cumprod(accuracy_K).sum()),
        "acc_len": float(1 + survival_K.sum()),
        "greedy_match": greedy_match(counts, columns),
    }
    if numbers["greedy_match"] >= GREEDY_MATCH_MINIMUM and counts[columns.walk_tokens] > 0:
        numbers["walk_acc_len_by_draft_tokens"] = walks(counts, columns).tolist()
        numbers["walk_acc_len"] = numbers["walk_acc_len_by_draft_tokens"][-1]
        numbers["walk_histogram"] = counts[columns.walk_histogram].astype(int).tolist()
    return numbers


def domains_of(names: Iterable[str]) -> list[str]:
    """The domains among the names of an evaluation's numbers, which are `eval/DOMAIN/acc_len` and so on."""
    parts = [name.split("/") for name in names]
    return sorted("/".join(part[1:-1]) for part in parts if len(part) > 2 and (part[0], part[-1]) == ("eval", "acc_len"))
