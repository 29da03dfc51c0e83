import numpy as np
import pytest

from specforge.data.packing import pack
from specforge.errors import DataError


@pytest.mark.parametrize("seed", range(30))
def test_random_lengths_are_packed_completely_within_budget_and_equally_often(seed: int) -> None:
    """The bound: where m bins fail, all hold more than half a budget, so m stays below twice the tokens over the budget."""
    rng = np.random.default_rng(seed)
    ranks, budget_tokens = int(rng.integers(1, 6)), 100
    lengths = rng.integers(1, budget_tokens + 1, int(rng.integers(0, 60))).tolist()
    packed = pack(lengths, budget_tokens, ranks)
    assert len(packed) == ranks
    assert len({len(micros) for micros in packed}) == 1
    loads = [[sum(lengths[index] for index in micro) for micro in micros] for micros in packed]
    assert max(max(micros) for micros in loads) <= budget_tokens
    assert sorted(index for micros in packed for micro in micros for index in micro) == list(range(len(lengths)))
    least = -(-sum(lengths) // (budget_tokens * ranks))
    assert len(packed[0]) <= max(1, 2 * least)


def test_equal_lengths_fill_the_fewest_bins() -> None:
    assert pack([5] * 8, 10, 2) == [[[0, 4], [3, 7]], [[1, 5], [2, 6]]]


def test_one_more_round_where_the_fewest_bins_do_not_fit() -> None:
    """18 tokens would go into 2 bins of 10, but no two samples go into one."""
    assert pack([6, 6, 6], 10, 1) == [[[0], [1], [2]]]


def test_bins_by_hand() -> None:
    """22 tokens, 2 ranks of 12: longest first 9 | 6, then 4 to the 6, then 3 to the 9."""
    assert pack([3, 9, 4, 6], 12, 2) == [[[0, 1]], [[2, 3]]]


def test_micro_batches_run_at_the_same_time_are_equally_long_and_no_rank_gets_the_longest_twice() -> None:
    """One sample a bin: rounds (10, 9), (8, 7), dealt to and fro, give each rank 17 tokens."""
    assert pack([10, 9, 8, 7], 10, 2) == [[[0], [3]], [[1], [2]]]


def test_fewer_samples_than_ranks_leave_empty_micro_batches() -> None:
    assert pack([4], 10, 3) == [[[0]], [[]], [[]]]
    assert pack([], 10, 2) == [[[]], [[]]]


def test_a_sample_beyond_the_budget_names_both_numbers() -> None:
    with pytest.raises(DataError, match=r"11 tokens exceeds train\.micro_batch_tokens=10"):
        pack([3, 11], 10, 2)
