"""The layout against plain Python lists of documents."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from specforge.layers.documents import Documents
from specforge.layers.packed import PackedLayout

CPU = torch.device("cpu")
LENGTHS = [(3, 0, 1, 5), (0, 0, 4), (2, 6, 0, 0), (0, 0), (7,), ()]
"""Empty documents inside, in front, at the end, nothing but those; one document; none."""


def layout_of(lengths: tuple[int, ...]) -> PackedLayout:
    return PackedLayout(Documents(lengths), CPU)


def tokens_of(lengths: tuple[int, ...]) -> list[list[int]]:
    """The packed token indices of each document."""
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]


def assert_holds(part: tuple[PackedLayout, torch.Tensor], documents: list[list[int]]) -> None:
    layout, index_R = part
    assert layout.documents.lengths == tuple(map(len, documents))
    assert index_R.tolist() == [token for document in documents for token in document]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_device_derives_what_the_host_knows(lengths: tuple[int, ...]) -> None:
    layout, documents = layout_of(lengths), tokens_of(lengths)
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.tolist() == [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    repeated = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    assert torch.equal(layout.document_T, repeated)
    assert layout.position_T.tolist() == [position for document in documents for position in range(len(document))]
    assert layout.documents.longest == max([0, *lengths])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_documents_move_with_their_rows(lengths: tuple[int, ...]) -> None:
    layout, documents = layout_of(lengths), tokens_of(lengths)
    order = list(range(0, len(lengths), 2)) + list(range(1, len(lengths), 2))[::-1]
    assert_holds(layout.permute(order), [documents[number] for number in order])
    keep = [number % 3 != 1 for number in range(len(lengths))]
    assert_holds(layout.filter(keep), [document for document, kept in zip(documents, keep, strict=True) if kept])
    assert_holds(layout.filter([False] * len(lengths)), [])
    cut = len(lengths) // 2
    first, nothing, second = layout.split([cut, 0, len(lengths) - cut])
    assert_holds(first, documents[:cut])
    assert_holds(nothing, [])
    assert_holds(second, documents[cut:])
    assert_holds(PackedLayout.merge([part for part, _ in (first, nothing, second)]), documents)


def test_a_choice_that_is_not_of_all_documents_is_refused() -> None:
    with pytest.raises(IndexError, match="boolean"):
        layout_of((3, 0, 1)).filter([True, True])


def test_what_is_derived_is_derived_once() -> None:
    layout = layout_of((3, 0, 1))
    assert layout.document_T is layout.document_T
    assert layout.position_T is layout.position_T


def test_nothing_is_read_back() -> None:
    """A fake tensor has no values, so that reading one, or a shape that depends on one, raises."""
    with FakeTensorMode():
        layout = layout_of((3, 0, 1, 5))
        parts = [layout.permute([2, 0, 3, 1]), layout.filter([True, False, True, True]), *layout.split([1, 3])]
        merged, index_R = PackedLayout.merge([part for part, _ in parts])
        assert merged.position_T.shape == index_R.shape == (27,)


def test_buckets_hold_each_document_that_is_not_empty() -> None:
    """8² is at least half of 10², 7² is not; 5² is at least half of 7², 3² is not."""
    assert Documents((3, 8, 0, 5, 10, 7, 5)).buckets == ((4, 1), (5, 3, 6), (0,))
    assert Documents((0, 0)).buckets == ()
