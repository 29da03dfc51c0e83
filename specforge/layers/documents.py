"""Where the documents of a packed batch begin and end, known on the host so that nothing reads it back from a device."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Documents:
    """Documents laid end to end: T tokens in all."""

    lengths: tuple[int, ...]

    @cached_property
    def starts(self) -> np.ndarray:
        """First token of each document, and T at the end: int64 [documents + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype(np.int64)

    @cached_property
    def index_T(self) -> np.ndarray:
        """Document of each token: int64 [T]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def position_T(self) -> np.ndarray:
        """Position of each token within its document: int64 [T]."""
        return np.arange(self.num_tokens) - self.starts[self.index_T]

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def longest(self) -> int:
        """Tokens of the longest document; 0 without any."""
        return max(self.lengths, default=0)

    @cached_property
    def buckets(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the documents that are not empty, in groups of similar length, longest first.

        No document is shorter than its group's longest by more than a factor of the square root of two. So the squares of all documents,
        each padded to its group's longest, are at most twice the squares of their own lengths.
        """
        buckets: list[list[int]] = []
        for number in sorted(range(len(self.lengths)), key=lambda number: -self.lengths[number]):
            length = self.lengths[number]
            if buckets and 2 * length**2 >= self.lengths[buckets[-1][0]] ** 2:
                buckets[-1].append(number)
            elif length:
                buckets.append([number])
        return tuple(map(tuple, buckets))


@dataclass(frozen=True)
class QueryBlock:
    """Rows `row_start:row_end` of a step look at keys `key_start:key_end` of the packed step-0 keys, causally."""

    row_start: int
    row_end: int
    key_start: int
    key_end: int
    first_token: int
    """Packed token index of the first row: keys up to it are seen by all rows of the block."""

    @property
    def rows(self) -> slice:
        return slice(self.row_start, self.row_end)

    @property
    def keys(self) -> slice:
        return slice(self.key_start, self.key_end)


def query_blocks(documents: Documents, rows: np.ndarray, block_rows: int = 128) -> list[QueryBlock]:
    """Cut the rows (ascending packed token indices) at document borders, and each document's into equal blocks of at most `block_rows`.

    A block's keys end at its last row, so that the part above the diagonal is mostly never computed.
    """
    blocks = []
    borders = np.searchsorted(rows, documents.starts)
    for document, (begin, stop) in enumerate(pairwise(borders)):
        cuts = np.linspace(begin, stop, -(-(stop - begin) // block_rows) + 1).astype(np.int64)
        for start, end in pairwise(cuts.tolist()):
            first, last = int(rows[start]), int(rows[end - 1])
            blocks.append(QueryBlock(start, end, int(documents.starts[document]), last + 1, first))
    return blocks
