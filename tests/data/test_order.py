import numpy as np
import pytest

from specforge.data.order import SampleOrder
from specforge.errors import DataError


@pytest.mark.parametrize("batch_samples", [1, 3, 7, 10, 23])
def test_every_chunking_walks_the_same_order_and_each_epoch_holds_every_sample_once(batch_samples: int) -> None:
    order = SampleOrder(10, seed=3)
    whole = SampleOrder(10, seed=3).ids(0, 50)
    walked = np.concatenate([order.ids(position, batch_samples) for position in range(0, 50, batch_samples)])[:50]
    np.testing.assert_array_equal(walked, whole)
    for epoch in whole.reshape(5, 10):
        assert sorted(epoch) == list(range(10))


def test_epochs_and_seeds_differ_and_any_position_can_be_asked_for() -> None:
    order = SampleOrder(100, seed=3)
    first, second = order.ids(0, 100), order.ids(100, 100)
    assert (first != second).any()
    assert (first != SampleOrder(100, seed=4).ids(0, 100)).any()
    np.testing.assert_array_equal(order.ids(100_050, 10), SampleOrder(100, seed=3).ids(100_000, 100)[50:60])
    np.testing.assert_array_equal(order.ids(0, 100), first)


def test_the_order_is_pinned() -> None:
    """A run continues under another version of NumPy: these numbers must never change."""
    assert SampleOrder(8, seed=0).ids(0, 16).tolist() == [3, 2, 1, 6, 0, 7, 4, 5, 7, 4, 5, 1, 6, 2, 0, 3]


def test_every_sample_is_equally_likely_in_every_place() -> None:
    """4 samples, 4000 epochs: each of the 16 counts is Binomial(4000, 1/4), whose standard deviation is 27.4."""
    places = SampleOrder(4, seed=1).ids(0, 16_000).reshape(4000, 4)
    counts = np.stack([np.bincount(places[:, place], minlength=4) for place in range(4)])
    assert np.abs(counts - 1000).max() < 4 * 27.4


def test_only_two_epochs_are_remembered() -> None:
    order = SampleOrder(5, seed=0)
    for position in range(0, 100, 5):
        order.ids(position, 5)
    assert len(order._epochs) == 2


def test_an_empty_order_is_refused() -> None:
    with pytest.raises(DataError, match="num_samples=0"):
        SampleOrder(0, seed=0)
