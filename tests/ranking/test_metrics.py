"""Metrics of clicks against their definitions, and against each other."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from specforge.distributed import World
from specforge.errors import DataError
from specforge.ranking.metrics import ClickSums, auc_exact, bayes_auc, group_auc
from tests.ranks import run_ranks


def pairs_won(score_P: np.ndarray, label_P: np.ndarray) -> float:
    """AUC by counting: each click against each non-click."""
    won = [
        1.0 if clicked > not_clicked else 0.5 if clicked == not_clicked else 0.0
        for clicked in score_P[label_P]
        for not_clicked in score_P[~label_P]
    ]
    return sum(won) / len(won) if won else math.nan


def measure(logit_P: np.ndarray, label_P: np.ndarray, group_P: np.ndarray | None = None) -> dict[str, float]:
    groups = np.arange(len(logit_P)) if group_P is None else group_P
    sums = ClickSums(["all"], int(groups.max()) + 1)
    sums.add(torch.from_numpy(logit_P), torch.from_numpy(label_P), np.zeros(len(logit_P), dtype=np.int64), groups)
    return sums.numbers(World())


def drawn(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, true probabilities and labels: a rate of about one in seven."""
    draw = np.random.default_rng(seed)
    logit_P = draw.normal(-2.0, 1.2, rows)
    probability_P = 1 / (1 + np.exp(-logit_P))
    return logit_P, probability_P, draw.random(rows) < probability_P


@pytest.mark.parametrize("distinct", [2, 5, 10_000])
def test_the_exact_auc_counts_pairs_with_ties_half(distinct: int) -> None:
    draw = np.random.default_rng(distinct)
    for rows in (2, 3, 17, 120):
        score_P, label_P = draw.integers(0, distinct, rows).astype(float), draw.random(rows) < 0.4
        label_P[:2] = True, False
        assert auc_exact(score_P, label_P) == pytest.approx(pairs_won(score_P, label_P), abs=1e-12)


@pytest.mark.parametrize("label", [True, False])
def test_the_auc_of_one_class_is_no_number(label: bool) -> None:
    labels = np.full(4, label)
    assert math.isnan(auc_exact(np.arange(4.0), labels)) and math.isnan(measure(np.arange(4.0), labels)["auc"])


def test_the_auc_of_each_group_is_that_of_its_rows() -> None:
    draw = np.random.default_rng(3)
    group_P, score_P, label_P = draw.integers(0, 20, 200), draw.integers(0, 6, 200).astype(float), draw.random(200) < 0.3
    auc_G, rows_G = group_auc(group_P, score_P, label_P, 21)
    wanted_G = [pairs_won(score_P[group_P == group], label_P[group_P == group]) for group in range(21)]
    np.testing.assert_allclose(auc_G, wanted_G, atol=1e-12)
    assert rows_G.tolist() == np.bincount(group_P, minlength=21).tolist() and math.isnan(auc_G[20])


def test_gauc_by_hand() -> None:
    group_P = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    label_P = np.array([1, 0, 0, 0, 1, 1, 1, 1], dtype=bool)
    logit_P = np.array([2.0, 1.0, 3.0, -1.0, 5.0, 0.0, 1.0, 2.0])
    # user 0: its click is above one of two: 1/2, 3 rows; user 1: 1, 2 rows; user 2 has clicks only
    assert measure(logit_P, label_P, group_P)["gauc"] == pytest.approx((3 * 0.5 + 2 * 1.0) / 5)


def test_gauc_knows_no_order_between_users_but_auc_does() -> None:
    logit_P, _, label_P = drawn(4000)
    group_P = np.arange(4000) // 8
    moved_P = logit_P + np.random.default_rng(1).normal(0, 5, 500)[group_P]
    before, after = measure(logit_P, label_P, group_P), measure(moved_P, label_P, group_P)
    assert after["gauc"] == pytest.approx(before["gauc"], abs=1e-12)
    assert after["auc"] < before["auc"] - 0.1


def test_a_user_whose_rows_come_in_parts_is_refused() -> None:
    sums = ClickSums(["all"], 9)
    for group in (4, 7, 7):
        sums.add(torch.zeros(2), torch.tensor([True, False]), np.zeros(2, dtype=np.int64), np.full(2, group))
    with pytest.raises(DataError, match="user 7: its rows came in 2 parts"):
        sums.numbers(World())


def test_the_bins_lose_little_of_the_exact_auc() -> None:
    logit_P, _, label_P = drawn(50_000)
    assert measure(logit_P, label_P)["auc"] == pytest.approx(auc_exact(logit_P, label_P), abs=2e-5)


def test_numbers_by_hand() -> None:
    probability_P, label_P = np.array([0.5, 0.25, 0.25, 0.8]), np.array([1, 0, 1, 0], dtype=bool)
    numbers = measure(np.log(probability_P / (1 - probability_P)), label_P)
    nats = -(math.log(0.5) + math.log(0.75) + math.log(0.25) + math.log(0.2))
    assert numbers["pcoc"] == pytest.approx(1.8 / 2)
    assert numbers["auc"] == pytest.approx((0 + 1 + 0 + 0.5) / 4)
    assert numbers["avg_loss"] == pytest.approx(nats / 4)
    assert numbers["ne"] == pytest.approx(nats / 4 / math.log(2))
    assert numbers["ece"] == pytest.approx((abs(0.5 - 1) + abs(0.5 - 1) + 0.8) / 4)
    assert (numbers["ctr"], numbers["scored_rows"]) == (0.5, 4)


def test_the_rate_alone_has_a_normalised_entropy_of_one() -> None:
    _, _, label_P = drawn(1000)
    rate = label_P.mean()
    numbers = measure(np.full(1000, math.log(rate / (1 - rate))), label_P)
    assert numbers["ne"] == pytest.approx(1.0) and numbers["auc"] == 0.5 and numbers["pcoc"] == pytest.approx(1.0)


def test_bayes_auc_counts_pairs_by_their_chance() -> None:
    probability_P = np.array([0.1, 0.7, 0.3, 0.3, 0.9, 0.7, 0.3])
    won = weight = 0.0
    for i, p in enumerate(probability_P):
        for j, other in enumerate(probability_P):
            if i != j:
                weight += p * (1 - other)
                won += p * (1 - other) * ((p > other) + (p == other) / 2)
    assert bayes_auc(probability_P) == pytest.approx(won / weight, abs=1e-12)


def test_bayes_auc_is_the_mean_of_what_labels_give() -> None:
    _, probability_P, _ = drawn(3000)
    draw = np.random.default_rng(5)
    aucs = [auc_exact(probability_P, draw.random(3000) < probability_P) for _ in range(200)]
    assert np.mean(aucs) == pytest.approx(bayes_auc(probability_P), abs=4 * np.std(aucs) / 200**0.5)
    assert np.std(aucs) / 200**0.5 < 1e-3


DISTORTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "steeper": lambda logit_P: 1.6 * logit_P + 0.2,
    "shifted": lambda logit_P: logit_P + 0.5,
    "bent": lambda logit_P: logit_P + 2 * np.tanh(logit_P),
}


@pytest.mark.parametrize("name", DISTORTIONS)
def test_a_monotone_distortion_moves_the_bias_and_leaves_the_order(name: str) -> None:
    logit_P, _, label_P = drawn(100_000)
    distorted_P = DISTORTIONS[name](logit_P)
    group_P = np.arange(100_000) // 10
    true, bent = measure(logit_P, label_P, group_P), measure(distorted_P, label_P, group_P)
    assert auc_exact(distorted_P, label_P) == auc_exact(logit_P, label_P)
    assert bent["gauc"] == true["gauc"]
    assert bent["auc"] == pytest.approx(true["auc"], abs=2e-5)
    assert true["pcoc"] == pytest.approx(1.0, abs=0.02) and abs(bent["pcoc"] - 1) > 0.1
    assert bent["ece"] > true["ece"] + 0.01 and bent["ne"] > true["ne"]


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.7])
def test_bias_is_never_more_than_the_calibration_error(scale: float, shift: float) -> None:
    logit_P, _, label_P = drawn(2000)
    numbers = measure(scale * logit_P + shift, label_P)
    assert abs(numbers["pcoc"] - 1) * numbers["ctr"] <= numbers["ece"] + 1e-12


def parts_of(logit_P: np.ndarray, label_P: np.ndarray, world: World, batch: int) -> dict[str, float]:
    """Every `world.size`-th user of five rows each, added `batch` users at a time; slices by the row's place within its user."""
    sums = ClickSums(["early", "late", "never"], len(logit_P) // 5)
    mine = np.arange(world.rank, len(logit_P) // 5, world.size)
    for begin in range(0, len(mine), batch):
        users = mine[begin : begin + batch]
        rows = (users[:, None] * 5 + np.arange(5)).ravel()
        sums.add(torch.from_numpy(logit_P[rows]), torch.from_numpy(label_P[rows]), (rows % 5 > 2).astype(np.int64), rows // 5)
    return sums.numbers(world)


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_neither_batches_nor_ranks_change_a_number(batch: int) -> None:
    logit_P, _, label_P = drawn(1000)
    whole = parts_of(logit_P, label_P, World(), 1000)
    assert {"auc", "gauc", "pcoc", "ece", "ne", "avg_loss", "early/auc", "late/ece"} <= whole.keys()
    assert not any(name.startswith("never") for name in whole)
    first, second = run_ranks(lambda world: parts_of(logit_P, label_P, world, batch))
    assert first == second
    assert parts_of(logit_P, label_P, World(), batch) == pytest.approx(whole, rel=1e-12)
    assert first == pytest.approx(whole, rel=1e-12)


def test_a_slice_is_measured_as_if_it_were_all() -> None:
    logit_P, _, label_P = drawn(1000)
    numbers, late = parts_of(logit_P, label_P, World(), 1000), np.arange(1000) % 5 > 2
    wanted = measure(logit_P[late], label_P[late])
    for name in ("auc", "pcoc", "ece", "ne", "avg_loss", "ctr", "scored_rows"):
        assert numbers[f"late/{name}"] == pytest.approx(wanted[name], rel=1e-12)
