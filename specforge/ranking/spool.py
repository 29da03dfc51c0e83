"""Rows in the order of a file, put in the order of users and time without holding their signs in memory.

While rows come in, their signs go to the disk; what stays in memory is 18 bytes a row, from which the order follows.
"""

import contextlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from specforge.ranking.rows import Row, RowCounts
from specforge.ranking.tensor_file import Pieces, write_tensors

_CHUNK_ROWS = 1024
"""Rows whose signs are in memory at one time."""


class Spool:
    """Two files in `folder`, which are gone when the `with` block ends."""

    def __init__(self, folder: Path, slots: int) -> None:
        self._slots = slots
        self._paths = folder / "signs.spool", folder / "counts.spool"
        self._user, self._time, self._signs = array("i"), array("q"), array("i")
        self._label, self._scored = array("b"), array("b")

    def __enter__(self) -> Self:
        self._open = contextlib.ExitStack()
        for path in self._paths:
            self._open.callback(path.unlink)
        self._sign_file, self._count_file = (self._open.enter_context(path.open("wb")) for path in self._paths)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def add(self, row: Row) -> None:
        array("q", row.signs).tofile(self._sign_file)
        array("h", row.counts).tofile(self._count_file)
        self._user.append(row.user)
        self._time.append(row.time)
        self._signs.append(len(row.signs))
        self._label.append(row.label)
        self._scored.append(row.scored)

    def write(self, path: Path, ids: Sequence[str], max_rows: int, counts: RowCounts) -> None:
        """The tensors of a UserStore.

        Args:
            ids: of the users, by number.
            max_rows: the newest rows of a user that are kept; 0: all. What is cut is added to `counts`.
        """
        self._sign_file.flush()
        self._count_file.flush()
        user_N, signs_N = np.frombuffer(self._user, np.int32), np.frombuffer(self._signs, np.int32)
        label_N, scored_N = (np.frombuffer(flags, np.int8).astype(bool) for flags in (self._label, self._scored))
        order_N = np.lexsort((np.frombuffer(self._time, np.int64), user_N))
        if max_rows:
            order_N = self._newest(order_N, user_N, len(ids), max_rows, scored_N, counts)
        rows_U = np.bincount(user_N[order_N], minlength=len(ids))
        row_begin_U1 = np.concatenate([[0], np.cumsum(rows_U)]).astype(np.int64)
        sign_begin_N1 = np.concatenate([[0], np.cumsum(signs_N[order_N], dtype=np.int64)]).astype(np.int64)
        rows, signs = len(order_N), int(sign_begin_N1[-1])
        write_tensors(path, {
            "row_begin_U1": Pieces.whole(row_begin_U1),
            "sign_begin_U1": Pieces.whole(sign_begin_N1[row_begin_U1]),
            "sign_V": Pieces("int64", (signs,), self._ordered_signs(order_N, signs_N)),
            "count_NS": Pieces("int16", (rows, self._slots), self._ordered_counts(order_N)),
            "label_N": Pieces.whole(label_N[order_N]),
            "scored_N": Pieces.whole(scored_N[order_N]),
            "id_bytes": Pieces.whole(np.frombuffer("\n".join(ids).encode(), np.uint8)),
        })  # fmt: skip

    @staticmethod
    def _newest(order_N: np.ndarray, user_N: np.ndarray, users: int, max_rows: int, scored_N: np.ndarray, counts: RowCounts) -> np.ndarray:
        """The order without the rows that more than `max_rows` newer ones of their user follow."""
        end_U = np.cumsum(np.bincount(user_N, minlength=users))
        newest_N = end_U[user_N[order_N]] - np.arange(len(order_N)) <= max_rows
        cut = order_N[~newest_N]
        counts.rows_truncated, counts.scored_rows_truncated = len(cut), int(scored_N[cut].sum())
        return order_N[newest_N]

    def _ordered_signs(self, order_N: np.ndarray, signs_N: np.ndarray) -> Iterator[np.ndarray]:
        if not signs_N.any():
            return
        stored = np.memmap(self._paths[0], np.int64, "r")
        begin_N = np.cumsum(signs_N, dtype=np.int64) - signs_N
        for chunk in _chunks(order_N):
            lengths = signs_N[chunk]
            within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            yield stored[np.repeat(begin_N[chunk], lengths) + within]

    def _ordered_counts(self, order_N: np.ndarray) -> Iterator[np.ndarray]:
        stored = np.memmap(self._paths[1], np.int16, "r").reshape(-1, self._slots)
        for chunk in _chunks(order_N):
            yield stored[chunk]


def _chunks(order_N: np.ndarray) -> Iterator[np.ndarray]:
    for begin in range(0, len(order_N), _CHUNK_ROWS):
        yield order_N[begin : begin + _CHUNK_ROWS]
