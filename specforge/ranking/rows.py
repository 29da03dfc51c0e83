"""Files of rows, read as a stream: each line is what a user was shown once, and whether they clicked.

A line is `user_id,time,label,scored,slot:sign slot:sign ...`, or `user_id,time,label,slot:sign ...` in a file whose every row is scored.
There is no header; the first line decides for all.

    user_id  any text without a comma, in UTF-8
    time     whole number of 64 bits; the rows of a user are taken in its order, those of equal time in the order of the file
    label    1: clicked, 0: not
    scored   1: the row is trained on, or predicted; 0: it is history only
    slot     1 to S, in any order; each as often as it has signs, perhaps never
    sign     whole number from -2^63 to 2^64 - 1, a hash; from 2^63 on it is the negative number of the same bits

Such as `ann,1700000000,1,0,1:9215502983 2:77 2:18446744073709551615`: slot 1 holds one sign, slot 2 two.

The file is read twice. The first pass looks at the columns before the signs and finds the users with a scored row; the second parses their
rows. What others were shown cannot change a prediction for these, since no user sees another.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from specforge import files
from specforge.errors import DataError

_LONGEST_LINE_BYTES = 2**20
_MOST_SIGNS = 2**15 - 1
"""Of one bag."""
_PAIRS = rb"(?:\d{1,9}:-?\d{1,20}(?: \d{1,9}:-?\d{1,20})*)?"
_FIELDS = {
    "user_id": (rb"[^,]+", "must not be empty"),
    "time": (rb"-?\d{1,19}", "must be a whole number of 64 bits"),
    "label": (rb"[01]", "must be 0 or 1"),
    "scored": (rb"[01]", "must be 0 or 1"),
    "signs": (_PAIRS, "must be pairs slot:sign of whole numbers with one space between them"),
}
_WITHOUT_SCORED = tuple(name for name in _FIELDS if name != "scored")


class Row(NamedTuple):
    user: int
    """Number of the user among those that are kept."""
    time: int
    label: bool
    scored: bool
    signs: list[int]
    """Slot by slot."""
    counts: list[int]
    """Signs of each slot, [S]."""


@dataclass
class RowCounts:
    """What became of the rows of a file. Nothing is left out that is not counted here."""

    users: int = 0
    users_left_out: int = 0
    """Without a scored row."""
    rows: int = 0
    rows_of_users_left_out: int = 0
    rows_truncated: int = 0
    """The oldest ones, of users with more than `max_rows`."""
    scored_rows_truncated: int = 0
    """Of those, the ones that should have been trained on or predicted."""
    signs_of_other_slots: int = 0
    """In slots beyond S, of the rows that were parsed."""

    def sentence(self) -> str:
        left_out = {
            f"{self.rows_of_users_left_out} rows of {self.users_left_out} users without a scored row": self.rows_of_users_left_out,
            f"{self.rows_truncated} oldest rows beyond max_rows": self.rows_truncated,
            f"({self.scored_rows_truncated} of them scored)": self.scored_rows_truncated,
            f"{self.signs_of_other_slots} signs of slots that the model does not have": self.signs_of_other_slots,
        }
        named = ", ".join(text for text, count in left_out.items() if count)
        return f"{self.rows} rows of {self.users} users; left out: {named.replace(', (', ' (') or 'nothing'}."


class RowReader:
    """The two passes over one file.

    Raises:
        DataError: the file is missing or empty.
    """

    def __init__(self, path: Path, slots: int) -> None:
        self.path, self.slots = path, slots
        self.counts = RowCounts()
        try:
            with path.open("rb") as file:
                first = file.readline(_LONGEST_LINE_BYTES)
        except OSError as cause:
            raise DataError(f"{path}: cannot be read ({cause.strerror}); give a file of rows.") from cause
        if not first:
            raise DataError(f"{path}: holds no rows; give a file with at least one.")
        self._names = _WITHOUT_SCORED if first.count(b",") == len(_WITHOUT_SCORED) - 1 else tuple(_FIELDS)
        self._pattern = re.compile(b",".join(b"(%b)" % _FIELDS[name][0] for name in self._names))
        self._scored_column = self._names.index("scored") if "scored" in self._names else None

    def users(self, *, without_scored_row: bool = False) -> dict[bytes, int]:
        """The first pass: the users to read, numbered from 0 as they first turn up, or first turn up scored.

        Args:
            without_scored_row: take these users too.

        Raises:
            DataError: with file and line, where a row has the wrong number of columns or says of `scored` neither 0 nor 1; without a
                line, where no user is left.
        """
        kept, seen = dict[bytes, int](), set[bytes]()
        for number, line in self._lines():
            fields = line.split(b",", len(self._names) - 1)
            if len(fields) != len(self._names) or b"," in fields[-1]:
                self._refuse(number, line)
            user, scored = fields[0], True
            if self._scored_column is not None:
                if fields[self._scored_column] not in (b"0", b"1"):
                    self._refuse(number, line)
                scored = fields[self._scored_column] == b"1"
            self.counts.rows += 1
            seen.add(user)
            if user not in kept and (scored or without_scored_row):
                kept[user] = len(kept)
                self._require(_is_text(user), number, "user_id", user, "must be UTF-8")
        if not kept:
            raise DataError(f"{self.path}: no row is scored, so there is nothing to train on or predict; set the fourth column to 1.")
        self.counts.users, self.counts.users_left_out = len(seen), len(seen) - len(kept)
        return kept

    def rows(self, users: dict[bytes, int]) -> Iterator[Row]:
        """The second pass: the rows of `users`, in the order of the file.

        Raises:
            DataError: with file and line, of a row that breaks the form.
        """
        for number, line in self._lines():
            user = users.get(line[: line.find(b",")])
            if user is None:
                self.counts.rows_of_users_left_out += 1
                continue
            parsed = self._pattern.fullmatch(line)
            if parsed is None:
                self._refuse(number, line)
            fields = dict(zip(self._names, parsed.groups(), strict=True))
            time = int(fields["time"])
            self._require(-(2**63) <= time < 2**63, number, "time", fields["time"], _FIELDS["time"][1])
            signs, counts = self._bags(number, fields["signs"])
            yield Row(user, time, fields["label"] == b"1", fields.get("scored") != b"0", signs, counts)

    def _bags(self, number: int, pairs: bytes) -> tuple[list[int], list[int]]:
        values = list(map(int, pairs.replace(b":", b" ").split()))
        slots, signs = values[::2], values[1::2]
        counts = [0] * (self.slots + 1)
        for slot in slots:
            counts[slot if slot <= self.slots else 0] += 1
        if not slots:
            return signs, counts[1:]
        self._require(min(slots) > 0, number, "slot", b"0", "slots are numbered from 1")
        self._require(max(counts) <= _MOST_SIGNS, number, "signs", pairs, f"a slot holds at most {_MOST_SIGNS} signs")
        for worst in (min(signs), max(signs)):
            self._require(-(2**63) <= worst < 2**64, number, "sign", str(worst).encode(), "must lie between -2^63 and 2^64 - 1")
        self.counts.signs_of_other_slots += counts[0]
        order = sorted(range(len(slots)), key=slots.__getitem__)
        kept = order[: len(order) - counts[0]]
        return [signs[place] - 2**64 if signs[place] >= 2**63 else signs[place] for place in kept], counts[1:]

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            number = 0
            while line := file.readline(_LONGEST_LINE_BYTES + 1):
                number += 1
                self._require(len(line) <= _LONGEST_LINE_BYTES, number, "row", line, f"must not exceed {_LONGEST_LINE_BYTES} bytes")
                yield number, line.rstrip(b"\r\n")

    def _refuse(self, number: int, line: bytes) -> NoReturn:
        """Name what breaks the form."""
        fields = line.split(b",")
        if len(fields) != len(self._names):
            raise DataError(
                f"{self.path}:{number}: has {len(fields)} columns, not the {len(self._names)} of {','.join(self._names)}; "
                "correct the row or remove it."
            )
        for name, field in zip(self._names, fields, strict=True):
            pattern, rule = _FIELDS[name]
            if name == "signs":
                for pair in field.split(b" ") if field else ():
                    self._require(re.fullmatch(_PAIRS, pair) is not None and pair != b"", number, name, pair, rule)
            self._require(re.fullmatch(pattern, field) is not None, number, name, field, rule)
        raise AssertionError(line)

    def _require(self, condition: bool, number: int, key: str, value: bytes, rule: str) -> None:
        if not condition:
            shown = files.shown(value[:100].decode(errors="replace"))
            raise DataError(f"{self.path}:{number}: {key}={shown}: {rule}; correct the row or remove it.")


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
