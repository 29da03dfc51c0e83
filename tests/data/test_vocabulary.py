import numpy as np
import pytest

from specforge.data.vocabulary import DraftVocabulary
from specforge.errors import DataError

COUNTS = np.array([0, 5, 0, 7, 5, 0, 1, 9])


def test_tables_by_hand() -> None:
    """The three most frequent of COUNTS are 7 (9 times), 3 (7) and, of the two that occur 5 times, the smaller id 1."""
    vocabulary = DraftVocabulary.from_counts(COUNTS, 3)
    assert vocabulary.kept.tolist() == [1, 3, 7]
    assert vocabulary.d2t.tolist() == [1, 2, 5]
    assert vocabulary.t2d.tolist() == [False, True, False, True, False, False, False, True]
    assert vocabulary.to_draft.tolist() == [-1, 0, -1, 1, -1, -1, -1, 2]
    assert (vocabulary.d2t.dtype, vocabulary.t2d.dtype, vocabulary.to_draft.dtype) == (np.int64, np.bool_, np.int32)


def test_given_ids_are_always_kept() -> None:
    assert DraftVocabulary.from_counts(COUNTS, 3, always=(5, 7, 5)).kept.tolist() == [3, 5, 7]


def test_too_few_distinct_tokens_are_filled_up_with_the_smallest_unused_ids() -> None:
    assert DraftVocabulary.from_counts(COUNTS, 7).kept.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert DraftVocabulary.from_counts(COUNTS, 6, always=(5,)).kept.tolist() == [1, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("size", [0, 8, 9])
def test_the_whole_vocabulary(size: int) -> None:
    vocabulary = DraftVocabulary.from_counts(COUNTS, size)
    assert vocabulary.d2t.tolist() == [0] * 8
    assert vocabulary.t2d.all()


def test_tables_rebuild_the_vocabulary() -> None:
    vocabulary = DraftVocabulary.from_counts(COUNTS, 3)
    rebuilt = DraftVocabulary.from_tables(vocabulary.d2t, vocabulary.t2d)
    assert (rebuilt.kept.tolist(), rebuilt.target_size) == ([1, 3, 7], 8)


@pytest.mark.parametrize(
    ("d2t", "present", "message"),
    [
        ([1, 0, 5], [1, 7], "strictly ascending"),  # ids 1, 1, 7
        ([3, 0, 5], [1, 3, 7], "strictly ascending"),  # ids 3, 1, 7
        ([1, 3, 7], [1, 3, 7], r"strictly ascending and lie in 0\.\.7.*offsets"),  # target ids where offsets belong
        ([-1, 0], [1], "strictly ascending"),
        ([], [], "strictly ascending"),
        ([1, 2, 5], [1, 4, 7], r"disagree, first on target id 3 \(3 ids in d2t, 3 in t2d\)"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(d2t: list[int], present: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DraftVocabulary.from_tables(np.array(d2t, dtype=np.int64), np.isin(np.arange(8), present))


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(DataError, match=r"always=\[8\]"):
        DraftVocabulary.from_counts(COUNTS, 3, always=(8,))
    with pytest.raises(DataError, match=r"at most 1 ids"):
        DraftVocabulary.from_counts(COUNTS, 1, always=(2, 3))
