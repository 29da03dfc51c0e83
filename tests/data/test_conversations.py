import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specforge.data.conversations import Row, prompt_of, read_rows, split_rows
from specforge.errors import DataError

ASK = {"role": "user", "content": "how?"}
TELL = {"role": "assistant", "content": "so"}


def write(path: Path, *records: object) -> Path:
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


def test_the_three_kinds_of_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"id": "a", "conversations": [ASK, TELL], "tools": [{"name": "search"}], "domain": "chat"},
        "",
        {"id": 7, "text": "how? so", "domain": None},
        {"id": "c", "input_ids": [3, 4], "loss_mask": [False, True]},
    )
    assert read_rows(path) == [
        Row("a", "chat", messages=[ASK, TELL], tools=[{"name": "search"}]),
        Row("7", text="how? so"),
        Row("c", input_ids=[3, 4], loss_mask=[0, 1]),
    ]


def test_parquet_and_jsonl_give_the_same_rows_and_derived_ids(tmp_path: Path) -> None:
    """A Parquet column of structs gives every turn every key, as null where the turn had none."""
    called = {"role": "assistant", "tool_calls": [{"name": "search"}]}
    records = [{"conversations": [ASK, called]}, {"conversations": [ASK, TELL], "domain": "chat"}]
    pq.write_table(pa.Table.from_pylist(records, schema=_schema()), tmp_path / "rows.parquet")
    rows = read_rows(tmp_path / "rows.parquet")
    assert rows == read_rows(write(tmp_path / "rows.jsonl", *records))
    assert rows[0].messages == [ASK, called]


def test_a_derived_id_follows_the_content_and_not_its_spelling(tmp_path: Path) -> None:
    [spaced] = read_rows(write(tmp_path / "a.jsonl", '{ "domain": "",  "text": "caf\\u00e9" }'))
    [plain] = read_rows(write(tmp_path / "b.jsonl", '{"text":"café","domain":""}'))
    [other] = read_rows(write(tmp_path / "c.jsonl", '{"text":"cafe","domain":""}'))
    assert spaced.id == plain.id != other.id


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"id": "a", "text"', "not a line of JSON"),
        ([1], "a row must be an object"),
        ({"id": "a"}, "it has 0 of them"),
        ({"id": "a", "text": "x", "conversations": [ASK]}, "it has 2 of them"),
        ({"id": 1.5, "text": "x"}, "id=1.5: must be a string or whole number"),
        ({"text": "x", "domain": 3}, "domain=3: must be a string"),
        ({"text": ""}, "text='': must be a string that is not empty"),
        ({"conversations": []}, r"conversations=\[\]: must be a list of at least one turn"),
        ({"conversations": ["hi"]}, r"conversations\[0\]='hi': must be an object"),
        ({"conversations": [ASK, {"role": "gpt", "content": "x"}]}, r"conversations\[1\].role='gpt': must be one of system, developer"),
        ({"conversations": [{"role": "user", "content": 5}]}, r"conversations\[0\].content=5: must be a string"),
        ({"conversations": [{"role": "user", "tool_calls": [1]}]}, r"content=None: must be a string"),
        ({"conversations": [ASK], "tools": "search"}, "tools='search': must be a list"),
        ({"input_ids": [], "loss_mask": []}, r"input_ids=\[\]: .* at least one"),
        ({"input_ids": [1, -1], "loss_mask": [1, 1]}, "input_ids"),
        ({"input_ids": [1, True], "loss_mask": [1, 1]}, "input_ids"),
        ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "loss_mask=.*0 and 1"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, r"loss_mask='\[1 values\]': must be as long as input_ids \(2\)"),
        ({"id": "good", "text": "again"}, "id='good' is already taken by line 1"),
        ({"messages": [ASK, TELL]}, "it has 0 of them; `messages` is called conversations here"),
        ({"conversations": [{"from": "human", "value": "x"}]}, r"role=None: .*; give role and content instead of from and value, user for"),
        ({"conversations": [{"role": "user", "content": [{"type": "text"}]}]}, r"must be a string; join the texts of its parts into one\."),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, record: object, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", {"id": "good", "text": "x"}, record)
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{message}"):
        read_rows(path)


def test_a_file_in_utf_16(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n', encoding="utf-16")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*; it looks like UTF-16, so save the file as UTF-8\."):
        read_rows(tmp_path / "rows.jsonl")


def test_files_that_hold_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable Parquet file"):
        read_rows(write(tmp_path / "rows.parquet", "text"))


def test_the_split_depends_on_ids_alone() -> None:
    rows = [Row(f"id-{number}", text="x") for number in range(2000)]
    train, heldout = split_rows(rows, 0.1)
    assert {row.id for row in train} | {row.id for row in heldout} == {row.id for row in rows}
    assert len(train) + len(heldout) == 2000
    assert 160 <= len(heldout) <= 240  # three standard deviations of Binomial(2000, 0.1) are 40
    assert {row.id for row in split_rows(rows[::-2], 0.1)[1]} == {row.id for row in heldout} & {row.id for row in rows[::-2]}
    assert {row.id for row in heldout} < {row.id for row in split_rows(rows, 0.2)[1]}


def test_the_split_is_pinned() -> None:
    """SHA-256 of "id-0" and "id-1" begins at 0.661 and 0.920 of its range: `printf id-0 | sha256sum` begins with a9, 0xa9/256 = 0.66."""
    assert split_rows([Row("id-1"), Row("id-0")], 0.662) == ([Row("id-1")], [Row("id-0")])
    with pytest.raises(DataError, match="2 rows to train on"):
        split_rows([Row("id-1"), Row("id-0")], 0.661)


def test_a_split_that_leaves_one_side_empty_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.eval_fraction=1e-09 leaves 3 rows to train on and 0 to evaluate on"):
        split_rows([Row(name) for name in "abc"], 1e-9)


def test_the_prompt_of_a_row(tmp_path: Path) -> None:
    assert prompt_of(Row("a", messages=[ASK, TELL, ASK, TELL])) == [ASK, TELL, ASK]
    assert prompt_of(Row("a", messages=[ASK, TELL, ASK])) == [ASK, TELL, ASK]
    with pytest.raises(DataError, match="nothing is asked"):
        prompt_of(Row("a", messages=[TELL]))
    with pytest.raises(DataError, match="no conversation"):
        prompt_of(Row("a", text="x"))
    [read] = read_rows(write(tmp_path / "rows.jsonl", {"id": "a", "text": "x"}))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: Row 'a' is no conversation"):
        prompt_of(read)


def _schema() -> pa.Schema:
    call = pa.struct([("name", pa.string())])
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])
    return pa.schema([("conversations", pa.list_(turn)), ("domain", pa.string())])
