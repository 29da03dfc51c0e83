"""How the rounds of a decoding went, as the engines count: the target's own token after the drafts is part of a round.

Shapes: K drafts of a round.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np

from specforge.decode.engine import Decoded


@dataclass(frozen=True)
class Rounds:
    """Additive counts of rounds."""

    histogram: np.ndarray
    """Rounds by the number of drafts that were accepted and kept: int64 [K + 1]."""
    tokens: int
    """Committed in rounds; the first token of a text is the prefill's and belongs to none."""

    @classmethod
    def of(cls, texts: Iterable[Decoded], draft_tokens: int) -> Self:
        """Args: `draft_tokens`, the longest path of a round."""
        texts = list(texts)
        accepted = np.array([count for text in texts for count in text.accepted], dtype=np.int64)
        return cls(np.bincount(accepted, minlength=draft_tokens + 1), sum(sum(text.committed) for text in texts))

    @property
    def rounds(self) -> int:
        return int(self.histogram.sum())

    def numbers(self) -> dict[str, Any]:
        """survival: s_k, the share of rounds that accept at least k; alpha: s_k / s_(k-1), None where no round got so far."""
        at_least = np.cumsum(self.histogram[::-1])[::-1]
        return {
            "rounds": self.rounds,
            "tokens": self.tokens,
            "tokens_per_round": self.tokens / max(self.rounds, 1),
            "survival": (at_least[1:] / max(self.rounds, 1)).tolist(),
            "alpha": [int(this) / int(before) if before else None for before, this in pairwise(at_least)],
            "histogram": self.histogram.tolist(),
        }


def mean_of_texts(texts: Sequence[Decoded]) -> float:
    """Mean over texts of their own tokens per round; the pooled number weighs long texts more."""
    ratios = [sum(text.committed) / len(text.committed) for text in texts if text.committed]
    return float(np.mean(ratios)) if ratios else float("nan")
