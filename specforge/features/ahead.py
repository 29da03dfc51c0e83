"""Reading ahead: the next item is made while the present one is used."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items in the same order; a thread makes one more than was asked for. Its errors are raised where the item would come."""
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        end = object()
        following = reader.submit(next, items, end)
        while (item := following.result()) is not end:
            following = reader.submit(next, items, end)
            yield item  # type: ignore[misc]
