"""The draft vocabulary: the target tokens a draft can propose, and the tables between the two numberings.

V is the size of the target's vocabulary, Vd that of the draft's. Serving engines read `d2t` as offsets: the target id of draft
token i is i + d2t[i].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from specforge.errors import DataError


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """`kept`: int64 [Vd], strictly ascending target ids below `target_size`. Raises DataError otherwise."""

    kept: np.ndarray
    target_size: int

    def __post_init__(self) -> None:
        if len(self.kept) == 0 or self.kept[0] < 0 or self.kept[-1] >= self.target_size or (np.diff(self.kept) <= 0).any():
            raise DataError(
                f"Draft vocabulary of {len(self.kept)} ids: target ids must be strictly ascending and lie in 0..{self.target_size - 1}; "
                "note that d2t holds offsets (target id minus draft id), not target ids."
            )

    @classmethod
    def from_counts(cls, counts: np.ndarray, size: int, always: Sequence[int] = ()) -> "DraftVocabulary":
        """The `size` most frequent of `counts` [V] (ties: smaller id first), `always` (end-of-turn ids, say) among them.

        Too few distinct tokens are filled up with the smallest unused ids. Size 0, or at least V, keeps the whole vocabulary.
        Raises DataError for ids of `always` outside the vocabulary or more of them than `size`.
        """
        V = len(counts)
        if size == 0 or size >= V:
            return cls(np.arange(V, dtype=np.int64), V)
        forced = np.unique(np.asarray(always, dtype=np.int64))
        outside = forced[(forced < 0) | (forced >= V)]
        if len(outside) or len(forced) > size:
            raise DataError(
                f"always={forced.tolist()}: must be at most {size} ids (the draft vocabulary's size) in 0..{V - 1}; "
                "enlarge the draft vocabulary or correct the ids."
            )
        by_frequency = np.argsort(-np.asarray(counts, dtype=np.int64), kind="stable")
        others = by_frequency[~np.isin(by_frequency, forced)][: size - len(forced)]
        return cls(np.sort(np.concatenate([forced, others])), V)

    @classmethod
    def from_tables(cls, d2t: np.ndarray, t2d: np.ndarray) -> "DraftVocabulary":
        """The vocabulary of a checkpoint, from offsets [Vd] and membership [V]. Raises DataError where the two disagree."""
        t2d = np.asarray(t2d, dtype=bool)
        kept = np.arange(len(d2t), dtype=np.int64) + np.asarray(d2t, dtype=np.int64)
        vocabulary = cls(kept, len(t2d))
        if not np.array_equal(vocabulary.t2d, t2d):
            first = int(np.flatnonzero(vocabulary.t2d != t2d)[0])
            raise DataError(
                f"d2t and t2d disagree, first on target id {first} ({len(kept)} ids in d2t, {int(t2d.sum())} in t2d): "
                "both tables must come from one checkpoint."
            )
        return vocabulary

    @cached_property
    def d2t(self) -> np.ndarray:
        """Offsets kept[i] - i: int64 [Vd]."""
        return self.kept - np.arange(len(self.kept), dtype=np.int64)

    @cached_property
    def t2d(self) -> np.ndarray:
        """Whether the draft can propose a target id: bool [V]."""
        return self.to_draft >= 0

    @cached_property
    def to_draft(self) -> np.ndarray:
        """Draft id of every target id, -1 where there is none: int32 [V]."""
        table = np.full(self.target_size, -1, dtype=np.int32)
        table[self.kept] = np.arange(len(self.kept), dtype=np.int32)
        return table
