"""The evaluator: the same numbers at any batch budget, any number of ranks, with users filtered or not; and the loader over users."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specforge.distributed import World
from specforge.errors import DataError
from specforge.features.loader import FeatureDataLoader
from specforge.ranking.batch import RankingBatch
from specforge.ranking.evaluate import HISTORY_SLICES, RankingEvaluator
from specforge.ranking.metrics import auc_exact
from specforge.ranking.store import UserStore
from tests.ranking.files_of_rows import random_lines, store
from tests.ranks import run_ranks


def forward(batch: RankingBatch) -> torch.Tensor:
    """A model by hand, of which a row's logit is made of its signs and of the labels of the user's earlier rows."""
    signs_N = torch.segment_reduce(
        batch.bags.sign_V.double() % 7, "sum", offsets=batch.bags.begin_B[:: batch.bags.slots].clone(), initial=0
    )
    start_N = torch.from_numpy(batch.documents.starts[batch.documents.index_T])
    clicks_N = torch.cat([torch.zeros(1), batch.label_N.cumsum(0)])
    past_N = clicks_N[: len(start_N)] - clicks_N[start_N]
    return (0.3 * past_N + 0.1 * signs_N - 2).float()[batch.scored_rows]


def evaluated(users: UserStore, world: World | None = None, budget: int = 32) -> dict[str, Any]:
    return RankingEvaluator(users, world or World(), micro_batch_tokens=budget).evaluate(forward)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return random_lines(80, seed=4)


def test_numbers_are_those_of_each_user_by_itself(tmp_path: Path, lines: list[str]) -> None:
    users = store(tmp_path, lines)
    logits, labels = [], []
    for number in range(len(users)):
        batch = RankingBatch.pack([number], [users.read(number)])
        logits.append(forward(batch))
        labels.append(batch.label_N[batch.scored_rows])
    logit_P, label_P = torch.cat(logits).double().numpy(), torch.cat(labels).numpy().astype(bool)
    numbers = evaluated(users)
    assert numbers["eval/auc_exact"] == auc_exact(logit_P, label_P)
    assert numbers["eval/auc"] == pytest.approx(numbers["eval/auc_exact"], abs=1e-3)
    assert numbers["eval/pcoc"] == pytest.approx((1 / (1 + np.exp(-logit_P))).sum() / label_P.sum(), rel=1e-12)
    assert (numbers["eval/scored_rows"], numbers["eval/users"]) == (len(label_P), len(users))


@pytest.mark.parametrize("budget", [1, 9, 50, 10_000])
def test_the_batch_budget_changes_nothing(tmp_path: Path, lines: list[str], budget: int) -> None:
    users = store(tmp_path, lines)
    evaluator = RankingEvaluator(users, World(), micro_batch_tokens=budget)
    rows = [sum(int(users.lengths[user]) for user in batch) for batch in evaluator.batches]
    assert max(rows) <= max(budget, users.lengths.max())
    assert evaluator.evaluate(forward) == pytest.approx(evaluated(users, budget=32), rel=1e-12)


def test_two_ranks_give_what_one_gives(tmp_path: Path, lines: list[str]) -> None:
    users = store(tmp_path, lines)
    first, second = run_ranks(lambda world: evaluated(UserStore(users.folder), world))
    assert first == second == pytest.approx(evaluated(users), rel=1e-12)
    assert first["eval/auc_exact"] == evaluated(users)["eval/auc_exact"]


def test_a_rank_without_users_takes_part(tmp_path: Path) -> None:
    users = store(tmp_path, ["ann,1,1,1,1:5", "ann,2,0,1,1:8"])
    first, second = run_ranks(lambda world: evaluated(UserStore(users.folder), world))
    assert first == second == evaluated(users)


def test_users_without_a_scored_row_change_no_number(tmp_path: Path, lines: list[str]) -> None:
    few, everyone = store(tmp_path, lines), store(tmp_path, lines, filter_users=False)
    assert len(few) < len(everyone)
    without_users = [{key: value for key, value in evaluated(users).items() if key != "eval/users"} for users in (few, everyone)]
    assert without_users[0] == pytest.approx(without_users[1], rel=1e-12)
    assert without_users[0]["eval/auc_exact"] == without_users[1]["eval/auc_exact"]


def test_slices_are_by_the_rows_before(tmp_path: Path) -> None:
    lines = [f"ann,{time},{time % 2},{int(time in (0, 3, 4, 15, 16, 63, 64, 70))},1:{time}" for time in range(71)]
    numbers = evaluated(store(tmp_path, lines))
    assert [numbers[f"eval/{name}/scored_rows"] for name in HISTORY_SLICES] == [2, 2, 2, 2]
    assert [numbers[f"eval/{name}/ctr"] for name in HISTORY_SLICES] == [0.5, 0.5, 0.5, 0.0]


def test_a_store_whose_scored_rows_were_all_cut_is_refused(tmp_path: Path) -> None:
    users = store(tmp_path, ["ann,1,1,1,1:5", "ann,2,1,0,1:5"], max_rows=1)
    with pytest.raises(DataError, match="no row is scored"):
        evaluated(users)


def windows(users: UserStore, world: World, position: int = 0, total: int = 100) -> list[list[tuple[list[str], list[int]]]]:
    """Of each step, each micro-batch: the users, and the first sign of each row."""
    data = FeatureDataLoader(users, 7, 8, 30, total, world, kind=RankingBatch)
    data.seek(position)
    return [[(list(batch.ids), [*batch.documents.lengths, *batch.bags.sign_V.tolist()]) for batch in window.batches] for window in data]


def test_training_sees_every_user_once_an_epoch_within_the_budget(tmp_path: Path) -> None:
    users = store(tmp_path, random_lines(50, seed=6, scored_share=1.0))
    seen = windows(users, World(), total=50)
    assert sorted(name for window in seen for ids, _ in window for name in ids) == sorted(users.ids)
    for window in seen:
        for ids, content in window:
            assert content[: len(ids)] == [int(users.lengths[users.ids.index(name)]) for name in ids]
            assert sum(content[: len(ids)]) <= 30
            assert content[len(ids) :] == [sign for name in ids for sign in users.read(users.ids.index(name)).sign_V.tolist()]
    assert windows(users, World(), position=16, total=50) == seen[2:]


def test_ranks_share_a_step_and_have_equally_many_batches(tmp_path: Path) -> None:
    users = store(tmp_path, random_lines(50, seed=6, scored_share=1.0))
    alone = windows(users, World(), total=50)
    shared = [windows(users, World(rank=rank, size=4), total=50) for rank in range(4)]
    for step, window in enumerate(alone):
        parts = [rank[step] for rank in shared]
        assert len({len(part) for part in parts}) == 1
        assert sorted(name for part in parts for ids, _ in part for name in ids) == sorted(name for ids, _ in window for name in ids)
    assert any(ids == [] for rank in shared for window in rank for ids, _ in window)  # an empty batch keeps a rank in step
