"""Prompt lookup by hand-derived cases, and the fast form against the plain one."""

import numpy as np
import pytest

from specforge.decode.ngram import proposals, propose
from specforge.errors import ConfigError


@pytest.mark.parametrize(
    ("context", "draft_tokens", "expected"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 2, [9, 1]),
        ([1, 2, 3, 9, 1, 2, 3], 8, [9, 1, 2, 3]),  # what followed ends with the context
        ([1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3], 1, [7]),  # the longest n-gram wins over the most recent shorter one
        ([4, 5, 4, 6, 4], 1, [6]),  # of equal n-grams the most recent
        ([7, 7, 7, 7], 3, [7]),  # the occurrence overlaps the suffix; one token followed it
        ([1, 2, 1, 2, 1, 2], 4, [1, 2]),
        ([1, 2, 3], 4, []),
        ([5], 4, []),
        ([], 4, []),
        ([1, 2, 1], 0, []),
    ],
)
def test_propose_by_hand(context: list[int], draft_tokens: int, expected: list[int]) -> None:
    assert propose(context, draft_tokens) == expected


def test_ngram_lengths_bound_the_match() -> None:
    context = [1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3]
    assert propose(context, 1, max_ngram=2) == [8]
    assert propose(context, 1, max_ngram=4) == [7]
    assert propose([1, 2, 9, 2], 1, min_ngram=2) == []


@pytest.mark.parametrize("letters", [2, 3, 8])
@pytest.mark.parametrize(("max_ngram", "min_ngram"), [(3, 1), (5, 2), (1, 1)])
def test_all_starts_equal_one_by_one(letters: int, max_ngram: int, min_ngram: int) -> None:
    generator = np.random.default_rng(letters)
    hits = 0
    for length in (1, 2, 3, 60):
        ids = generator.integers(letters, size=length)
        starts = generator.permutation(length)
        drafts_RK = proposals(ids, starts, 4, max_ngram, min_ngram)
        assert drafts_RK.shape == (length, 4)
        for start, row in zip(starts, drafts_RK, strict=True):
            expected = propose(ids[: start + 1].tolist(), 4, max_ngram, min_ngram)
            assert row.tolist() == expected + [-1] * (4 - len(expected))
            hits += bool(expected)
    assert hits > 10


def test_no_starts_and_no_draft_tokens_are_empty() -> None:
    assert proposals([1, 2, 1], [], 4).shape == (0, 4)
    assert proposals([1, 2, 1], [2], 0).shape == (1, 0)


def test_later_tokens_never_change_a_proposal() -> None:
    ids = [1, 2, 3, 1, 2, 3, 1, 2]
    assert proposals(ids, [4], 3).tolist() == proposals([*ids[:5], 9, 9, 9], [4], 3).tolist() == [[3, 1, 2]]


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda: propose([1, 1], -1), "draft_tokens=-1"),
        (lambda: propose([1, 1], 2, max_ngram=1, min_ngram=2), "min_ngram=2, max_ngram=1"),
        (lambda: proposals([1, 1], [2], 2), r"starts=2\.\.2"),
    ],
)
def test_a_wrong_argument_is_named(call, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        call()
