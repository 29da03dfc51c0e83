"""Memory of reading rows, of which `tracemalloc` gives the same figure each time."""

from pathlib import Path

from specforge.bench.ranking_rows import measure, naive_rows
from specforge.ranking.store import UserCache
from tests.ranking.files_of_rows import bags


def test_the_stream_needs_a_twentieth_of_what_objects_need_and_reads_the_same(tmp_path: Path) -> None:
    numbers = measure(tmp_path, users=100)
    assert numbers["stream_mb"] <= numbers["naive_mb"] / 20

    users, rows = UserCache(tmp_path / "cache").get(tmp_path / "rows.csv", slots=28, filter_users=False), naive_rows(tmp_path / "rows.csv")
    assert len(users.label_N) == len(rows) == numbers["rows"]
    numbered = {name: number for number, name in enumerate(users.ids)}
    read = {name: bags(users.read(number)) for name, number in numbered.items()}
    for row in rows[::50]:
        assert read[row["user"]][row["time"]] == [row["signs"].get(slot, []) for slot in range(1, 29)]
        assert users.label_N[users.rows_of(numbered[row["user"]])][row["time"]] == row["label"]
