"""UserStore: the rows of users, packed and mapped into memory; made of a file of rows once and found again."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

from specforge import files
from specforge.errors import DataError
from specforge.features.span import Span, Spans
from specforge.ranking.batch import RowMeta, UserRows
from specforge.ranking.rows import RowCounts, RowReader
from specforge.ranking.spool import Spool

FORMAT = 1
_INDEX, _TENSORS = "index.json", "rows.safetensors"
_log = logging.getLogger(__name__)


class UserStore:
    """U users, read by number. A loader takes it as it takes a store of features; a sample is a user, a token one of their rows.

    ids: per user. lengths, scored: int64 [U], rows and scored rows. label_N, scored_N: bool, of all rows, user by user.

    Raises:
        DataError: the folder holds no such store, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        files.verify(folder, DataError, sizes_only=True)
        index = files.read_object(folder / _INDEX, DataError, format=int, slots=int, counts=dict)
        self.folder, self._path = folder, folder / _TENSORS
        self._stored = files.open_tensors(self._path, DataError)
        self._check(index["format"], index["slots"])
        files.check_fields(index["counts"], str(folder / _INDEX), DataError, **files.kinds_of(RowCounts))
        self.meta = RowMeta(index["slots"])
        self.counts = RowCounts(**index["counts"])
        self._row_begin_U1, self._sign_begin_U1, self.label_N, self.scored_N, id_bytes = (
            self._stored.get_tensor(name).numpy() for name in ("row_begin_U1", "sign_begin_U1", "label_N", "scored_N", "id_bytes")
        )
        self.ids: list[str] = id_bytes.tobytes().decode().split("\n")
        self.lengths = np.diff(self._row_begin_U1)
        self.scored = np.diff(np.concatenate([[0], np.cumsum(self.scored_N)])[self._row_begin_U1])

    def __len__(self) -> int:
        return len(self.ids)

    def rows_of(self, user: int) -> slice:
        """Places of the user's rows among all."""
        return slice(int(self._row_begin_U1[user]), int(self._row_begin_U1[user + 1]))

    def read(self, user: int) -> UserRows:
        """The rows of a user by number, 0 to U - 1."""
        rows, signs = self.rows_of(user), slice(int(self._sign_begin_U1[user]), int(self._sign_begin_U1[user + 1]))
        sign_V, count_RS = self._stored.get_slice("sign_V")[signs].numpy(), self._stored.get_slice("count_NS")[rows].numpy()
        return UserRows(sign_V, count_RS, self.label_N[rows], self.scored_N[rows])

    def reading(self, spans: Spans, position: int) -> AbstractContextManager[None]:
        return nullcontext()

    def take(self, span: Span, numbers: Sequence[int]) -> list[UserRows]:
        return [self.read(number) for number in numbers]

    def release(self, span: Span) -> None:
        """A store on disk stays as it is."""

    def _check(self, version: int, slots: int) -> None:
        if version != FORMAT:
            raise DataError(f"{self._path}: is of format {version}, not {FORMAT}; remove its folder, and it is made again.")
        shapes = {name: self._stored.get_slice(name).get_shape() for name in self._stored.keys()}  # noqa: SIM118
        begins = [self._stored.get_tensor(name).numpy() for name in ("row_begin_U1", "sign_begin_U1") if name in shapes]
        rows, signs = (int(begin[-1]) if begin.size else -1 for begin in begins) if len(begins) == 2 else (-1, -1)
        wanted = {"sign_V": [signs], "count_NS": [rows, slots], "label_N": [rows], "scored_N": [rows]}
        if any(shapes.get(name) != shape for name, shape in wanted.items()) or any((np.diff(begin) < 0).any() for begin in begins):
            raise DataError(f"{self._path}: its tensors do not fit together; remove its folder, and it is made again.")


def write_store(source: Path, folder: Path, *, slots: int, filter_users: bool, max_rows: int = 0) -> None:
    """Read a file of rows into `folder`, in memory that does not grow with the signs.

    Raises:
        DataError: with file and line, of a row that breaks the form of `ranking.rows`.
    """
    reader = RowReader(source, slots)
    users = reader.users(without_scored_row=not filter_users)
    with Spool(folder, slots) as spool:
        for row in reader.rows(users):
            spool.add(row)
        spool.write(folder / _TENSORS, [user.decode() for user in users], max_rows, reader.counts)
    files.write_json(folder / _INDEX, {"format": FORMAT, "slots": slots, "counts": dataclasses.asdict(reader.counts)})


class UserCache:
    """Stores below `root`, each named by the SHA-256 of what it was made of: the bytes of the file, slots, filter and `max_rows`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._fingerprints = files.Fingerprints(root / ".fingerprints.json")

    def get(self, source: Path, *, slots: int, filter_users: bool, max_rows: int = 0) -> UserStore:
        """Of many processes that ask at once, one reads the file and the others wait for it. What was left out stands in `counts`.

        Args:
            slots: S; signs of slots beyond are left out and counted.
            filter_users: leave out users without a scored row.
            max_rows: the newest rows of a user that are kept; 0: all.

        Raises:
            DataError: the file cannot be used.
        """
        if not source.is_file():
            raise DataError(f"{source}: there is no such file; give a file of rows.")
        made_of = {
            "sha256": self._fingerprints.sha256(source),
            "slots": slots,
            "filter": filter_users,
            "max_rows": max_rows,
            "format": FORMAT,
        }
        entry = self.root / hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        try:
            store = self._read(entry)  # an entry is complete or absent, so who only reads needs neither lock nor rights
        except DataError:
            with files.writable(self.root, DataError), files.Lock(self.root / f".{entry.name}.lock"):
                found = self._read_or_discard(entry) if entry.exists() else None
                store = found or self._make(entry, source, slots, filter_users, max_rows)
        return store

    def _make(self, entry: Path, source: Path, slots: int, filter_users: bool, max_rows: int) -> UserStore:
        files.sweep(entry)
        with files.staging(entry) as folder:
            write_store(source, folder, slots=slots, filter_users=filter_users, max_rows=max_rows)
        return UserStore(entry)

    def _read(self, entry: Path) -> UserStore:
        files.verify(entry, DataError, fingerprints=self._fingerprints)
        return UserStore(entry)

    def _read_or_discard(self, entry: Path) -> UserStore | None:
        try:
            return self._read(entry)
        except DataError as damage:
            _log.warning("rows are damaged and will be read again: %s", damage)
            files.discard(entry)
            return None
