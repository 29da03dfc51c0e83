"""Composing is collating: any size, from one base, bit for bit."""

from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch

from specforge.suite.batches import Batch, base_batches, by_length, collate, compose
from tests.suite.ragged import ragged_task


def assert_same(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype and torch.equal(left, right), field.name
        else:
            assert left == right, field.name


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 8, 12, 100])
@pytest.mark.parametrize(("examples", "equal"), [(1, False), (4, False), (23, False), (24, False), (12, True)])
def test_composed_is_collated(examples: int, equal: bool, size: int) -> None:
    tokens = ragged_task(examples, examples, equal)
    chosen = list(range(0, examples, 2)) if examples == 24 else list(range(examples))
    order = by_length(tokens, chosen)
    expected = [collate(tokens, order[begin : begin + size]) for begin in range(0, len(order), size)]
    found = list(compose(base_batches(tokens, chosen, 4), size))
    assert [len(batch) for batch in found] == [len(batch) for batch in expected]
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_no_examples_are_no_batches() -> None:
    assert list(compose(base_batches(ragged_task(0, 3), [], 4), 2)) == []


def test_a_batch_says_where_each_token_is_predicted() -> None:
    """Against the rows themselves: every scored token once, by the column before it, in its place of the task."""
    tokens = ragged_task(7, 15)
    seen: list[int] = []
    for batch in base_batches(tokens, range(15), 4):
        assert batch.slots == len(batch.lengths_B) * max(batch.lengths_B) == batch.ids_BS.numel()
        places = batch.place_Q.tolist()
        for row, column, token, place in zip(batch.row_Q.tolist(), batch.column_Q.tolist(), batch.token_Q.tolist(), places, strict=True):
            assert batch.ids_BS[row, column + 1] == token
            owner = int(np.searchsorted(tokens.prediction_start_R1, place, "right")) - 1
            within = place - int(tokens.prediction_start_R1[owner])
            assert column + 1 == tokens.first_R[owner] + within < batch.lengths_B[row] == tokens.lengths_R[owner]
            assert batch.ids_BS[row, : batch.lengths_B[row]].tolist() == tokens.row(owner).tolist()
            assert not batch.ids_BS[row, batch.lengths_B[row] :].any()
        seen += places
    assert sorted(seen) == list(range(int(tokens.prediction_start_R1[-1])))


def test_longest_first_and_of_equals_the_earlier() -> None:
    tokens = ragged_task(3, 40)
    longest = [max(len(tokens.row(row)) for row in tokens.rows_of(example)) for example in range(40)]
    order = by_length(tokens, range(40))
    assert sorted(order) == list(range(40)) and len(set(longest)) < 40
    assert all((longest[one], -one) > (longest[other], -other) for one, other in pairwise(order))
    assert by_length(tokens, order[::-3]) == [example for example in order if example in order[::-3]]
    assert by_length(ragged_task(0, 9, equal=True), [5, 1, 7]) == [1, 5, 7]
