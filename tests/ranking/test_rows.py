"""From a file of rows to users: their order, their bags, what is left out, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from specforge.distributed import World
from specforge.errors import DataError
from specforge.ranking.batch import RankingBatch, RowMeta, UserRows
from specforge.ranking.store import UserCache
from tests.ranking.files_of_rows import bags, random_lines, store, write
from tests.ranks import run_ranks


def test_rows_of_a_user_come_in_the_order_of_time_and_their_signs_by_slot(tmp_path: Path) -> None:
    users = store(tmp_path, [
        "ann,20,1,1,3:7 1:5 3:6",
        "bob,5,0,1,2:9",
        "ann,-10,0,0,1:1 1:1",
        "ann,20,0,0,",
    ])  # fmt: skip
    assert users.ids == ["ann", "bob"]
    assert users.lengths.tolist() == [3, 1] and users.scored.tolist() == [1, 1]
    ann = users.read(0)
    assert bags(ann) == [[[1, 1], [], []], [[5], [], [7, 6]], [[], [], []]]
    assert ann.label_R.tolist() == [False, True, False] and ann.scored_R.tolist() == [False, True, False]
    assert bags(users.read(1)) == [[[], [9], []]]


def test_a_file_of_four_columns_scores_every_row(tmp_path: Path) -> None:
    users = store(tmp_path, ["ann,1,1,1:5", "bob,1,0,2:5", "ann,2,0,"])
    assert users.scored.tolist() == [2, 1]


def test_signs_of_any_64_bits_keep_their_bits(tmp_path: Path) -> None:
    signs = [2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63), 0]
    users = store(tmp_path, ["ann,1,1,1,1:" + " 1:".join(map(str, signs))])
    assert [sign % 2**64 for sign in users.read(0).sign_V.tolist()] == [sign % 2**64 for sign in signs]


def test_the_filter_leaves_out_users_without_a_scored_row_and_counts_them(tmp_path: Path) -> None:
    lines = ["ann,1,1,0,1:5", "bob,1,0,0,1:6", "ann,2,1,1,1:7", "cat,1,1,0,1:no number"]
    users = store(tmp_path, lines)
    assert users.ids == ["ann"] and users.lengths.tolist() == [2]
    assert (users.counts.users, users.counts.users_left_out, users.counts.rows, users.counts.rows_of_users_left_out) == (3, 2, 4, 2)
    assert users.counts.sentence() == "4 rows of 3 users; left out: 2 rows of 2 users without a scored row."
    everyone = store(tmp_path, lines[:3], filter_users=False)
    assert everyone.ids == ["ann", "bob"] and everyone.counts.sentence() == "3 rows of 2 users; left out: nothing."


def test_kept_users_are_the_same_with_and_without_the_filter(tmp_path: Path) -> None:
    lines = random_lines(60, seed=1)
    few, everyone = store(tmp_path, lines), store(tmp_path, lines, filter_users=False)
    assert 0 < len(few) < len(everyone) == 60
    for number, name in enumerate(few.ids):
        one, other = few.read(number), everyone.read(everyone.ids.index(name))
        assert bags(one) == bags(other) and (one.label_R == other.label_R).all() and (one.scored_R == other.scored_R).all()


def test_no_row_is_lost_or_changed_on_the_way(tmp_path: Path) -> None:
    lines = random_lines(300, seed=2, scored_share=1.0)  # more rows than one chunk of the spool
    assert len(lines) > 1024
    users = store(tmp_path, lines)
    written = sorted(lines, key=lambda line: (line.split(",")[0], int(line.split(",")[1])))
    found = []
    for number in sorted(range(len(users)), key=users.ids.__getitem__):
        user = users.read(number)
        for time, row in enumerate(bags(user)):
            pairs = " ".join(f"{slot}:{sign}" for slot, signs in enumerate(row, start=1) for sign in signs)
            found.append(f"{users.ids[number]},{time},{int(user.label_R[time])},{int(user.scored_R[time])},{pairs}")
    assert found == written


def test_the_newest_rows_are_kept_and_the_others_counted(tmp_path: Path) -> None:
    lines = [f"ann,{time},0,{int(time in (0, 9))},1:{time}" for time in range(10)] + ["bob,1,1,1,"]
    users = store(tmp_path, lines, max_rows=4)
    assert [row[0] for row in bags(users.read(0))] == [[6], [7], [8], [9]]
    assert users.lengths.tolist() == [4, 1]
    assert (users.counts.rows_truncated, users.counts.scored_rows_truncated) == (6, 1)
    assert users.counts.sentence() == "11 rows of 2 users; left out: 6 oldest rows beyond max_rows (1 of them scored)."


def test_signs_of_slots_that_the_model_does_not_have_are_counted(tmp_path: Path) -> None:
    users = store(tmp_path, ["ann,1,1,1,4:1 2:2 9:3 2:4"])
    assert bags(users.read(0)) == [[[], [2, 4], []]]
    assert users.counts.signs_of_other_slots == 2
    assert "2 signs of slots that the model does not have" in users.counts.sentence()


GOOD = "ann,1,1,1,1:5"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ann,1,1,1", "has 4 columns, not the 5"),
        ("ann,1,1,1,1:5,2:6", "has 6 columns, not the 5"),
        ("", "has 1 columns, not the 5"),
        ("ann,soon,1,1,1:5", "time='soon': must be a whole number"),
        ("ann,9223372036854775808,1,1,1:5", "time='9223372036854775808': must be a whole number"),
        ("ann,1,2,1,1:5", "label='2': must be 0 or 1"),
        ("ann,1,1,yes,1:5", "scored='yes': must be 0 or 1"),
        (",1,1,1,1:5", "user_id='': must not be empty"),
        ("ann,1,1,1,1:5 2:x", "signs='2:x': must be pairs slot:sign"),
        ("ann,1,1,1,1:5 2:1.5", "signs='2:1.5'"),
        ("ann,1,1,1,1:1_0", "signs='1:1_0'"),
        ("ann,1,1,1,1:5  2:6", "signs='': must be pairs slot:sign of whole numbers with one space between them"),
        ("ann,1,1,1,5", "signs='5'"),
        ("ann,1,1,1,-1:5", "signs='-1:5'"),
        ("ann,1,1,1,0:5", "slot='0': slots are numbered from 1"),
        ("ann,1,1,1,1:18446744073709551616", "sign='18446744073709551616': must lie between"),
        ("ann,1,1,1,1:-9223372036854775809", "sign='-9223372036854775809': must lie between"),
        ("ann,1,1,1," + "1:5 " * 300_000, "row="),
        ("ann,1,1,1," + " ".join(["1:5"] * 2**15), "a slot holds at most 32767 signs"),
    ],
)
def test_a_row_that_breaks_the_form_is_named_by_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = write(tmp_path, GOOD, GOOD, line, GOOD)
    with pytest.raises(DataError) as refused:
        UserCache(tmp_path / "cache").get(path, slots=3, filter_users=True)
    assert str(refused.value).startswith(f"{path}:3: ") and said in str(refused.value)
    assert len(str(refused.value)) < 500
    assert [found.name for found in (tmp_path / "cache").iterdir() if found.is_dir()] == []


@pytest.mark.parametrize("line", ["bob,1,0,0", "bob,1,0,0,1:5,2:6", "bob,1,0,no,1:5"])
def test_the_columns_of_users_that_are_left_out_are_looked_at_too(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"rows\.csv:2: "):
        store(tmp_path, [GOOD, line])


def test_a_user_id_must_be_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"ann,1,1,1,1:5\n\xff,1,1,1,1:5\n")
    with pytest.raises(DataError, match=r"rows.csv:2: user_id='\?*.*': must be UTF-8"):
        UserCache(tmp_path / "cache").get(path, slots=3, filter_users=True)


@pytest.mark.parametrize(("lines", "said"), [([], "holds no rows"), (["ann,1,1,0,1:5"], "no row is scored")])
def test_a_file_with_nothing_to_predict_is_refused(tmp_path: Path, lines: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        store(tmp_path, lines)


def test_a_store_is_made_once_for_a_file_and_its_settings(tmp_path: Path) -> None:
    def entries() -> set[str]:
        return {found.name for found in (tmp_path / "cache").iterdir() if found.is_dir()}

    lines = ["ann,1,1,1,1:5", "bob,1,0,1,1:6"]
    store(tmp_path, lines)
    (entry,) = entries()
    made_ns = (tmp_path / "cache" / entry / "rows.safetensors").stat().st_mtime_ns
    assert store(tmp_path, lines).ids == ["ann", "bob"]
    assert entries() == {entry} and (tmp_path / "cache" / entry / "rows.safetensors").stat().st_mtime_ns == made_ns
    store(tmp_path, lines, max_rows=1)
    store(tmp_path, lines, slots=2)
    store(tmp_path, lines, filter_users=False)
    assert store(tmp_path, [*lines, "cat,1,0,1,1:6"]).ids == ["ann", "bob", "cat"]
    assert len(entries()) == 5


def test_ranks_that_ask_at_once_get_one_store(tmp_path: Path) -> None:
    path = write(tmp_path, *random_lines(100, seed=3))

    def asked(world: World) -> tuple[str, int]:
        users = UserCache(tmp_path / "cache").get(path, slots=3, filter_users=True)
        return users.folder.name, len(users)

    first, second = run_ranks(asked)
    assert first == second
    assert [found.name for found in (tmp_path / "cache").iterdir() if found.is_dir()] == [first[0]]


def test_a_damaged_store_is_made_again(tmp_path: Path) -> None:
    lines = ["ann,1,1,1,1:5"]
    store(tmp_path, lines)
    (tensors,) = (tmp_path / "cache").glob("*/rows.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-len("ann") - 1] ^= 1  # whether the row is scored
    tensors.write_bytes(data)
    assert store(tmp_path, lines).scored.tolist() == [1]


def test_a_batch_packs_users_end_to_end(tmp_path: Path) -> None:
    users = store(tmp_path, ["ann,1,1,0,1:5 3:6", "ann,2,0,1,2:7 2:7", "bob,1,1,1,"])
    nobody = UserRows(np.zeros(0, np.int64), np.zeros((0, 3), np.int16), np.zeros(0, bool), np.zeros(0, bool))
    batch = RankingBatch.pack([0, 9, 1], [users.read(0), nobody, users.read(1)], ["ann", "nobody", "bob"])
    assert batch.documents.lengths == (2, 0, 1)
    assert batch.bags.sign_V.tolist() == [5, 6, 7, 7]
    assert batch.bags.begin_B.tolist() == [0, 1, 1, 2, 2, 4, 4, 4, 4, 4]
    assert batch.label_N.tolist() == [1.0, 0.0, 1.0] and batch.label_N.dtype == torch.float32
    assert batch.scored_N.tolist() == [False, True, True] and batch.scored_rows.tolist() == [1, 2]


def test_an_empty_batch_has_one_row_that_counts_nothing() -> None:
    batch = RankingBatch.empty(RowMeta(slots=3))
    assert (batch.samples, batch.documents.num_tokens, batch.num_scored) == ((), 1, 0)
    assert batch.bags.begin_B.tolist() == [0, 0, 0, 0]
